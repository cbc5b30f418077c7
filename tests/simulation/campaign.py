"""Many schedules of the simulation, on several cores: ``python -m tests.simulation.campaign two-faults``.

Prints how many there were and how fast, and for each that breaks a promise the command that does it again.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Final

from tests.simulation.cluster import schedules
from tests.simulation.cluster.schedules import SCENARIOS, Schedule, quiet

_BATCH: Final = 25


@dataclass
class Tally:
    """What came of many schedules."""

    runs: int = 0
    lost: int = 0
    operator: int = 0
    steps: int = 0
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        """Both together."""
        self.runs += other.runs
        self.lost += other.lost
        self.operator += other.operator
        self.steps += other.steps
        self.failures += other.failures

    def __str__(self) -> str:
        return (
            f"{self.runs} schedules in {self.seconds:.0f} s ({self.runs / max(self.seconds, 1e-9):.0f} per second), "
            f"{self.steps} steps; machines lost with their only host {self.lost}, "
            f"left to a person {self.operator}, promises broken {len(self.failures)}"
        )


def do(batch: Iterable[Schedule]) -> Tally:
    """Do schedules one after the other."""
    tally = Tally()
    with quiet():
        for schedule in batch:
            outcome = schedules.run(schedule)
            tally.runs += 1
            tally.lost += outcome.lost
            tally.operator += outcome.operator
            tally.steps += outcome.steps
            if outcome.failure:
                tally.failures.append(f"python -m tests.simulation.replay '{schedule}'  # {outcome.failure}")
    return tally


def _after(first: Schedule, stride: int) -> Tally:
    with quiet():
        return do(schedules.second_faults(first)[::stride])


def _each(work: Callable[..., Tally], parts: list[object], jobs: int) -> Tally:
    """Do all parts, spread over processes."""
    started, tally = time.perf_counter(), Tally()
    if jobs == 1:
        for part in parts:
            tally.add(work(part))
    else:
        with multiprocessing.get_context("fork").Pool(jobs) as pool:
            for done in pool.imap_unordered(work, parts):
                tally.add(done)
    tally.seconds = time.perf_counter() - started
    return tally


def _batches(found: Iterable[Schedule]) -> list[object]:
    pending = iter(found)
    return list(iter(lambda: list(itertools.islice(pending, _BATCH)), []))


def one_fault(scenario: str, *, stride: int = 1, jobs: int = 1) -> Tally:
    """Every fault at every boundary, or each ``stride``-th of them."""
    with quiet():
        found = schedules.one_fault(scenario)
    return _each(do, _batches(found[::stride]), jobs)


def two_faults(scenario: str, *, stride: int = 1, second_stride: int = 1, jobs: int = 1) -> Tally:
    """Every main fault after every first one that leads elsewhere, or each so many-th of both."""
    with quiet():
        found = schedules.first_faults(scenario, stride)
    return _each(functools.partial(_after, stride=second_stride), list(found), jobs)


def storms(seed: int, count: int, *, jobs: int = 1) -> Tally:
    """Storms of consecutive seeds."""
    return _each(do, _batches(Schedule(seed=number) for number in range(seed, seed + count)), jobs)


def main() -> int:
    """Run what the command line asks for; the exit code is 1 if a promise broke."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("one-fault", "two-faults", "storms"))
    parser.add_argument("--scenario", choices=SCENARIOS, action="append", help="all of them by default")
    parser.add_argument("--stride", type=int, default=1, help="only each so many-th")
    parser.add_argument(
        "--seed", type=int, default=int(os.environ.get("VMFERRY_SEED", random.randrange(2**31)))
    )
    parser.add_argument("--count", type=int, default=1000, help="storms")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", action="store_true", help="print one JSON document; the rest on stderr")
    given = parser.parse_args()
    if given.what == "storms":
        tallies = {f"from seed {given.seed}": storms(given.seed, given.count, jobs=given.jobs)}
    else:
        run = one_fault if given.what == "one-fault" else two_faults
        chosen = given.scenario or (SCENARIOS if run is one_fault else SCENARIOS[:1])
        tallies = {name: run(name, stride=given.stride, jobs=given.jobs) for name in chosen}
    out = sys.stderr if given.json else sys.stdout
    for name, tally in tallies.items():
        print(f"{given.what} {name}: {tally}", file=out)
        for failure in tally.failures[:20]:
            print("  ", failure, file=out)
    if given.json:
        print(json.dumps({name: asdict(tally) for name, tally in tallies.items()}))
    return int(any(tally.failures for tally in tallies.values()))


if __name__ == "__main__":
    sys.exit(main())
