"""The sending side of all lanes of one attempt.

Promise: what is in flight is bounded by the window; a lane whose connection breaks is reopened and goes on after
the last acknowledged frame, unseen by the caller; a stall, or a lane without a connection, for longer than the
limits, or a rejection by the destination, fails the whole transfer with the destination's own reason;
:meth:`Lanes.drain` returns only when everything sent has been written at the destination, which is the barrier
between rounds.

The lanes work in threads of their own (:mod:`vmferry.transfer.lane`) and fetch what they carry: frames that were
handed over one by one, and what a supply makes, in the thread that then sends it, so that a page is read, hashed,
encrypted and sent without waking anybody up in between. What they share is guarded by one lock, which is never held
while something is read, sent or waited for; the event loop is woken only when what somebody waits for has come about.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Protocol

import grpc

from vmferry.errors import PeerUnreachableError, StreamBrokenError, TimedOutError, VmferryError
from vmferry.together import to_the_end
from vmferry.transfer.frames import BuiltChunk
from vmferry.transfer.lane import Frame, Lane
from vmferry.transfer.pacer import Pacer
from vmferry.transfer.patience import Connections, Limits, Patience
from vmferry.transfer.traffic import Traffic
from vmferry.transfer.window import Window
from vmferry.v1 import transfer_pb2

DEVICE_STATE_PIECE_BYTES: Final = 1024 * 1024
_LONGEST_CAUSE: Final = 200
_SHORTEST_LOOK_S: Final = 0.02

_now: Final = time.monotonic


class Supply(Protocol):
    """Makes chunks for whichever lane has room; several of them ask at a time, each in a thread of its own."""

    def next(self, waited_s: float) -> BuiltChunk | None:
        """The next chunk, which says something; ``None`` if there are no more.

        Args:
            waited_s: how long the lane could not take one, since it took the last.
        """


@dataclass(frozen=True)
class LaneSettings:
    """What all lanes of an attempt share."""

    migration_id: bytes
    transfer_token: bytes
    open_channel: Callable[[], grpc.Channel]
    """Makes a channel with a connection of its own."""
    window: Window
    """Bytes that may be unacknowledged, over all lanes together, from the opening of the lanes to their close."""
    stall_timeout_s: float
    reconnect_timeout_s: float
    on_event: Callable[[str, dict[str, str | int | float]], None]
    """Told about connections that are lost and come back, in a thread of a lane."""
    pacer: Pacer = field(default_factory=Pacer)
    """Keeps all lanes together within a rate."""


class Lanes:
    """The lanes of one attempt. Frames go to whichever lane has room."""

    def __init__(self, settings: LaneSettings) -> None:
        self.settings = settings
        self.traffic = Traffic()
        self.lock = threading.Lock()
        """Guards all that follows, and the state of each lane."""
        self.closing = threading.Event()
        self.building = 0
        """Lanes that are having a chunk made."""
        self.supply: Supply | None = None
        self._loop = asyncio.get_running_loop()
        self._frames: deque[Frame] = deque()
        count = settings.window.lanes
        self._lanes = [Lane(number, self) for number in range(count)]
        self._outstanding = 0
        limits = Limits(settings.stall_timeout_s, settings.reconnect_timeout_s)
        self._patience = Patience(count, limits, _now())
        self._cause = PeerUnreachableError("the destination has not answered")
        self._waiting: dict[asyncio.Future[None], Callable[[], bool]] = {}
        self._failure: VmferryError | None = None
        self._clocks: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Connect all lanes; returns when each was welcomed."""
        self.settings.window.open()
        for lane in self._lanes:
            lane.start()
        self._clocks = asyncio.create_task(self._watch_the_clocks())
        await self.wait_for(lambda: all(lane.welcomed for lane in self._lanes))

    async def send(self, frame: Frame) -> None:
        """Hand a frame over; returns when a lane is about to take it."""
        while True:
            await self.wait_for(self._takes_frames)
            with self.lock:
                if self._takes_frames():
                    self._frames.append(frame)
                    self.counted(1)
                    self._wake_lanes()
                    return

    async def send_device_state(self, data: bytes) -> None:
        """Send the device state in pieces."""
        piece_bytes = self.settings.pacer.largest_frame(DEVICE_STATE_PIECE_BYTES)
        for offset in range(0, len(data), piece_bytes):
            piece = data[offset : offset + piece_bytes]
            await self.send(transfer_pb2.DeviceState(offset=offset, total_bytes=len(data), data=piece))

    async def carry(self, supply: Supply) -> None:
        """Send all that a supply makes; returns when it has no more, and lanes have taken all of it."""
        with self.lock:
            self._raise_failure()
            self.supply = supply
            self._wake_lanes()
        try:
            await self.wait_for(lambda: self.supply is None and not self.building)
        finally:
            with self.lock:
                self.supply = None

    async def drain(self) -> None:
        """Wait until everything sent was written at the destination."""
        await self.wait_for(lambda: not self._outstanding)

    @property
    def in_flight_bytes(self) -> int:
        """Bytes that were sent and are not known to be written at the destination, of pieces as they are decoded."""
        return sum(lane.in_flight_bytes for lane in self._lanes)

    async def wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait until it holds, which is looked at, in any thread, whenever something was acknowledged."""
        while True:
            with self.lock:
                self._raise_failure()
                if condition():
                    return
                change = self._loop.create_future()
                self._waiting[change] = condition
            try:
                await change
            finally:
                with self.lock:
                    self._waiting.pop(change, None)

    async def finish(self) -> None:
        """End all lanes in band; returns when the destination agrees that each was whole."""
        with self.lock:
            for lane in self._lanes:
                lane.finishing = True
            self._wake_lanes()
        await self.wait_for(lambda: all(lane.ended for lane in self._lanes))

    async def close(self) -> None:
        """Close all connections, whatever state they are in; safe to call twice."""
        if self._clocks is not None:
            self._clocks.cancel()
            await asyncio.gather(self._clocks, return_exceptions=True)
        with self.lock:
            self.closing.set()
            self._wake_lanes()
        self.settings.pacer.wake()
        for lane in self._lanes:
            lane.cut()
        await to_the_end(asyncio.to_thread(self._join))
        self.settings.window.close()

    @property
    def connections(self) -> Connections:
        """How the lanes are connected now."""
        with self.lock:
            return self._patience.connections(_now())

    # What follows is for the lanes, in their threads; the lock is held.

    def waiting_frame(self) -> Frame | None:
        """The next frame that was handed over, if there is one."""
        if not self._frames:
            return None
        frame = self._frames.popleft()
        self.notify()
        return frame

    def made(self) -> None:
        """A chunk of the supply was made, and is on its way."""
        self.building -= 1
        self.counted(1)
        self.notify()

    def exhausted(self, supply: Supply) -> None:
        """A lane heard that a supply has no more."""
        self.building -= 1
        if self.supply is supply:
            self.supply = None
        self.notify()

    def counted(self, frames: int) -> None:
        """So many more frames are to be acknowledged."""
        if not self._outstanding:
            self.traffic.began(_now())
        self._outstanding += frames

    def acknowledged(self, lane: int, frames: int) -> None:
        """A lane heard that so many more frames were taken in."""
        self._outstanding -= frames
        if not self._outstanding:
            self.traffic.ended(_now())
        self._patience.progressed(lane, _now())

    def lost(self, lane: int, cause: PeerUnreachableError) -> None:
        """A lane has no connection, and is being reopened."""
        self._cause = cause
        if not self._patience.lost(lane, _now()):
            return
        told = cause.message[:_LONGEST_CAUSE]
        self.settings.on_event("lane lost", {"lane": lane, "cause": told})
        if not self._patience.connected:
            self.settings.on_event("connection lost", {"cause": told})

    def back(self, lane: int, *, again: bool, idle: bool) -> None:
        """A lane has a connection."""
        at, since = _now(), self._patience.all_lost_since
        lost_s = self._patience.back(lane, at)
        if idle:
            self._patience.progressed(lane, at)
        if not again:
            return
        self.traffic.reconnects += 1
        if since is not None:
            self.settings.on_event("connection back", {"after_s": round(at - since, 3)})
        self.settings.on_event("lane reopened", {"lane": lane, "after_s": round(lost_s, 3)})

    def fail(self, error: Exception) -> None:
        """The transfer has failed; the first reason counts."""
        if not isinstance(error, VmferryError):  # a bug in a lane must end the transfer, not hang it
            error = StreamBrokenError(f"a lane failed: {error!r}")
        self._failure = self._failure or error
        self.notify()

    def notify(self) -> None:
        """Wake whoever waits for what holds by now."""
        due = [change for change, condition in self._waiting.items() if self._failure or condition()]
        for change in due:
            del self._waiting[change]
        if due:
            # A loop that has ended waits for nothing.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(_resolve, due)

    def _takes_frames(self) -> bool:
        return len(self._frames) < len(self._lanes)

    def _wake_lanes(self) -> None:
        for lane in self._lanes:
            lane.changed.notify_all()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _join(self) -> None:
        for lane in self._lanes:
            lane.join()

    async def _watch_the_clocks(self) -> None:
        limits = self._patience.limits
        # No limit, whoever set it, makes this busy.
        look_s = max(_SHORTEST_LOOK_S, min(1.0, limits.stall_s / 4, limits.reconnect_s / 4))
        while True:
            with self.lock:
                error = self._overdue(limits)
                if error is not None:
                    self.fail(error)
                    return
            await asyncio.sleep(look_s)

    def _overdue(self, limits: Limits) -> VmferryError | None:
        """What has taken longer than it may."""
        at, patience = _now(), self._patience
        if not self._outstanding:
            patience.idle(at)
        if patience.stalled(at):
            return TimedOutError(
                f"no memory was acknowledged for {limits.stall_s:g} s",
                limit="stall_timeout",
                seconds=f"{limits.stall_s:g}",
            )
        left_s = patience.reconnect_left_s(at)
        if left_s is not None and left_s < 0:
            return PeerUnreachableError(
                f"a lane could not be reopened for {limits.reconnect_s:g} s: {self._cause.message}",
                limit="reconnect_timeout",
                seconds=f"{limits.reconnect_s:g}",
            )
        return None


def _resolve(changes: list[asyncio.Future[None]]) -> None:
    for change in changes:
        if not change.done():
            change.set_result(None)
