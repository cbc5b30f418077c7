"""The receiving side of one attempt's lanes.

Promise: frames of a lane are taken in one after the other, each exactly once, and completely before the lane is
reopened or the attempt is discarded; nothing is acknowledged before it is in memory.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Collection
from dataclasses import dataclass
from typing import Final

from xxhash import xxh3_128, xxh3_128_digest

from vmferry.errors import ChunkRejectedError, HashMismatchError, StaleAttemptError, StreamBrokenError
from vmferry.failpoints import reach
from vmferry.machines.port import RunState
from vmferry.machines.qmp import QmpMachine
from vmferry.memory.digest import PageTable
from vmferry.memory.regions import RamFile
from vmferry.memory.runs import PAGE_SIZE
from vmferry.negotiation.encodings import NONE
from vmferry.telemetry.metrics import add_received
from vmferry.telemetry.tracing import phase
from vmferry.together import together
from vmferry.transfer.frames import Intake, data_pages
from vmferry.transfer.numbering import Arrival, ReceivingLane, Totals
from vmferry.transfer.wire import ChunkFrame, PieceFrame, Received
from vmferry.v1 import transfer_pb2

MAX_DEVICE_STATE_BYTES: Final = 64 * 1024 * 1024
MAX_DEVICE_STATE_PIECES: Final = 1024
"""Bounds what crumbs would cost beyond their bytes."""
Response = transfer_pb2.TransferResponse
Take = Callable[[Received], Awaitable[int]]
"""Puts a frame where it belongs, completely, and returns how many of its pages differed in a comparison."""


class DeviceStateBuffer:
    """Collects the pieces of the device state, in whatever order the lanes bring them."""

    def __init__(self) -> None:
        self._pieces: dict[int, bytes] = {}
        self._total = -1

    def add(self, piece: transfer_pb2.DeviceState) -> None:
        """Keep one piece.

        Raises:
            ChunkRejectedError: it lies outside the device state or over another piece, or the device state is larger
                or in more pieces than any real one.
        """
        if not 0 < piece.total_bytes <= MAX_DEVICE_STATE_BYTES:
            raise ChunkRejectedError(
                f"a device state has 1 to {MAX_DEVICE_STATE_BYTES} bytes, not {piece.total_bytes}",
                field="total_bytes",
            )
        if self._total not in (-1, piece.total_bytes):
            raise ChunkRejectedError(
                "the pieces disagree about the size of the device state", field="total_bytes"
            )
        if not piece.data or piece.offset + len(piece.data) > piece.total_bytes:
            raise ChunkRejectedError("the piece is empty or lies outside the device state", field="offset")
        if len(self._pieces) >= MAX_DEVICE_STATE_PIECES:
            raise ChunkRejectedError(
                f"a device state comes in at most {MAX_DEVICE_STATE_PIECES} pieces", field="data"
            )
        end = piece.offset + len(piece.data)
        if any(at < end and piece.offset < at + len(data) for at, data in self._pieces.items()):
            # Refused at once: pieces that may overlap would be bounded by nothing.
            raise ChunkRejectedError("the piece lies over another one", field="offset")
        self._total = piece.total_bytes
        self._pieces[piece.offset] = piece.data

    def whole(self) -> bytes:
        """The device state.

        Raises:
            StreamBrokenError: pieces are missing.
        """
        at = 0
        for offset in sorted(self._pieces):
            if offset != at:
                break
            at += len(self._pieces[offset])
        if self._total < 0 or at != self._total:
            raise StreamBrokenError(f"the device state is incomplete: {at} of {max(self._total, 0)} bytes")
        return b"".join(self._pieces[offset] for offset in sorted(self._pieces))


class Lane:
    """One lane, over all the connections it may need."""

    def __init__(self, window_bytes: int) -> None:
        self.lock = asyncio.Lock()
        self.ended = asyncio.Event()
        self.closed = False
        """The attempt is over: nothing is taken in any more."""
        self.different_pages = 0
        self._window_bytes = window_bytes
        self._numbering = ReceivingLane()
        self._digest = xxh3_128()
        self._connection = 0
        self._newest = 0

    @property
    def frames(self) -> int:
        """Frames taken in so far."""
        return self._numbering.totals.frames

    async def serve(
        self,
        requests: AsyncIterable[Received],
        take: Take,
        number: int = 0,
    ) -> AsyncIterator[Response]:
        """Take in what one connection brings.

        Args:
            requests: its frames.
            take: puts them where they belong.
            number: of the connection, as the source counts; 0 if it does not.

        Raises:
            StaleAttemptError: a newer connection has been opened, or is while this one is served.
        """
        if number and number <= self._newest:
            raise StaleAttemptError("a newer connection of the lane has been opened")
        self._newest = max(self._newest, number)
        self._connection += 1
        connection = self._connection
        async with self.lock:  # an older connection's last frame may still be on its way into memory
            welcome = transfer_pb2.LaneWelcome(acknowledged=self.frames, window_bytes=self._window_bytes)
        yield Response(welcome=welcome)
        async for request in requests:
            # Shielded: a frame is never left half written, whatever becomes of the connection.
            work = asyncio.create_task(self._take(connection, request, take))
            work.add_done_callback(_retrieve)
            yield await asyncio.shield(work)

    async def _take(
        self,
        connection: int,
        request: Received,
        take: Take,
    ) -> Response:
        async with self.lock:
            if self.closed:
                raise StaleAttemptError("the attempt is closed")
            if connection != self._connection:
                raise StaleAttemptError("the lane was reopened by a newer connection")
            if isinstance(request, transfer_pb2.TransferRequest) and request.WhichOneof("message") == "end":
                return self._end(request.end)
            frame = _counted(request)
            if self.ended.is_set():
                raise StreamBrokenError("a frame came after the lane's end")
            if self._numbering.arrival(frame.sequence) is Arrival.NEW:
                self.different_pages += await take(request)
                self._numbering.taken(frame.data_bytes)
                add_received(frame.data_bytes)
                self._digest.update(frame.hash())
            ack = transfer_pb2.Ack(acknowledged=self.frames, different_pages=self.different_pages)
            return Response(ack=ack)

    def _end(self, end: transfer_pb2.LaneEnd) -> Response:
        self._numbering.check_end(Totals(end.frames, end.data_bytes))
        if end.digest != self._digest.digest():
            raise HashMismatchError(
                "the lane's digest is not that of the chunks that arrived", field="digest"
            )
        self.ended.set()
        return Response(ended=transfer_pb2.LaneEnded(frames=self.frames))


def _retrieve(task: asyncio.Task[Response]) -> None:
    """A frame whose connection is gone may fail unseen: the sender sends it again and is told then."""
    if not task.cancelled():
        task.exception()


@dataclass(frozen=True)
class _Counted:
    """What a frame is to the lane it came on."""

    sequence: int
    data_bytes: int
    hash: Callable[[], bytes]
    """What it adds to the lane's digest."""


