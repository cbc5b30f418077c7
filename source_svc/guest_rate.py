"""How fast a guest writes its memory: a short look through the tracker that a migration would use.

Promise: the guest runs on meanwhile; whatever ends the look, be it an error or a cancelled call, nothing stays armed:
one thread arms, counts and disarms, and it ends by itself.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from typing import Final

from vmferry.errors import TrackerUnavailableError
from vmferry.machines.qmp import QmpMachine
from vmferry.memory.digest import PageTable
from vmferry.memory.probe import TrackerFinding, choose_tracker
from vmferry.memory.regions import RamFile, find_mapping
from vmferry.memory.runs import PAGE_SIZE
from vmferry.memory.trackers import HASH_KIND, SOFT_DIRTY_KIND, Tracker
from vmferry.transfer.prediction import DirtyCurve, dirty_curve

Window = tuple[float, ...]
"""When to count within one look, in seconds since its begin."""
_FIRST: Final[Window] = (0.02, 0.05, 0.1)
THOROUGH: Final[Sequence[Window]] = (_FIRST, _FIRST, (*_FIRST, 0.2, 0.3))
QUICK: Final[Sequence[Window]] = ((0.02, 0.05), (0.02, 0.05, 0.1, 0.2))


class GuestRate:
    """A look at one machine's writes; what was seen so far can be asked for at any time."""

    def __init__(self, machine: QmpMachine, kind: str, findings: Sequence[TrackerFinding]) -> None:
        self._pid = machine.pid
        self._region = machine.ram
        self._kind = kind
        self._findings = findings
        self._stop = threading.Event()
        self._work: asyncio.Task[None] | None = None
        self._windows: list[list[tuple[float, int]]] = []

    @property
    def curve(self) -> DirtyCurve | None:
        """What was seen so far; ``None`` if that is nothing."""
        return dirty_curve(self._windows)

    @property
    def armed(self) -> bool:
        """Whether it may be that the machine is tracked."""
        return self._work is not None and not self._work.done()

    @property
    def seconds(self) -> float:
        """How long was looked."""
        return sum(window[-1][0] for window in self._windows if window)

    async def look(self, windows: Sequence[Window]) -> None:
        """Count at the times of ``windows``, one after the other; returns when nothing is armed any more.

        Raises:
            VmferryError: the machine is gone, or this tracker says nothing without all pages being sent first.
        """
        if self._kind == HASH_KIND:
            raise TrackerUnavailableError(
                "the tracker 'hash' compares with what was sent, and nothing was sent yet"
            )
        self._work = asyncio.create_task(asyncio.to_thread(self._look, windows))
        self._work.add_done_callback(_retrieve)
        try:
            await asyncio.shield(self._work)
        finally:
            await self.stop()

    async def stop(self) -> None:
        """End the look; returns when nothing is armed any more."""
        self._stop.set()
        if self._work is not None:
            await asyncio.wait([self._work])

    def _look(self, windows: Sequence[Window]) -> None:
        region = self._region
        # Only this tracker ever looks into the table, and it costs sixteen bytes for each page.
        table = PageTable(region.page_count if self._kind == SOFT_DIRTY_KIND else 0)
        with RamFile.open(region.path, region.size_bytes) as ram:
            mapped = find_mapping(self._pid, region)
            tracker = choose_tracker(mapped, ram, table, self._kind, findings=self._findings)
            try:
                tracker.arm()
                for window in windows:
                    self._windows.append([])
                    self._count(tracker, window)
            except TrackerUnavailableError:
                self._windows.clear()  # counts before the first that failed would be too low
                raise
            finally:
                tracker.disarm()

    def _count(self, tracker: Tracker, window: Window) -> None:
        before = time.monotonic()
        tracker.scan()
        begin = (before + time.monotonic()) / 2
        # Pages that are not mapped are compared with the table, which knows none; they count in every count alike.
        unknown = tracker.count() if self._kind == SOFT_DIRTY_KIND else 0
        for at in window:
            if self._stop.wait(max(0.0, begin + at - time.monotonic())):
                return
            before = time.monotonic()
            written = max(0, tracker.count() - unknown) * PAGE_SIZE
            self._windows[-1].append(((before + time.monotonic()) / 2 - begin, written))


def _retrieve(work: asyncio.Task[None]) -> None:
    """Whoever was cancelled does not ask for what the thread met afterwards."""
    if not work.cancelled():
        work.exception()
