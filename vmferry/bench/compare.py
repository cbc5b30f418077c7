"""One row of the comparison: a guest and a link, ours and peers in turn, several times.

Promise: everybody moves the same guest over the same link, one after the other within each run, while the other's
guest stands still; a migration that damages its guest, or does not end, is noted as that, and its guest is made anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import platform
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from qemu.qmp import QMPError

from vmferry import __version__
from vmferry.bench import memory, network
from vmferry.bench.figures import OURS, Crossing
from vmferry.bench.guest import Wishes, make_spec
from vmferry.bench.moving import Moved, Mover
from vmferry.bench.network import Network
from vmferry.bench.observer import Observer
from vmferry.bench.ours import Ours
from vmferry.bench.peer import VARIANTS, Peer
from vmferry.bench.ticks import Line, Signs
from vmferry.bench.usage import Usage
from vmferry.cli.demo_hosts import require_memory, shared_memory_bytes, two_hosts
from vmferry.errors import InvalidArgumentError, VmferryError
from vmferry.machines.qemu.probe import probe_binary
from vmferry.machines.qemu.spec import QemuSpec
from vmferry.machines.spec import MachineSpec
from vmferry.v1.migration_pb2 import MigrationOptions

DEFAULT_RUNS: Final = 5
DEFAULT_DOWNTIME_LIMIT_MS: Final = 300
PATIENCE: Final = 4
"""A migration may take so many times as long as the link needs for what the guest holds."""
MIN_LIMIT_S: Final = 60.0

_BEFORE_S: Final = 1.0
"""How long before it is moved the guest is measured."""
_WARM_UP_S: Final = 0.75
_AFTER_S: Final = 0.5
"""How long the guest is listened to on both sides of what is measured, so that its next line is there."""
_MIB: Final = 1024 * 1024


@dataclass(frozen=True)
class Row:
    """What is compared."""

    wishes: Wishes = field(default_factory=Wishes)
    peers: tuple[str, ...] = ("qemu-tls",)
    link_mbit: int | None = None
    runs: int = DEFAULT_RUNS
    downtime_limit_ms: int = DEFAULT_DOWNTIME_LIMIT_MS
    limit_s: float = 0
    """When a migration is given up; 0: by the link and what the guest holds."""
    accelerator: str = "auto"
    preallocated: bool = True
    """Whether destinations, ours and the peer's, have taken all memory before they are sent any."""
    huge_pages: bool | None = None
    """Whether the guests of all have their memory in huge pages, as far as the kernel finds some; ``None``: if that
    may be."""
    options: MigrationOptions = field(default_factory=MigrationOptions)
    """What else is asked of ours."""

    def check(self) -> None:
        """Refuse what cannot be compared here.

        Raises:
            InvalidArgumentError: by the option at fault.
            InsufficientMemoryError: this computer cannot hold it.
        """
        self.wishes.check()
        if unknown := set(self.peers) - set(VARIANTS):
            raise InvalidArgumentError(
                f"there is no {min(unknown)}, only {', '.join(VARIANTS)}", field="--against"
            )
        require_memory(self._needed_bytes(there_and_back=not self.one_way), 0)

    @property
    def one_way(self) -> bool:
        """Whether our guest begins anew on the first host each time, for want of memory to keep ready at both."""
        return self.preallocated and self._needed_bytes(there_and_back=True) > shared_memory_bytes()

    def _needed_bytes(self, *, there_and_back: bool) -> int:
        # Both movers have a guest of their own, and while one is moved its memory is there twice.
        kept = 2 * len(self.peers[:1]) + 2 if self.preallocated else 3
        # A host fills what it keeps ready again as soon as it was taken.
        kept += 2 if self.preallocated and there_and_back else 0
        return kept * self.wishes.memory_mib * _MIB

    @property
    def patience_s(self) -> float:
        """When a migration is given up."""
        if self.limit_s:
            return self.limit_s
        wishes = self.wishes
        bits = (wishes.resident_mib + wishes.files_mib + wishes.set_mib) * _MIB * 8
        return max(MIN_LIMIT_S, PATIENCE * bits / (self.link_mbit * 1e6) if self.link_mbit else 0)


@dataclass(frozen=True)
class Result:
    """All crossings of a row, in the order in which they were, and where."""

    row: Row
    network: str
    counts_others: bool
    """Whether ``wire_bytes`` holds what other programs sent, too."""
    huge_pages: bool
    """Whether guests had memory that was mounted for that."""
    crossings: list[Crossing]


async def compare(row: Row, tell: Callable[[Crossing], None]) -> Result:
    """Measure a row; each crossing is told as soon as it is known."""
    row.check()
    found: list[Crossing] = []
    with (
        network.opened(row.link_mbit) as link,
        memory.opened(huge_pages=row.huge_pages) as found_memory,
    ):
        async with _movers(row, link, found_memory.folder) as movers:
            for mover in movers.values():
                await _boot(mover)
            for _ in range(row.runs):
                for who in (OURS, *row.peers):
                    crossing = await _crossing(movers.get(who) or movers["peer"], who, link, row.patience_s)
                    found.append(crossing)
                    tell(crossing)
        return Result(row, link.name, not link.own, found_memory.huge_pages, found)


