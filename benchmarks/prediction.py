"""How well predictions hold: plans machines of several sizes and loads, migrates them, and compares.

Every row is the median of several crossings to and fro between two hosts on this computer, with its spread. Both
hosts share the processors with the guest here, so rates are lower, and vary more, than between two computers.

    python benchmarks/prediction.py [--repeat N] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.integration.hosts import Guest, World, open_world
from tests.integration.services import Host
from vmferry.v1 import migration_pb2 as pb


@dataclass(frozen=True)
class Load:
    """A machine and what its guest does."""

    memory_mib: int
    dirty_mib_per_s: int
    working_set_mib: int

    @property
    def name(self) -> str:
        """What it is called in the table."""
        return f"{self.memory_mib} MiB, {self.dirty_mib_per_s} MiB/s in {self.working_set_mib} MiB"


@dataclass(frozen=True)
class Crossing:
    """One migration beside its prediction; times in milliseconds."""

    load: str
    how: str
    outcome: str
    reason: str
    converges: bool
    predicted_total_ms: float
    low_total_ms: float
    high_total_ms: float
    total_ms: float
    predicted_downtime_ms: float
    low_downtime_ms: float
    high_downtime_ms: float
    downtime_ms: float


LOADS = (
    Load(64, 1, 8),
    Load(256, 0, 128),
    Load(256, 32, 16),
    Load(256, 96, 64),
    Load(1024, 0, 512),
    Load(1024, 32, 256),
    Load(2048, 1, 16),
)


async def crossing(world: World, guest: Guest, here: Host, there: Host, *, planned: bool) -> pb.Migration:
    """Migrate a machine, with a plan before or without one; its prediction is in what is returned."""
    if planned:
        async with world.source(here) as stub:
            await stub.PlanMigration(
                pb.PlanMigrationRequest(
                    machine=guest.id,
                    destination=pb.Destination(host=there.identity.uri, address=there.dest.address),
                )
            )
    return await world.migrate(guest, here, there)


def compared(load: Load, how: str, migration: pb.Migration) -> Crossing:
    """The figures of one migration."""
    predicted = migration.prediction
    total, downtime = predicted.total, predicted.downtime
    times = (
        total.expected,
        total.low,
        total.high,
        migration.total,
        downtime.expected,
        downtime.low,
        downtime.high,
        migration.downtime,
    )
    return Crossing(
        load.name,
        how,
        pb.MigrationOutcome.Name(migration.outcome).removeprefix("MIGRATION_OUTCOME_").lower(),
        migration.reason.message,
        predicted.converges,
        *(round(time.ToNanoseconds() / 1e6, 1) for time in times),
    )


async def measure(repeat: int) -> list[Crossing]:
    """All loads, each several times to and fro, with plans and without."""
    found = []
    for load in LOADS:
        async with open_world() as world:
            params = {
                "dirty-mib-per-s": str(load.dirty_mib_per_s),
                "working-set-mib": str(load.working_set_mib),
            }
            guest = await world.run(memory_mib=load.memory_mib, program="writer", params=params)
            here, there = world.a, world.b
            for how in ("plan", "meanwhile"):
                for _ in range(repeat):
                    migration = await crossing(world, guest, here, there, planned=how == "plan")
                    if migration.HasField("prediction"):
                        found.append(compared(load, how, migration))
                    else:
                        print(f"no prediction: {load.name}, {how}", file=sys.stderr)
                    if migration.outcome == pb.MIGRATION_OUTCOME_COMPLETED:
                        here, there = there, here
    return found


def table(found: Sequence[Crossing]) -> str:
    """One row for each load and way of measuring, of the crossings that completed, and a line for each other one."""
    others = [one for one in found if one.outcome != "completed"]
    found = [one for one in found if one.outcome == "completed"]
    heading = (
        f"{'guest':<34} {'measured':<10} {'n':>2}  {'total ms: predicted':>20} {'actual':>7} "
        f"{'ratio (spread)':>18} {'in':>5}  {'downtime: pred.':>15} {'actual':>7} {'ratio (spread)':>18} {'in':>5}"
    )
    lines = [heading]
    for name, how in dict.fromkeys((one.load, one.how) for one in found):
        rows = [one for one in found if (one.load, one.how) == (name, how)]
        lines.append(f"{name:<34} {how:<10} {len(rows):>2}  " + _columns(rows))
    lines.append(f"{'all':<45} {len(found):>2}  " + _columns(found))
    for one in others:
        foreseen = "" if one.converges else ", as predicted"
        lines.append(f"{one.load}, {one.how}: {one.outcome}{foreseen}: {one.reason}")
    return "\n".join(lines)


def _columns(rows: Sequence[Crossing]) -> str:
    totals = [row.total_ms / row.predicted_total_ms for row in rows]
    pauses = [row.downtime_ms / row.predicted_downtime_ms for row in rows]
    total_in = sum(row.low_total_ms <= row.total_ms <= row.high_total_ms for row in rows)
    pause_in = sum(row.low_downtime_ms <= row.downtime_ms <= row.high_downtime_ms for row in rows)
    middle = statistics.median
    return (
        f"{middle(row.predicted_total_ms for row in rows):>20.0f} {middle(row.total_ms for row in rows):>7.0f} "
        f"{_ratio(totals):>18} {total_in:>2}/{len(rows):<2}  "
        f"{middle(row.predicted_downtime_ms for row in rows):>15.0f} {middle(row.downtime_ms for row in rows):>7.0f} "
        f"{_ratio(pauses):>18} {pause_in:>2}/{len(rows):<2}"
    )


def _ratio(ratios: Sequence[float]) -> str:
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"


def main() -> None:
    """Run all, and print a table or a document."""
    parser = argparse.ArgumentParser(description="Compare predictions with what then happens.")
    parser.add_argument("--repeat", type=int, default=4, help="crossings of each kind")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    arguments = parser.parse_args()
    load_before = os.getloadavg()[0]
    found = asyncio.run(measure(arguments.repeat))
    if arguments.json:
        document = {
            "cpus": os.cpu_count(),
            "load_before": load_before,
            "crossings": [asdict(one) for one in found],
        }
        print(json.dumps(document, indent=2))
    else:
        print(f"{os.cpu_count()} processors, load {load_before:.2f} before")
        print("ratio: actual/predicted; in: how many within the predicted bounds")
        print(table(found))


if __name__ == "__main__":
    main()
