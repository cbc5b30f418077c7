"""Taking a machine in by its hypervisor's own migration stream.

Promise: the hypervisor is given the pieces strictly in the order of the stream, whichever lanes bring them; a piece
that is ahead of its turn waits without a thread, and no more wait than the window allows; pieces that are too far
ahead, lie over each other or follow the end are refused by name; closing ends every wait.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection
from typing import Final

from vmferry.errors import ChunkRejectedError, StaleAttemptError, StreamBrokenError, VmferryError
from vmferry.machines.qmp import QmpMachine
from vmferry.machines.stream_socket import StreamSink
from vmferry.negotiation.encodings import NONE
from vmferry.telemetry.tracing import phase
from vmferry.transfer.pieces import is_plain, unpack
from vmferry.transfer.streams import MAX_PIECE_BYTES, StreamDigest
from vmferry.transfer.wire import Buffer, PieceFrame, Received, kind

_DYING_S: Final = 1.0
"""A hypervisor that hangs up over what it was given ends itself, and says why in its log before."""


class OrderedStream:
    """Puts pieces in order."""

    def __init__(self, write: Callable[[Buffer], Awaitable[None]], *, window_bytes: int) -> None:
        self._write = write
        self._window_bytes = window_bytes
        self._digest = StreamDigest()
        self._end: int | None = None
        self._pending: dict[int, int] = {}
        """Offset and length of each piece that waits or is being written."""
        self._writing: asyncio.Future[None] | None = None
        self._failure: VmferryError | None = None
        self._changed = asyncio.Condition()

    @property
    def position(self) -> int:
        """Bytes that were written."""
        return self._digest.size_bytes

    async def put(self, piece: PieceFrame) -> None:
        """Write a piece when its turn has come; returns when it is written.

        Raises:
            ChunkRejectedError: it does not fit to what came before.
            StaleAttemptError: the stream was closed meanwhile.
        """
        self._check(piece)
        if piece.mark:
            self._end = piece.head.offset + len(piece.data)
        self._pending[piece.head.offset] = len(piece.data)
        try:
            async with self._changed:
                await self._changed.wait_for(lambda: self._failure or self.position == piece.head.offset)
            await self._write_now(piece.data)
        finally:
            del self._pending[piece.head.offset]
        self._digest.update(piece.data)
        async with self._changed:
            self._changed.notify_all()

    async def fail(self, failure: VmferryError) -> None:
        """Take nothing more in; every piece that waits is refused with the first failure."""
        self._failure = self._failure or failure
        if self._writing is not None:
            self._writing.cancel()
        async with self._changed:
            self._changed.notify_all()

    def root(self) -> bytes:
        """The digest of the whole stream.

        Raises:
            StreamBrokenError: it has not come to its end.
        """
        if self._end is None or self.position != self._end:
            raise StreamBrokenError(
                f"the stream is incomplete: {self.position} bytes, and its end is missing"
            )
        return self._digest.root()

    async def _write_now(self, data: Buffer) -> None:
        if self._failure is not None:
            raise self._failure
        if not data:  # the hypervisor may have hung up already: it has everything
            return
        self._writing = asyncio.ensure_future(self._write(data))
        try:
            await self._writing
        except asyncio.CancelledError:
            if self._failure is None:
                raise
            raise self._failure from None
        except VmferryError as error:
            self._writing = None
            await self.fail(error)
            raise
        finally:
            self._writing = None

    def _check(self, piece: PieceFrame) -> None:
        start, size = piece.head.offset, len(piece.data)
        end = start + size
        if size > MAX_PIECE_BYTES or (not size and not piece.mark):
            raise ChunkRejectedError(
                f"a piece has 1 to {MAX_PIECE_BYTES} bytes, and only the last one may be empty", field="data"
            )
        if start > self.position + self._window_bytes:
            raise ChunkRejectedError(
                f"the piece at {start} is further ahead of {self.position} than the window allows",
                field="offset",
            )
        if start < self.position or start in self._pending or self._lies_over(start, end):
            raise ChunkRejectedError(f"the piece at {start} lies over what came before", field="offset")
        if self._end is not None and (piece.mark or end > self._end or start >= self._end):
            raise ChunkRejectedError(f"the stream has ended at {self._end}", field="last")
        if piece.mark and any(at + length > end for at, length in self._pending.items()):
            raise ChunkRejectedError("pieces have come from behind this end", field="last")

    def _lies_over(self, start: int, end: int) -> bool:
        return any(at < end and start < at + length for at, length in self._pending.items())


class StreamedMemory:
    """Memory and device state that the waiting hypervisor loads by itself."""

    def __init__(
        self, machine: QmpMachine, encodings: Collection[str] = (NONE,), *, window_bytes: int
    ) -> None:
        self._machine = machine
        self._encodings = encodings
        self._sink = StreamSink()
        self._ordered = OrderedStream(self._write, window_bytes=window_bytes)

    async def open(self) -> None:
        """Have the hypervisor wait for its stream."""
        path = self._machine.paths.stream_socket
        await self._machine.receive_stream(path)
        await self._sink.connect(path)

    async def take(self, request: Received) -> int:
        """Give a frame to the hypervisor; there are no pages to compare in it."""
        if not isinstance(request, PieceFrame):
            raise ChunkRejectedError(
                "memory travels in the hypervisor's own stream in this attempt", field=kind(request)
            )
        plain = is_plain(request)
        await self._ordered.put(
            request if plain else await asyncio.to_thread(unpack, request, self._encodings)
        )
        if request.mark:
            self._sink.end()
        return 0

    async def seal(self) -> tuple[bytes, bytes]:
        """Wait until everything is loaded; returns the digest of the stream, and no device state beside it."""
        root = self._ordered.root()
        async with phase("load", stream_bytes=self._ordered.position):
            await self._machine.wait_stream_loaded()
        return root, b""

    async def close(self) -> None:
        """Take nothing more in; safe to call twice."""
        await self._ordered.fail(StaleAttemptError("the attempt is closed"))
        self._sink.close()

    async def _write(self, data: Buffer) -> None:
        try:
            await self._sink.write(data)
        except OSError as error:
            await self._machine.process.wait_ended(_DYING_S)
            raise self._machine.stream_refused() from error