def _counted(request: Received) -> _Counted:
    if isinstance(request, ChunkFrame):
        head = request.head
        return _Counted(head.sequence, data_pages(request) * PAGE_SIZE, lambda: head.data_hash)
    if isinstance(request, PieceFrame):
        data = request.data
        return _Counted(request.head.sequence, len(data), lambda: xxh3_128_digest(data))
    if request.WhichOneof("message") == "device_state":
        state = request.device_state
        return _Counted(state.sequence, len(state.data), bytes)
    raise StreamBrokenError("only frames and the end may follow the opening of a lane")


def take_frame(intake: Intake, device_state: DeviceStateBuffer, request: Received) -> int:
    """Check one frame and put it where it belongs; returns how many pages differed in a comparison."""
    if isinstance(request, PieceFrame):
        raise ChunkRejectedError("memory does not travel in a stream in this attempt", field="stream_piece")
    if not isinstance(request, ChunkFrame):
        device_state.add(request.device_state)
        return 0
    pages = intake.check(request)
    if request.mark:
        return intake.compare(pages)
    intake.write(pages)
    return 0


class DirectMemory:
    """Memory that is written here, and the device state that goes beside it."""

    def __init__(self, machine: QmpMachine, ram: RamFile, encodings: Collection[str] = (NONE,)) -> None:
        self._machine = machine
        self._intake = Intake(ram, PageTable(machine.ram.page_count), encodings)
        self._device_state = DeviceStateBuffer()

    async def open(self) -> None:
        """Do beforehand what loading needs."""
        await self._machine.get_ready()

    async def take(self, request: Received) -> int:
        """Check one frame and write it."""
        return await asyncio.to_thread(take_frame, self._intake, self._device_state, request)

    async def seal(self) -> tuple[bytes, bytes]:
        """Load the device state; returns the digest of memory, and the device state."""
        device_state = self._device_state.whole()
        # Hashing needs a core and no memory of the hypervisor's, so both go on at once.
        root, _ = await together(asyncio.to_thread(self._intake.table.root), self._load(device_state))
        return root, device_state

    async def close(self) -> None:
        """Nothing waits here."""

    async def _load(self, device_state: bytes) -> None:
        async with phase("load", device_state_bytes=len(device_state)):
            if await self._machine.run_state() is RunState.INMIGRATE:
                await self._machine.load_device_state(device_state)
                reach("dest.loaded")
