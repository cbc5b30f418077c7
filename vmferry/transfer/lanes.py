"""The sending side of all lanes of one attempt.

Promise: what is in flight is bounded by the window; a lane whose connection breaks is reopened and goes on after
the last acknowledged frame, unseen by the caller; a stall, or a lane without a connection, for longer than the
limits, or a rejection by the destination, fails the whole transfer with the destination's own reason;
:meth:`Lanes.drain` returns only when everything sent has been written at the destination, which is the barrier
between rounds.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Final

import grpc
from xxhash import xxh3_128, xxh3_128_digest

from vmferry.errors import PeerUnreachableError, StreamBrokenError, TimedOutError, VmferryError
from vmferry.rpc.status import translated
from vmferry.transfer.frames import BuiltChunk
from vmferry.transfer.numbering import SendingLane, Totals
from vmferry.transfer.pacer import Pacer
from vmferry.transfer.patience import Connections, Limits, Patience
from vmferry.transfer.traffic import Traffic
from vmferry.transfer.window import Window
from vmferry.transfer.wire import PieceFrame, encode_piece, stream_bytes
from vmferry.v1 import transfer_pb2

DEVICE_STATE_PIECE_BYTES: Final = 1024 * 1024
_FIRST_BACKOFF_S: Final = 0.05
_LONGEST_BACKOFF_S: Final = 2.0
_GOODBYE_S: Final = 1.0
_TRANSFER: Final = "/vmferry.v1.DestinationService/Transfer"
_LONGEST_CAUSE: Final = 200
_SHORTEST_LOOK_S: Final = 0.02

Frame = BuiltChunk | PieceFrame | transfer_pb2.DeviceState
Call = grpc.aio.StreamStreamCall[bytes, transfer_pb2.TransferResponse]


@dataclass(frozen=True)
class LaneSettings:
    """What all lanes of an attempt share."""

    migration_id: bytes
    transfer_token: bytes
    open_channel: Callable[[], grpc.aio.Channel]
    """Makes a channel with a connection of its own."""
    window: Window
    """Bytes that may be unacknowledged, over all lanes together, from the opening of the lanes to their close."""
    stall_timeout_s: float
    reconnect_timeout_s: float
    on_event: Callable[[str, dict[str, str | int | float]], None]
    """Told about connections that are lost and come back."""
    pacer: Pacer = field(default_factory=Pacer)
    """Keeps all lanes together within a rate."""


class Lanes:
    """The lanes of one attempt. Frames go to whichever lane has room."""

    def __init__(self, settings: LaneSettings) -> None:
        self.traffic = Traffic()
        self._settings = settings
        count = settings.window.lanes
        self._queue: asyncio.Queue[Frame] = asyncio.Queue(maxsize=count)
        self._lanes = [_Lane(number, self, settings) for number in range(count)]
        self._tasks: list[asyncio.Task[None]] = []
        self._outstanding = 0
        limits = Limits(settings.stall_timeout_s, settings.reconnect_timeout_s)
        self._patience = Patience(count, limits, asyncio.get_running_loop().time())
        self._cause = PeerUnreachableError("the destination has not answered")
        self._waiting: list[asyncio.Future[None]] = []
        self._failure: VmferryError | None = None

    async def open(self) -> None:
        """Connect all lanes; returns when each was welcomed."""
        self._settings.window.open()
        self._tasks = [asyncio.create_task(self._guard(lane.run())) for lane in self._lanes]
        self._tasks.append(asyncio.create_task(self._guard(self._watch_the_clocks())))
        await self._until(lambda: all(lane.welcomed for lane in self._lanes))

    async def send(self, frame: Frame) -> None:
        """Hand a frame over; returns when a lane is about to take it."""
        self._raise_failure()
        if not self._outstanding:
            self.traffic.began(_now())
        self._outstanding += 1
        if not self._queue.full():
            self._queue.put_nowait(frame)
            return
        put = asyncio.create_task(self._queue.put(frame))
        try:
            while not put.done():
                await asyncio.wait({put}, timeout=0.2)
                self._raise_failure()
        finally:
            put.cancel()

    async def send_device_state(self, data: bytes) -> None:
        """Send the device state in pieces."""
        piece_bytes = self._settings.pacer.largest_frame(DEVICE_STATE_PIECE_BYTES)
        for offset in range(0, len(data), piece_bytes):
            piece = data[offset : offset + piece_bytes]
            await self.send(transfer_pb2.DeviceState(offset=offset, total_bytes=len(data), data=piece))

    async def drain(self) -> None:
        """Wait until everything sent was written at the destination."""
        await self._until(lambda: not self._outstanding)

    @property
    def in_flight_bytes(self) -> int:
        """Bytes that were sent and are not known to be written at the destination, of pieces as they are decoded."""
        return sum(lane.in_flight_bytes for lane in self._lanes)

    async def wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait until it holds, which is looked at whenever something was acknowledged."""
        await self._until(condition)

    async def finish(self) -> None:
        """End all lanes in band; returns when the destination agrees that each was whole."""
        for lane in self._lanes:
            lane.finishing.set()
        await self._until(lambda: all(lane.ended for lane in self._lanes))

    async def close(self) -> None:
        """Close all connections, whatever state they are in; safe to call twice."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        self._settings.window.close()

    async def next_frame(self) -> Frame:
        """For a lane with room: the next frame to number and send."""
        return await self._queue.get()

    def waiting_frame(self) -> Frame | None:
        """The same, if there is one already."""
        return None if self._queue.empty() else self._queue.get_nowait()

    def acknowledged(self, lane: int, frames: int) -> None:
        """A lane heard that so many more frames were taken in."""
        self._outstanding -= frames
        if not self._outstanding:
            self.traffic.ended(_now())
        self._patience.progressed(lane, _now())
        self.notify()

    def lost(self, lane: int, cause: PeerUnreachableError) -> None:
        """A lane has no connection, and is being reopened."""
        self._cause = cause
        if not self._patience.lost(lane, _now()):
            return
        told = cause.message[:_LONGEST_CAUSE]
        self._settings.on_event("lane lost", {"lane": lane, "cause": told})
        if not self._patience.connected:
            self._settings.on_event("connection lost", {"cause": told})

    def back(self, lane: int, *, again: bool, idle: bool) -> None:
        """A lane has a connection."""
        now, since = _now(), self._patience.all_lost_since
        lost_s = self._patience.back(lane, now)
        if idle:
            self._patience.progressed(lane, now)
        if not again:
            return
        self.traffic.reconnects += 1
        if since is not None:
            self._settings.on_event("connection back", {"after_s": round(now - since, 3)})
        self._settings.on_event("lane reopened", {"lane": lane, "after_s": round(lost_s, 3)})

    @property
    def connections(self) -> Connections:
        """How the lanes are connected now."""
        return self._patience.connections(_now())

    def notify(self) -> None:
        """Wake whoever waits for something to change."""
        waiting, self._waiting = self._waiting, []
        for one in waiting:
            if not one.done():
                one.set_result(None)

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    async def _until(self, condition: Callable[[], bool]) -> None:
        while self._failure is None and not condition():
            change = asyncio.get_running_loop().create_future()
            self._waiting.append(change)
            await change
        self._raise_failure()

    async def _guard(self, work: Coroutine[object, object, None]) -> None:
        try:
            await work
        except VmferryError as error:
            self._failure = self._failure or error
            self.notify()
        except Exception as error:  # noqa: BLE001 - a bug in a lane must end the transfer, not hang it
            self._failure = self._failure or StreamBrokenError(f"a lane failed: {error!r}")
            self.notify()

    async def _watch_the_clocks(self) -> None:
        limits, patience = self._patience.limits, self._patience
        while True:
            now = _now()
            if not self._outstanding:
                patience.idle(now)
            if patience.stalled(now):
                raise TimedOutError(
                    f"no memory was acknowledged for {limits.stall_s:g} s",
                    limit="stall_timeout",
                    seconds=f"{limits.stall_s:g}",
                )
            left_s = patience.reconnect_left_s(now)
            if left_s is not None and left_s < 0:
                raise PeerUnreachableError(
                    f"a lane could not be reopened for {limits.reconnect_s:g} s: {self._cause.message}",
                    limit="reconnect_timeout",
                    seconds=f"{limits.reconnect_s:g}",
                )
            # No limit, whoever set it, makes this busy.
            await asyncio.sleep(max(_SHORTEST_LOOK_S, min(1.0, limits.stall_s / 4, limits.reconnect_s / 4)))


class _Lane:
    """One lane: a stream on a connection of its own, reopened as often as it takes."""

    def __init__(self, number: int, lanes: Lanes, settings: LaneSettings) -> None:
        self.number = number
        self.welcomed = False
        self.ended = False
        self.finishing = asyncio.Event()
        self._lanes = lanes
        self._settings = settings
        self._numbering: SendingLane[bytes] = SendingLane(settings.window.lane_bytes)
        self._digest = xxh3_128()
        self._room = asyncio.Event()
        self._session_welcomed = asyncio.Event()
        self._different_pages = 0
        self._connection = 0

    @property
    def in_flight_bytes(self) -> int:
        """Bytes of frames that are not acknowledged."""
        return self._numbering.in_flight_bytes

    async def run(self) -> None:
        """Carry frames until the lane has ended in band."""
        backoff = _FIRST_BACKOFF_S
        while not self.ended:
            before = self._numbering.acknowledged
            try:
                await self._session()
            except PeerUnreachableError as error:
                if self._numbering.acknowledged > before:
                    backoff = _FIRST_BACKOFF_S
                self._lanes.lost(self.number, error)
                await asyncio.sleep(backoff)
                backoff = min(backoff * 2, _LONGEST_BACKOFF_S)

    async def _session(self) -> None:
        """One connection's life; raises PeerUnreachableError when it may be tried again."""
        async with self._settings.open_channel() as channel:
            # Frames are kept as bytes, to be sent again as they are; so the call takes bytes.
            method = channel.stream_stream(
                _TRANSFER,
                request_serializer=None,
                response_deserializer=transfer_pb2.TransferResponse.FromString,
            )
            call: Call = method()  # type: ignore[call-arg]  # written to step by step, without an iterator
            self._session_welcomed = asyncio.Event()
            self._connection += 1
            reader = asyncio.create_task(self._read(call))
            writer = asyncio.create_task(self._write(call))
            try:
                done, _ = await asyncio.wait({reader, writer}, return_when=asyncio.FIRST_COMPLETED)
                if writer in done:
                    writer.result()
                await reader
                await self._hang_up(call)
            finally:
                writer.cancel()
                reader.cancel()
                call.cancel()
                await asyncio.gather(reader, writer, return_exceptions=True)

    async def _hang_up(self, call: Call) -> None:
        """Part in good order: the destination sees the end of the stream and not a cancellation."""
        with contextlib.suppress(grpc.aio.BaseError, asyncio.InvalidStateError, TimeoutError):
            async with asyncio.timeout(_GOODBYE_S):
                await call.done_writing()
                await call.code()

    def _opening(self) -> bytes:
        settings = self._settings
        return transfer_pb2.TransferRequest(
            open=transfer_pb2.LaneOpen(
                migration_id=settings.migration_id,
                transfer_token=settings.transfer_token,
                lane=self.number,
                connection=self._connection,
            )
        ).SerializeToString()

    async def _read(self, call: Call) -> None:
        """Take acknowledgements in; returns when the lane has ended."""
        while not self.ended:
            with translated():
                response = await call.read()
            if not isinstance(response, transfer_pb2.TransferResponse):  # the end of the stream
                with translated():
                    code = await call.code()
                    if code is not grpc.StatusCode.OK:
                        await call.read()
                raise PeerUnreachableError(f"lane {self.number} was closed by the destination before its end")
            self._hear(response)

    def _hear(self, response: transfer_pb2.TransferResponse) -> None:
        match response.WhichOneof("message"):
            case "welcome":
                self._lanes.back(self.number, again=self.welcomed, idle=self._numbering.idle)
                self._acknowledge(response.welcome.acknowledged)
                self.welcomed = True
                self._session_welcomed.set()
            case "ack":
                # The count is cumulative per lane, so a repeated acknowledgement changes nothing.
                more = response.ack.different_pages - self._different_pages
                self._different_pages = response.ack.different_pages
                self._lanes.traffic.different_pages += more
                self._acknowledge(response.ack.acknowledged)
            case "ended":
                if response.ended.frames != self._numbering.totals.frames:
                    raise StreamBrokenError(
                        f"lane {self.number}: the ends disagree about the number of frames"
                    )
                self.ended = True
        self._lanes.notify()

    def _acknowledge(self, sequence: int) -> None:
        before = self._numbering.acknowledged
        self._lanes.traffic.acknowledged_bytes += self._numbering.acknowledge(sequence)
        self._room.set()
        if sequence > before:
            self._lanes.acknowledged(self.number, sequence - before)

    async def _write(self, call: Call) -> None:
        """Open the lane, send again what was not acknowledged, then new frames, then the end."""
        await self._put(call, self._opening())
        # A reopened lane learns first how far the destination got, so nothing is sent twice needlessly.
        await self._session_welcomed.wait()
        for request in self._numbering.unacknowledged():
            self._lanes.traffic.repeated_bytes += len(request)
            await self._put(call, request)
        finishing = asyncio.create_task(self.finishing.wait())
        try:
            while True:
                await self._until_room()
                # As long as frames wait, nothing has to be woken for them.
                frame = self._lanes.waiting_frame()
                if frame is not None:
                    await self._put(call, self._number(frame))
                    continue
                following = asyncio.create_task(self._next_request())
                try:
                    await asyncio.wait({following, finishing}, return_when=asyncio.FIRST_COMPLETED)
                    if not following.done():
                        break
                    await self._put(call, following.result())
                finally:
                    following.cancel()
        finally:
            finishing.cancel()
        await self._put(call, transfer_pb2.TransferRequest(end=self._ending()).SerializeToString())
        await asyncio.Event().wait()  # the reader ends the session

    async def _until_room(self) -> None:
        while not self._settings.window.has_room(self._numbering):
            self._room.clear()
            await self._room.wait()

    async def _next_request(self) -> bytes:
        # Numbered in the same step as it is taken: from then on a frame is kept until it is acknowledged, so a
        # connection that breaks in this very moment cannot lose it.
        return self._number(await self._lanes.next_frame())

    def _number(self, frame: Frame) -> bytes:
        sequence = self._numbering.next_sequence
        traffic, held_bytes = self._lanes.traffic, 0
        if isinstance(frame, BuiltChunk):
            data_bytes = frame.data_bytes
            self._digest.update(frame.frame.head.data_hash)
            traffic.zero_pages += 0 if frame.frame.mark else frame.zero_pages
            message = frame.numbered(sequence)
        elif isinstance(frame, PieceFrame):
            # The destination puts pieces in order, so that its window is of the stream's bytes.
            data_bytes = held_bytes = stream_bytes(frame)
            self._digest.update(xxh3_128_digest(frame.data))
            frame.head.sequence = sequence
            message = encode_piece(frame)
        else:
            data_bytes = len(frame.data)
            frame.sequence = sequence
            message = transfer_pb2.TransferRequest(device_state=frame).SerializeToString()
        traffic.wire_bytes += len(message)
        traffic.data_bytes += data_bytes
        self._numbering.sent(message, frame_bytes=len(message), data_bytes=data_bytes, held_bytes=held_bytes)
        return message

    def _ending(self) -> transfer_pb2.LaneEnd:
        totals: Totals = self._numbering.totals
        return transfer_pb2.LaneEnd(
            frames=totals.frames, data_bytes=totals.data_bytes, digest=self._digest.digest()
        )

    async def _put(self, call: Call, request: bytes) -> None:
        await self._settings.pacer.admit(len(request))
        try:
            with translated():
                await call.write(request)
        except asyncio.InvalidStateError:
            await asyncio.Event().wait()  # the stream is over; the reader knows why


def _now() -> float:
    return asyncio.get_running_loop().time()