@contextlib.asynccontextmanager
async def _movers(row: Row, link: Network, folder: Path) -> AsyncIterator[dict[str, Mover]]:
    """Ours, and the peer if there is one."""
    one_way = row.one_way  # now: what the hosts will keep ready is not there for anybody any more
    async with contextlib.AsyncExitStack() as stack:
        ready = {"ready_memory_mib": (row.wishes.memory_mib,) if row.preallocated else ()}
        first = {"a": {"ready_memory_mib": ()}} if one_way else {}
        world = await stack.enter_async_context(
            two_hosts(None, places=link.places, settings=ready, own_settings=first, memory=folder)
        )
        spec = await asyncio.to_thread(make_spec, row.wishes, world.images, row.accelerator)
        options = MigrationOptions()
        options.downtime_limit.FromMilliseconds(row.downtime_limit_ms)
        options.MergeFrom(row.options)
        movers: dict[str, Mover] = {OURS: Ours(row.wishes, spec, world, options, one_way=one_way)}
        if row.peers:
            movers["peer"] = await stack.enter_async_context(_peer(row, spec, link, folder))
        yield movers


@contextlib.asynccontextmanager
async def _peer(row: Row, spec: MachineSpec, link: Network, folder: Path) -> AsyncIterator[Peer]:
    with (
        tempfile.TemporaryDirectory(prefix="vmferry-bench-") as run,
        tempfile.TemporaryDirectory(prefix="vmferry-bench-", dir=folder) as ram,
    ):
        folders = (Path(run), Path(ram))
        peer = Peer(
            row.wishes,
            spec,
            link.places,
            folders,
            row.downtime_limit_ms,
            beforehand=row.preallocated,
        )
        try:
            yield peer
        finally:
            await peer.close()


async def _boot(mover: Mover) -> None:
    await mover.boot()
    await mover.wait_ready()
    await mover.pause()


async def _crossing(mover: Mover, who: str, link: Network, limit_s: float) -> Crossing:
    """Move a guest once, and look at all of it."""
    await mover.get_ready()
    await mover.go_on()
    seen = _Seen(link, Observer(*mover.serials))
    try:
        moved = await seen.look(mover, who, limit_s)
    finally:
        await seen.observer.close()
    right: bool | None = None
    if moved.completed:
        try:
            right = await mover.check(seen.before)
        except VmferryError:
            right = False
    if right is False or mover.one_way or not await _alive(mover):
        await _boot(mover)
    else:
        await mover.pause()
    return seen.crossing(mover, who, moved, right=right)


async def _alive(mover: Mover) -> bool:
    """Whether a guest that was not moved still speaks where it was."""
    before = mover.last_line()
    deadline = time.monotonic() + MIN_LIMIT_S
    while time.monotonic() < deadline:
        now = mover.last_line()
        if now is not None and (before is None or now.ticks > before.ticks):
            return True
        await asyncio.sleep(0.05)
    return False


class _Seen:
    """What is seen of one crossing from outside."""

    def __init__(self, link: Network, observer: Observer) -> None:
        self.observer = observer
        self.before: Line | None = None
        self._link = link
        self._signs = Signs((), ())
        self._start_ns = self._end_ns = 0
        self._wire_bytes = 0
        self._cpu_s = 0.0
        self._peak_mib: float | None = None

    async def look(self, mover: Mover, who: str, limit_s: float) -> Moved:
        """Have the guest moved, and measure meanwhile."""
        await self.observer.begin()
        await asyncio.sleep(_WARM_UP_S + _BEFORE_S)
        self.before = mover.last_line()
        before, usage = mover.hypervisor, Usage(mover.pids, mover.services)
        sent, self._start_ns = self._link.wire_bytes(), time.monotonic_ns()
        try:
            moved = await mover.move(who, limit_s)
        except (VmferryError, QMPError) as error:
            moved = Moved(f"failed: {error}")
        finally:
            self._end_ns = time.monotonic_ns()
            usage.stop()
        newcomers = {mover.hypervisor} - {before} if moved.completed else ()
        self._cpu_s, self._peak_mib = usage.cpu_s(newcomers), usage.peak_mib
        self._wire_bytes = self._link.wire_bytes() - sent
        await asyncio.sleep(_AFTER_S)
        self._signs = await self.observer.end()
        return moved

    def crossing(self, mover: Mover, who: str, moved: Moved, *, right: bool | None) -> Crossing:
        """All figures."""
        signs, start, end = self._signs, self._start_ns, self._end_ns
        begin = start - int(_BEFORE_S * 1e9)
        return Crossing(
            who,
            moved.outcome,
            guest_ok=right,
            prepare_ms=moved.prepare_ms,
            total_ms=moved.total_ms,
            whole_ms=round((end - start) / 1e6, 2),
            downtime_ms=moved.downtime_ms,
            guest_gap_ms=signs.longest_gap_ms(start, end),
            switch_gap_ms=signs.switch_gap_ms(),
            usual_gap_ms=signs.longest_gap_ms(begin, start),
            wire_bytes=self._wire_bytes,
            sent_bytes=moved.sent_bytes,
            cpu_s=self._cpu_s,
            slow_down=slow_down(signs, (begin, start), (start, end), writes=mover.wishes.set_mib > 0),
            rounds=moved.rounds,
            services_peak_mib=self._peak_mib,
        )


def slow_down(
    signs: Signs, before: tuple[int, int], during: tuple[int, int], *, writes: bool
) -> float | None:
    """The part of its work that a guest did not get done: of its writing, or else of its ticks."""
    rate = signs.write_rate if writes else signs.tick_rate
    usual, meanwhile = rate(*before), rate(*during)
    if not usual or meanwhile is None:
        return None
    return round(1 - meanwhile / usual, 3)


def facts(accelerator: str) -> dict[str, Any]:
    """The computer on which it was measured."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                processor = line.split(":", 1)[1].strip()
                break
        else:
            processor = platform.machine()
    return {
        "kernel": platform.release(),
        "processor": processor,
        "cores": len(os.sched_getaffinity(0)),
        "memory_mib": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // _MIB,
        "qemu": probe_binary(QemuSpec.binary).version_text,
        "accelerator": accelerator,
        "vmferry": __version__,
        "python": platform.python_version(),
    }
