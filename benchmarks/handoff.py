"""How much of a guest's pause the hand-off's protocol is: one round trip and two records on disk.

A micro-VM migrates to and fro between two hosts on this computer; the spans of its migrations, on one clock, say
where the pause goes. In turn with every migration the same is measured without records and guest: a bare call to the
same service, over the same kind of connection, and a bare sync of one slot on the file system of the journals.

    python benchmarks/handoff.py [--repeat N] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.integration.hosts import Guest, World, open_world
from tests.integration.services import Host, eventually
from vmferry.errors import TraceNotFoundError
from vmferry.handoff.disk import DISK
from vmferry.handoff.journal import SLOT_BYTES, SLOTS_PER_EXTENT
from vmferry.handoff.records import attempt_to_ref
from vmferry.handoff.states import Attempt
from vmferry.rpc.tracing import ClientTracingInterceptors
from vmferry.security.tls import open_channel
from vmferry.telemetry.spans import SpanRecord, load_spans
from vmferry.v1 import handoff_pb2, handoff_pb2_grpc
from vmferry.v1 import migration_pb2 as pb

GO: Final = "vmferry.v1.DestinationService/Go"
SOURCE, DESTINATION = "vmferry-source", "vmferry-dest"
_NS_PER_MS: Final = 1e6


@dataclass(frozen=True)
class Crossing:
    """One migration, and what was measured beside it; all in milliseconds."""

    downtime: float
    """The guest's pause, until its source has heard that it runs."""
    handed_off: float
    """``HANDED_OFF``: decided, written and synced at the source."""
    go: float
    """Go on its way: from the call to the destination's service at work on it, there."""
    owned: float
    """``OWNED``: decided, written and synced at the destination."""
    resume: float
    """The permit, and the hypervisor goes on; a pause has that without any protocol, too."""
    answer: float
    """From the guest's first instruction until the source has heard of it; the guest runs already."""
    bare_call: float
    """A call and its answer that record nothing."""
    bare_sync: float
    """One slot written and synced."""

    @property
    def added(self) -> float:
        """What the protocol adds to the time in which no copy runs."""
        return self.handed_off + self.go + self.owned

    @property
    def share(self) -> float:
        """Percentage of the whole pause that this is."""
        return 100 * self.added / self.downtime


ROWS: Final = {
    "handed_off": "HANDED_OFF on disk at the source",
    "go": "Go on its way",
    "owned": "OWNED on disk at the destination",
    "added": "= added by the protocol, no copy runs",
    "resume": "resume (needed without a protocol, too)",
    "answer": "answer to Go (the guest runs already)",
    "downtime": "whole pause, by the source's clock",
    "share": "  of which the protocol added, per cent",
    "bare_call": "beside it: bare round trip, no records",
    "bare_sync": "beside it: bare sync of one slot",
}


def parts(spans: Sequence[SpanRecord]) -> dict[str, float]:
    """Where the time between *ready* and the confirmation went."""
    commit, asked, own = (
        _only(spans, *one) for one in ((SOURCE, "commit"), (SOURCE, GO), (DESTINATION, "own"))
    )
    resume = next(one for one in spans if one.parent_id == own.span_id and one.name == "resume")
    times = {
        "handed_off": asked.start_ns - commit.start_ns,
        "go": own.start_ns - asked.start_ns,
        "owned": resume.start_ns - own.start_ns,
        "resume": resume.end_ns - resume.start_ns,
        "answer": asked.end_ns - resume.end_ns,
    }
    return {name: round(value / _NS_PER_MS, 3) for name, value in times.items()}


def _only(spans: Sequence[SpanRecord], service: str, name: str) -> SpanRecord:
    (found,) = [one for one in spans if (one.service, one.name) == (service, name)]
    return found


async def crossing(world: World, guest: Guest, here: Host, there: Host, scratch: SlotFile) -> Crossing:
    """Migrate the machine once, and measure beside it what does without records."""
    migration = await world.migrate(guest, here, there)
    assert migration.outcome == pb.MIGRATION_OUTCOME_COMPLETED, migration

    def written() -> list[SpanRecord]:
        try:
            spans = load_spans([world.trace_dir], migration.trace_id)
        except TraceNotFoundError:
            return []  # they are written a moment after they end
        names = {(one.service, one.name) for one in spans}
        return spans if {(SOURCE, "migrate"), (SOURCE, GO), (DESTINATION, GO)} <= names else []

    return Crossing(
        downtime=round(migration.downtime.ToNanoseconds() / _NS_PER_MS, 3),
        **parts(await eventually(written, "all spans are written")),
        bare_call=await bare_call(world, here, there),
        bare_sync=await asyncio.to_thread(scratch.write),
    )


