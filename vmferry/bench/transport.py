"""The bare transport as a yardstick, and what a migration makes of it: both in turn, several times.

The pump is the two ends of :mod:`vmferry.bench.pump`: the same bytes over the same lanes in messages of the same
size, with no guest. The migration is of a micro-VM that sleeps and holds as much, with all that a migration does. The
ratio of the medians says what a migration makes of its transport.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import statistics
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from vmferry.bench import memory, network
from vmferry.bench.contents import contents
from vmferry.bench.figures import Spread
from vmferry.bench.guest import Wishes
from vmferry.bench.moving import set_aside
from vmferry.bench.network import Network
from vmferry.bench.ours import Ours
from vmferry.bench.usage import Usage, used_s
from vmferry.cli.demo_hosts import Shore, TwoHosts, require_memory, two_hosts
from vmferry.cli.output import milliseconds
from vmferry.errors import MachineFailedError
from vmferry.machines.spec import new_spec
from vmferry.transfer.window import frame_for
from vmferry.v1 import migration_pb2 as pb

DEFAULT_RUNS: Final = 5
GUEST_MIB: Final = 16
"""What the guest keeps for itself at the beginning of its memory."""
_PIECE_BYTES: Final = 64 * 1024 * 1024
_MIB: Final = 1024 * 1024
_READY_S: Final = 60.0
_SLEEPS: Final = {"dirty-mib-per-s": "0", "working-set-mib": "1"}


@dataclass(frozen=True)
class Pumping:
    """What is measured."""

    mib: int = 1024
    """What is pumped, and what the guest holds."""
    runs: int = DEFAULT_RUNS
    lanes: int = 0
    """0: as configured."""
    contents: str = "random"
    compression: str = "none"
    """Of the migration; the pump sends pages as they are."""
    link_mbit: int | None = None
    huge_pages: bool | None = None
    """Whether the guest has its memory in huge pages; ``None``: if that may be."""
    migrate: bool = True
    """Whether a guest is migrated in turn with the pump."""


@dataclass(frozen=True)
class Rate:
    """One transfer."""

    mb_per_s: float
    cpu_s_per_gib: float
    """Processor time of both ends for each GiB."""


@dataclass
class Found:
    """All transfers, in the order in which they were."""

    lanes: int
    huge_pages: bool
    """Whether the guest had memory that was mounted for that."""
    pump: list[Rate] = field(default_factory=list)
    migration: list[Rate] = field(default_factory=list)
    peak_mib: float = 0.0
    """The most memory of its own that a service had."""


async def measure(pumping: Pumping) -> Found:
    """Measure both, in turn.

    Raises:
        InsufficientMemoryError: this computer cannot hold the guest twice.
        MachineFailedError: a migration did not complete.
    """
    memory_mib = pumping.mib + GUEST_MIB
    if pumping.migrate:
        require_memory(3 * memory_mib * _MIB, 0)
    settings = {"ready_memory_mib": (memory_mib,)} if pumping.migrate else {}
    with (
        network.opened(pumping.link_mbit) as link,
        memory.opened(huge_pages=pumping.huge_pages) as guests,
    ):
        async with two_hosts(None, places=link.places, settings=settings, memory=guests.folder) as world:
            found = Found(pumping.lanes or world.a.host.config.lanes, guests.huge_pages)
            guest = await _guest(world, pumping, found.lanes) if pumping.migrate else None
            for _ in range(pumping.runs):
                found.pump.append(await pump(world, link, pumping, found.lanes))
                if guest is not None:
                    rate, peak_mib = await _migrate(guest)
                    found.migration.append(rate)
                    found.peak_mib = max(found.peak_mib, peak_mib)
            return found


async def pump(world: TwoHosts, link: Network, pumping: Pumping, lanes: int) -> Rate:
    """Pump once from host a to host b, both ends in processes of their own at the places of the hosts."""
    config = world.a.host.config
    window = str(config.window_bytes // lanes)
    chunk = str(frame_for(lanes, config.window_bytes, config.chunk_bytes))
    place = link.places["b"]
    async with _process(world.b, "sink", "--window", window, "--listen", place.listen) as sink:
        assert sink.stdout is not None
        port = json.loads(await sink.stdout.readline())["port"]
        before = used_s(sink.pid)  # what runs others in a network of its own has become the sink by now
        words = (
            *("--window", window, "--lanes", str(lanes), "--mib", str(pumping.mib)),
            *("--address", f"{place.data_at}:{port}", "--peer", world.b.host.identity.uri),
            *("--contents", pumping.contents, "--chunk", chunk),
        )
        async with _process(world.a, "source", *words) as source:
            told = (await source.communicate())[0]
        if not told:
            raise MachineFailedError(f"the pump ended by itself, with code {source.returncode}")
        said = json.loads(told)
        used = said["cpu_s"] + used_s(sink.pid) - before
    return Rate(said["bytes"] / said["seconds"] / 1e6, used / said["bytes"] * 1024**3)


@contextlib.asynccontextmanager
async def _process(shore: Shore, *words: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """One end of the pump, with the certificate of a host; ended afterwards, whatever happens."""
    host = shore.host
    process = await asyncio.create_subprocess_exec(
        *host.place.within,
        *(sys.executable, "-m", "vmferry.bench.pump", *words, "--tls", str(host.config.tls_dir)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        yield process
    finally:
        if process.stdin is not None:
            process.stdin.close()
        try:
            async with asyncio.timeout(_READY_S):
                await process.wait()
        except BaseException:
            process.kill()
            await process.wait()
            raise


async def _guest(world: TwoHosts, pumping: Pumping, lanes: int) -> Ours:
    """A guest that sleeps, in whose memory so much lies."""
    options = pb.MigrationOptions(lanes=lanes, compression=pumping.compression)
    spec = new_spec("bench", pumping.mib + GUEST_MIB, "writer", _SLEEPS)
    guest = Ours(Wishes(), spec, world, options)
    await guest.boot()
    content = await asyncio.to_thread(contents, pumping.contents, min(_PIECE_BYTES, pumping.mib * _MIB))
    with guest.ram.open("r+b") as ram:
        ram.seek(GUEST_MIB * _MIB)
        left = pumping.mib * _MIB
        while left:
            left -= ram.write(content[: min(left, len(content))])
    await asyncio.to_thread(set_aside, guest.ram, spec.memory_bytes)
    return guest


async def _migrate(guest: Ours) -> tuple[Rate, float]:
    """Migrate once; the rate while the guest ran, and the most memory of a service."""
    await guest.get_ready()
    usage = Usage(guest.services, guest.services)
    try:
        moved = await guest.move("", _READY_S)
    finally:
        usage.stop()
    if not moved.completed or guest.last is None:
        raise MachineFailedError(f"the migration did not complete: {moved.outcome}")
    took = {timing.phase: milliseconds(timing.elapsed) for timing in guest.last.timings}
    sent = guest.last.progress.sent_bytes
    rate = sent / took[pb.MIGRATION_PHASE_PRECOPYING] / 1e3
    return Rate(rate, usage.cpu_s() / sent * 1024**3), usage.peak_mib or 0.0


def document(pumping: Pumping, found: Found) -> dict[str, Any]:
    """What is printed with ``--json``."""
    told: dict[str, Any] = asdict(pumping) | {"lanes": found.lanes, "huge_pages": found.huge_pages}
    told["mb_per_s"] = _median(found.pump)
    told["pump"] = _told(found.pump)
    if found.migration:
        told["migration_mb_per_s"] = _median(found.migration)
        told["migration"] = _told(found.migration)
        told["ratio"] = ratio(found)
        told["services_peak_mib"] = found.peak_mib
    return told


def ratio(found: Found) -> float:
    """What a migration makes of its transport: the medians' ratio."""
    return round(_median(found.migration) / _median(found.pump), 3)


def _median(rates: list[Rate]) -> float:
    return round(statistics.median(rate.mb_per_s for rate in rates), 1)


def _told(rates: list[Rate]) -> dict[str, Any]:
    return {name: asdict(spread) for name, spread in spreads(rates).items()}


def spreads(rates: list[Rate]) -> dict[str, Spread]:
    """Rates and processor time, each with its spread."""
    found = {
        "mb_per_s": Spread.of(round(rate.mb_per_s, 1) for rate in rates),
        "cpu_s_per_gib": Spread.of(round(rate.cpu_s_per_gib, 3) for rate in rates),
    }
    return {name: spread for name, spread in found.items() if spread is not None}
