"""The receiving side of one lane, over all the connections that it may need.

Promise: frames are taken in one after the other, each exactly once, and completely before the lane is reopened or
closed, whatever becomes of the connection; nothing is acknowledged before whoever takes frames in has put it where it
belongs. What whoever takes them does at once costs no task, and nothing comes between, but that the loop has its turn
after each large one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from xxhash import xxh3_128, xxh3_128_digest

from vmferry.errors import HashMismatchError, StaleAttemptError, StreamBrokenError
from vmferry.memory.runs import PAGE_SIZE
from vmferry.telemetry.metrics import add_received
from vmferry.transfer.frames import data_pages
from vmferry.transfer.numbering import Arrival, ReceivingLane, Totals
from vmferry.transfer.wire import ChunkFrame, PieceFrame, Received, stream_bytes
from vmferry.v1 import transfer_pb2

Response = transfer_pb2.TransferResponse
Take = Callable[[Received], int | Awaitable[int]]
"""Puts a frame where it belongs, completely: at once, or when what it returns was waited for. Says how many of its
pages differed in a comparison."""


_LARGE_BYTES: Final = 256 * 1024
"""Taking in so much keeps the loop for a part of a millisecond."""


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
            yield await self._take(connection, request, take)
            if isinstance(request, ChunkFrame) and len(request.data) >= _LARGE_BYTES:
                await asyncio.sleep(0)  # what is there already is read without a turn of the loop

    async def _take(
        self,
        connection: int,
        request: Received,
        take: Take,
    ) -> Response:
        await self.lock.acquire()
        work: asyncio.Task[Response] | None = None
        try:
            if self.closed:
                raise StaleAttemptError("the attempt is closed")
            if connection != self._connection:
                raise StaleAttemptError("the lane was reopened by a newer connection")
            if isinstance(request, transfer_pb2.TransferRequest) and request.WhichOneof("message") == "end":
                return self._end(request.end)
            frame = _counted(request)
            if self.ended.is_set():
                raise StreamBrokenError("a frame came after the lane's end")
            if self._numbering.arrival(frame.sequence) is not Arrival.NEW:
                return self._ack()
            different = take(request)
            if isinstance(different, int):
                return self._taken(frame, different)
            # Shielded: a frame is never left half written, whatever becomes of the connection.
            work = asyncio.create_task(self._wait_for(frame, different))
            work.add_done_callback(self._let_go)
            return await asyncio.shield(work)
        finally:
            if work is None:
                self.lock.release()

    async def _wait_for(self, frame: _Counted, different: Awaitable[int]) -> Response:
        return self._taken(frame, await different)

    def _let_go(self, work: asyncio.Task[Response]) -> None:
        """A frame whose connection is gone may fail unseen: the sender sends it again and is told then."""
        self.lock.release()
        if not work.cancelled():
            work.exception()

    def _taken(self, frame: _Counted, different: int) -> Response:
        self.different_pages += different
        self._numbering.taken(frame.data_bytes)
        add_received(frame.data_bytes)
        self._digest.update(frame.hash())
        return self._ack()

    def _ack(self) -> Response:
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
        return _Counted(request.head.sequence, stream_bytes(request), lambda: xxh3_128_digest(data))
    if request.WhichOneof("message") == "device_state":
        state = request.device_state
        return _Counted(state.sequence, len(state.data), bytes)
    raise StreamBrokenError("only frames and the end may follow the opening of a lane")