async def bare_call(world: World, here: Host, there: Host) -> float:
    """One question about an attempt that nobody knows, over a connection that has been used."""
    unknown = Attempt(
        machine_id=str(uuid.uuid4()),
        migration_id=uuid.uuid4().bytes,
        number=1,
        epoch_from=1,
        source=here.identity.uri,
        destination=there.identity.uri,
        source_incarnation=here.ledger.incarnation,
    )
    request = handoff_pb2.GetAttemptRequest(attempt=attempt_to_ref(unknown))
    interceptors = ClientTracingInterceptors()
    async with open_channel(
        there.dest.address, there.identity, world.material(here.name), interceptors=interceptors
    ) as channel:
        stub = handoff_pb2_grpc.DestinationServiceStub(channel)
        await stub.GetAttempt(request)
        begun = time.perf_counter()
        await stub.GetAttempt(request)
        return round((time.perf_counter() - begun) * 1e3, 3)


class SlotFile:
    """A file of zeros like a journal's."""

    def __init__(self, path: Path) -> None:
        self._file = DISK.create(path)
        self._file.write(bytes(SLOT_BYTES * SLOTS_PER_EXTENT), 0)
        self._file.sync()
        self._slot = 0

    def write(self) -> float:
        """Write and sync the next slot; how long that takes."""
        self._slot = (self._slot + 1) % SLOTS_PER_EXTENT
        begun = time.perf_counter()
        self._file.write(os.urandom(SLOT_BYTES), self._slot * SLOT_BYTES)
        self._file.sync_data()
        return round((time.perf_counter() - begun) * 1e3, 3)

    def close(self) -> None:
        """Give the file back."""
        self._file.close()


async def measure(repeat: int) -> list[Crossing]:
    """Migrations to and fro; the first one each way only warms up."""
    async with open_world() as world:
        guest = await world.run()
        here, there = world.a, world.b
        found = []
        with contextlib.closing(SlotFile(world.a.config.state_dir / "slots")) as scratch:
            for _ in range(repeat + 2):
                found.append(await crossing(world, guest, here, there, scratch))
                here, there = there, here
        return found[2:]


def figures(found: Sequence[Crossing], name: str) -> dict[str, float]:
    """The median of one row, with its spread."""
    values = [getattr(one, name) for one in found]
    low, _, high = statistics.quantiles(values, n=4)
    numbers = {
        "median": statistics.median(values),
        "quarter": low,
        "three_quarters": high,
        "min": min(values),
        "max": max(values),
    }
    return {key: round(value, 3) for key, value in numbers.items()}


def table(found: Sequence[Crossing]) -> str:
    """One line for each part of the pause."""
    lines = [
        f"{'ms, of ' + str(len(found)) + ' migrations':<42} {'median':>8} {'middle half':>17} {'range':>17}"
    ]
    for name, shown in ROWS.items():
        one = figures(found, name)
        half = f"{one['quarter']:.2f}-{one['three_quarters']:.2f}"
        lines.append(f"{shown:<42} {one['median']:>8.2f} {half:>17} {one['min']:>8.2f}-{one['max']:.2f}")
    return "\n".join(lines)


def main() -> None:
    """Run all, and print a table or a document."""
    parser = argparse.ArgumentParser(description="How much of a pause the protocol of the hand-off is.")
    parser.add_argument("--repeat", type=int, default=24, help="migrations that are measured")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    arguments = parser.parse_args()
    load_before = os.getloadavg()[0]
    found = asyncio.run(measure(arguments.repeat))
    if arguments.json:
        document = {
            "cpus": os.cpu_count(),
            "load_before": load_before,
            "unit": "ms",
            "figures": {name: figures(found, name) for name in ROWS},
            "crossings": [asdict(one) for one in found],
        }
        print(json.dumps(document, indent=2))
    else:
        print(f"{os.cpu_count()} processors, load {load_before:.2f} before")
        print(table(found))


if __name__ == "__main__":
    main()
