"""``python -m models``: explore every variant of the specification, and say what was found.

Exit code 0 only if each safe variant keeps its promises and each broken one breaks the promise that it should.
``--only 'OWNED on disk'`` explores those with that in their name; a broken one's shortest counter-example is printed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import NamedTuple

from models import spin, updates
from models.explore import explore
from models.updates import model_of
from models.variants import BROKEN, SAFE, Broken, Safe


class Told(NamedTuple):
    """One line of the report, and its trace."""

    kind: str
    ok: bool
    what: str
    states: int
    edges: int
    seconds: float
    outcome: str
    trace: tuple[str, ...] = ()


def check_safe(variant: Safe, *, quick: bool) -> Told:
    """The promises hold in every world, and where they should, the guest can always run again."""
    begun = time.monotonic()
    bounds = variant.quick if quick else variant.bounds
    found = explore(model_of(bounds), variant.promises, liveness=variant.live, goal=variant.goal)
    outcome = found.broken or ("L1: the guest can never run again" if found.stuck else "holds")
    trace = tuple(found.trace or (_shortest(found.stuck)))
    return Told(
        "safe", not trace, variant.what, found.states, found.edges, time.monotonic() - begun, outcome, trace
    )


def check_broken(variant: Broken) -> Told:
    """Without its guard the promise breaks."""
    begun = time.monotonic()
    live = variant.breaks == "L1"
    model = model_of(variant.bounds, variant.guard)
    found = explore(model, () if live else (variant.breaks,), liveness=live, goal=variant.goal)
    trace = tuple(found.trace or (_shortest(found.stuck)))
    outcome = found.broken or ("L1: the guest can never run again" if trace else "NOT NOTICED")
    name = f"without: {variant.guard}"
    return Told(
        "broken", bool(trace), name, found.states, found.edges, time.monotonic() - begun, outcome, trace
    )


def check_spin(name: str, defines: tuple[str, ...]) -> Told:
    """Spin agrees."""
    begun = time.monotonic()
    found = spin.search(*defines)
    broken = name in spin.BROKEN
    outcome = "assertion violated" if found.errors else "NOT NOTICED" if broken else "holds"
    return Told(
        "spin_broken" if broken else "spin",
        bool(found.errors) == broken,
        f"spin: {name}",
        found.states,
        found.transitions,
        time.monotonic() - begun,
        outcome,
        found.trace,
    )


def main() -> int:
    """Run all variants, on all cores."""
    parser = argparse.ArgumentParser(prog="python -m models", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="smaller bounds for the safe variants")
    parser.add_argument("--only", default="", metavar="TEXT", help="only variants with this in their name")
    parser.add_argument("--no-spin", action="store_true", help="without the search by Spin")
    parser.add_argument("--brief", action="store_true", help="without the traces of broken variants")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--json", action="store_true", help="print one JSON document; the rest on stderr")
    arguments = parser.parse_args()
    missing = [] if arguments.no_spin else spin.missing()
    with (
        contextlib.redirect_stdout(sys.stderr if arguments.json else sys.stdout),
        ProcessPoolExecutor(arguments.jobs) as pool,
    ):
        chosen = checks(quick=arguments.quick, with_spin=not (arguments.no_spin or missing))
        todo = [pool.submit(check) for name, check in chosen.items() if arguments.only in name]
        if not todo:
            parser.error(f"no variant has {arguments.only!r} in its name")
        told = [_shown(one.result(), brief=arguments.brief) for one in todo]
        code = _summary(told, missing)
    if arguments.json:
        print(json.dumps(document(told, missing)))
    return code


def checks(*, quick: bool, with_spin: bool) -> dict[str, Callable[[], Told]]:
    """Everything there is to check, by its name in the report, and in its order."""
    found: dict[str, Callable[[], Told]] = {
        variant.what: partial(check_safe, variant, quick=quick) for variant in (*SAFE, *updates.SAFE)
    }
    found |= {
        f"without: {variant.guard}": partial(check_broken, variant) for variant in (*BROKEN, *updates.BROKEN)
    }
    if with_spin:
        found |= {f"spin: {name}": partial(check_spin, name, how) for name, how in spin.SAFE.items()}
        found |= {f"spin: {name}": partial(check_spin, name, (f"-D{name}",)) for name in spin.BROKEN}
    return found


def _summary(told: Sequence[Told], missing: Sequence[str]) -> int:
    wrong = [one.what for one in told if not one.ok]
    states, edges = sum(one.states for one in told), sum(one.edges for one in told)
    print(f"{len(told)} variants, {states} states, {edges} edges, {len(wrong)} not as they should be")
    if missing:
        required = os.environ.get("VMFERRY_REQUIRE") == "all"
        word = "FAILED" if required else "LEFT OUT"
        print(f"{word} the search by Spin: missing here: {', '.join(missing)} (install spin and gcc)")
        return 1 if required or wrong else 0
    return 1 if wrong else 0


def document(told: Sequence[Told], missing: Sequence[str]) -> dict[str, object]:
    """The figures of the variants of each kind, and what Spin lacks."""
    figures: dict[str, object] = {"missing": list(missing)}
    for kind in ("safe", "broken", "spin", "spin_broken"):
        these = [one for one in told if one.kind == kind]
        figures[kind] = {
            "variants": len(these),
            "ok": sum(one.ok for one in these),
            "states": sum(one.states for one in these),
            "edges": sum(one.edges for one in these),
        }
    return figures


def _shortest(traces: list[list[str]]) -> list[str]:
    return min(traces, key=len, default=[])


def _shown(one: Told, *, brief: bool) -> Told:
    verdict = "ok" if one.ok else "WRONG"
    print(
        f"{verdict:5} {one.what:62} {one.states:8} states {one.edges:9} edges {one.seconds:6.1f} s  {one.outcome}"
    )
    if one.trace and not (brief and one.ok):
        print(f"      {len(one.trace)} steps: {' -> '.join(one.trace)}")
    sys.stdout.flush()
    return one


if __name__ == "__main__":
    sys.exit(main())
