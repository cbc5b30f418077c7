"""Runs the evidence for the hand-off and prints its figures in one table: ``make proof``.

Promise: every figure is what a part told of this run, as a document, and is scraped from nothing. A part that fails
does not keep the others from running; the exit code is 1 then. What cannot run here is said to be left out, and fails
with ``VMFERRY_REQUIRE=all``. Parts run side by side, one for each processor, and beside them one of those that wait
most of the time; the benchmark runs by itself.

    python scripts/proof.py                 all there is, in less than 15 minutes on two quiet processors
    python scripts/proof.py --quick         a sample of it, in less than 8
    python scripts/proof.py --json FILE     the figures as a document, too
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final
from xml.etree import ElementTree as ET

ROOT: Final = Path(__file__).resolve().parents[1]
_LIMIT_S: Final = 3600.0
_SHOWN_LINES: Final = 40

Figures = dict[str, str]
"""What a part found, by name, as it is shown."""


@dataclass(frozen=True)
class Sizes:
    """How much of it runs; even the whole takes a sample of the pairs of faults, and storms have no end."""

    model: tuple[str, ...]
    every_nth_fault: int
    every_nth_first_of_two: int
    storms: int
    mutants: int
    """0: all of them."""
    real: tuple[str, ...]
    """Which scenarios, as options of pytest."""
    held_everywhere: bool
    """Whether services are held at every named place, as they are killed at every one."""


FULL: Final = Sizes((), 1, 8, 500, 0, (), held_everywhere=True)
QUICK: Final = Sizes(("--quick",), 5, 64, 100, 30, ("-k", "handed-off or owned"), held_everywhere=False)


@dataclass
class Tested:
    """What became of tests: read from the report that pytest writes."""

    passed: Counter[str] = field(default_factory=Counter)
    """By the name of the function."""
    noted: Counter[str] = field(default_factory=Counter)
    """What tests counted themselves, by what it is."""
    left_out: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, text: str) -> Tested:
        """Read a report."""
        tested = cls()
        for case in ET.fromstring(text).iter("testcase"):  # noqa: S314 - written by our own child a moment ago
            name = case.get("name", "").partition("[")[0]
            skipped = case.find("skipped")
            if skipped is not None:
                tested.left_out.append(f"{case.get('name')}: {skipped.get('message')}")
            elif case.find("failure") is None and case.find("error") is None:
                tested.passed[name] += 1
            for noted in case.iter("property"):
                tested.noted[noted.get("name", "")] += int(noted.get("value", "0"))
        return tested


@dataclass(frozen=True)
class Part:
    """One program of the evidence."""

    name: str
    arguments: tuple[str, ...]
    """Of Python. A program prints one document; tests write their report to ``{report}``."""
    figures: Callable[[Any], Figures]
    """What the document, or the :class:`Tested`, says."""
    left_out: Callable[[Any], list[str]] = lambda _: []
    alone: bool = False
    """Not beside others: it measures time."""
    waits: bool = False
    """Its own programs wait most of the time: it runs beside those that keep a processor busy."""
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_tests(self) -> bool:
        """Whether pytest runs it."""
        return any("{report}" in argument for argument in self.arguments)


@dataclass
class Result:
    """What came of a part."""

    part: str
    ok: bool
    seconds: float
    figures: Figures = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    log: str = ""
    """The end of what it said, if it failed."""


def tests(name: str, *targets: str, figures: Callable[[Tested], Figures], **how: Any) -> Part:
    """A part that pytest runs."""
    options = ("-q", "-p", "no:cacheprovider", "-o", "junit_family=xunit1", "--junitxml={report}")
    return Part(name, ("-m", "pytest", *options, *targets), figures, lambda tested: tested.left_out, **how)


def _of(document: Mapping[str, Any]) -> str:
    return f"{document['ok']} of {document['variants']}"


def _model(document: Mapping[str, Any]) -> Figures:
    found = {
        "safe variants that hold": _of(document["safe"]),
        "states explored": f"{document['safe']['states']:,}",
        "edges explored": f"{document['safe']['edges']:,}",
        "broken variants caught": _of(document["broken"]),
    }
    if not document["missing"]:
        found |= {
            "Spin: safe variants that hold": _of(document["spin"]),
            "Spin: states": f"{document['spin']['states']:,}",
            "Spin: transitions": f"{document['spin']['edges']:,}",
            "Spin: broken variants caught": _of(document["spin_broken"]),
        }
    return found


def _without_spin(document: Mapping[str, Any]) -> list[str]:
    return [f"Spin: missing here: {', '.join(document['missing'])}"] if document["missing"] else []


_TOLD_APART: Final = (
    "a_model_without_a_guard_is_not_the_code",
    "a_code_without_a_guard_is_not_the_model",
    "a_wrong_right_is_seen_on_its_edge",
    "a_specification_without_a_guard_is_not_the_code",
    "a_core_that_switches_late_is_seen",
)


def _conformance(tested: Tested) -> Figures:
    return {
        "edges driven through the code": f"{tested.noted['edges'] + tested.noted['edges of updates']:,}",
        "states asked about every event": f"{tested.noted['states']:,}",
        "changed models and codes told apart": str(
            sum(tested.passed[f"test_{name}"] for name in _TOLD_APART)
        ),
    }


def _two_hosts(tested: Tested) -> Figures:
    return {
        "worlds explored": f"{tested.noted['worlds']:,}",
        "broken variants caught": str(tested.passed["test_a_broken_variant_is_caught"]),
        "random walks": str(tested.passed["test_random_walks_beyond_the_bounds"]),
    }


def _schedules(document: Mapping[str, Any]) -> Figures:
    runs = sum(tally["runs"] for tally in document.values())
    return {
        "schedules": f"{runs:,}",
        "promises broken": str(sum(len(tally["failures"]) for tally in document.values())),
        "schedules per second, on one processor": (
            f"{runs / sum(tally['seconds'] for tally in document.values()):.0f}"
        ),
    }


def _torture(tested: Tested) -> Figures:
    cases = {name: f"{count:,}" for name, count in sorted(tested.noted.items())}
    return cases | {"cases": f"{tested.noted.total():,}", "tests": f"{tested.passed.total():,}"}


def _mutants(document: Mapping[str, Any]) -> Figures:
    killers: Mapping[str, str] = document["killers"]
    survivors = [name for name, killer in killers.items() if not killer]
    suites = Counter(document["suites"][name] for name, killer in killers.items() if killer)
    return {
        "mutants killed": f"{len(killers) - len(survivors)} of {len(killers)}",
        "by the suites": ", ".join(f"{suite} {count}" for suite, count in suites.most_common()),
        "mutants made": f"{document['made']} ({document['equivalent']} that nobody can tell)",
        **{f"survivor {number}": name for number, name in enumerate(survivors, 1)},
    }


def _scenarios(tested: Tested) -> Figures:
    return {"scenarios": f"{tested.passed.total():,}"}


def _downtime(document: Mapping[str, Any]) -> Figures:
    def shown(name: str) -> str:
        one = document["figures"][name]
        return f"{one['median']:.2f} ms ({one['quarter']:.2f}-{one['three_quarters']:.2f})"

    return {
        f"added to the pause, of {len(document['crossings'])}": shown("added"),
        "the pause": shown("downtime"),
        "bare round trip": shown("bare_call"),
        "bare sync": shown("bare_sync"),
    }


def parts(sizes: Sizes) -> list[Part]:
    """The evidence; what takes longest comes first, so that the processors come to their ends together."""
    campaign = ("-m", "tests.simulation.campaign")
    one_core = ("--jobs", "1", "--json")
    held = {"VMFERRY_SOAK": "1"} if sizes.held_everywhere else {}
    return [
        tests(
            "real processes",
            "tests/integration/test_failpoints.py",
            *sizes.real,
            figures=_scenarios,
            waits=True,
            environment=held,
        ),
        tests(
            "cut links", "tests/integration/test_cut_links.py", *sizes.real, figures=_scenarios, waits=True
        ),
        Part("mutants", ("scripts/mutants.py", "--sample", str(sizes.mutants), *one_core), _mutants),
        Part(
            "one fault",
            (*campaign, "one-fault", "--stride", str(sizes.every_nth_fault), *one_core),
            _schedules,
        ),
        Part("specification", ("-m", "models", *sizes.model, *one_core), _model, _without_spin),
        Part(
            "two faults",
            (*campaign, "two-faults", "--stride", str(sizes.every_nth_first_of_two), *one_core),
            _schedules,
        ),
        Part("storms", (*campaign, "storms", "--count", str(sizes.storms), *one_core), _schedules),
        tests("two halves", "tests/simulation/test_two_hosts.py", figures=_two_hosts),
        tests("journal torture", "tests/unit/handoff", figures=_torture),
        tests(
            "conformance",
            "tests/simulation/test_conformance.py",
            "tests/simulation/test_update_conformance.py",
            figures=_conformance,
        ),
        Part("added downtime", ("benchmarks/handoff.py", "--json"), _downtime, alone=True),
    ]


async def run(part: Part, folder: Path) -> Result:
    """Run one part to its end."""
    begun = time.monotonic()
    report, log = (folder / f"{part.name}.{kind}" for kind in ("report", "log"))
    arguments = [argument.replace("{report}", str(report)) for argument in part.arguments]
    with log.open("wb") as said, report.open("wb") as printed:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *arguments,
            cwd=ROOT,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=said if part.is_tests else printed,
            stderr=said,
            start_new_session=True,
            env={**os.environ, **part.environment},
        )
        try:
            code = await asyncio.wait_for(process.wait(), _LIMIT_S)
        except TimeoutError:
            code = -signal.SIGKILL
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what it started must not outlive it
            await process.wait()
    result = Result(part.name, code == 0, round(time.monotonic() - begun, 1))
    try:
        text = report.read_text(encoding="utf-8")
        told = Tested.read(text) if part.is_tests else json.loads(text)
        result.figures, result.left_out = part.figures(told), part.left_out(told)
    except (ValueError, KeyError, ET.ParseError) as error:
        result.ok, result.figures = False, {"no figures": f"{type(error).__name__} in its report"}
    if not result.ok:
        result.log = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-_SHOWN_LINES:])
    print(f"{part.name}: {_verdict(result)}, {result.seconds:.0f} s", file=sys.stderr, flush=True)
    return result


async def run_all(chosen: Sequence[Part], jobs: int) -> list[Result]:
    """Run parts side by side, and by themselves those that have to be."""
    processors, beside = asyncio.Semaphore(jobs), asyncio.Semaphore(1)

    async def in_turn(part: Part, folder: Path) -> Result:
        async with beside if part.waits else processors:
            return await run(part, folder)

    with tempfile.TemporaryDirectory(prefix="vmferry-proof-") as name:
        folder = Path(name)
        async with asyncio.TaskGroup() as group:
            begun = [group.create_task(in_turn(part, folder)) for part in chosen if not part.alone]
        results = [task.result() for task in begun]
        return results + [await run(part, folder) for part in chosen if part.alone]


def _verdict(result: Result) -> str:
    return "FAILED" if not result.ok else "LEFT OUT in part" if result.left_out else "ok"


def table(results: Sequence[Result], seconds: float) -> str:
    """All figures, the parts one below the other."""
    width = max(len(name) for result in results for name in result.figures)
    lines = []
    for result in results:
        rows = list(result.figures.items())
        rows += [("left out", why) for why in sorted(set(result.left_out))]
        for number, (name, value) in enumerate(rows):
            part = "" if number else f"{result.part:<16} {_verdict(result):>16} {result.seconds:>6.0f} s"
            lines.append(f"{part:<42} {name:<{width}}  {value}")
    wrong = [result.part for result in results if not result.ok]
    verdict = f"FAILED: {', '.join(wrong)}" if wrong else f"all {len(results)} parts hold"
    return "\n".join([*lines, f"{verdict}; {seconds / 60:.1f} minutes"])


def main() -> int:
    """Run the evidence and print the table; the exit code is 1 if any part failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a sample")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    given = parser.parse_args()
    jobs, load = os.cpu_count() or 1, os.getloadavg()[0]
    begun = time.monotonic()
    results = asyncio.run(run_all(parts(QUICK if given.quick else FULL), jobs))
    seconds = time.monotonic() - begun
    for result in results:
        if not result.ok:
            print(f"\n--- {result.part} failed; the end of what it said:\n{result.log}\n")
    print(f"{jobs} processors, load {load:.1f} before{', a sample' if given.quick else ''}")
    print(table(results, seconds))
    if given.json:
        document = {
            "quick": given.quick,
            "cpus": jobs,
            "load_before": load,
            "seconds": round(seconds, 1),
            "parts": [asdict(result) for result in results],
        }
        given.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return int(not all(result.ok for result in results))


if __name__ == "__main__":
    sys.exit(main())
