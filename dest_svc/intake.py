"""What becomes of the frames that an attempt's lanes bring: guest memory, and the device state beside it.

Promise: a frame is checked before it counts, and is in memory when :meth:`DirectMemory.take` is done with it. The
event loop itself puts in only what it has done in a moment, in memory that is taken already.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Collection
from typing import Final

from vmferry.errors import ChunkRejectedError, StreamBrokenError
from vmferry.failpoints import reach
from vmferry.machines.qmp import QmpMachine
from vmferry.memory.digest import PageTable
from vmferry.memory.regions import RamFile
from vmferry.memory.runs import PAGE_SIZE
from vmferry.negotiation.encodings import NONE
from vmferry.telemetry.tracing import phase
from vmferry.together import together
from vmferry.transfer.frames import MAX_PAGES_PER_CHUNK, Intake, data_pages
from vmferry.transfer.wire import ChunkFrame, PieceFrame, Received
from vmferry.v1 import transfer_pb2

MAX_DEVICE_STATE_BYTES: Final = 64 * 1024 * 1024
MAX_DEVICE_STATE_PIECES: Final = 1024
"""Bounds what crumbs would cost beyond their bytes."""
_LITTLE_PAGES: Final = 32
"""Waking a thread for less takes longer than putting it in."""
_FEW_PROCESSORS: Final = 2
"""The loop and gRPC's own threads keep so many busy: a thread would only take turns with them."""


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


def pages_at_once(processors: int) -> int:
    """Up to how many pages the loop puts in by itself, where the service may use so many processors.

    A thread has to be woken and wakes the loop in turn, and both want Python's lock all the time. That is worth it
    where both really run at a time, as the loop has to serve all that arrives here. A chunk of the most pages takes
    the loop a few milliseconds.
    """
    return MAX_PAGES_PER_CHUNK if processors <= _FEW_PROCESSORS else _LITTLE_PAGES


class DirectMemory:
    """Memory that is written here, and the device state that goes beside it."""

    def __init__(
        self,
        machine: QmpMachine,
        ram: RamFile,
        table: PageTable,
        encodings: Collection[str] = (NONE,),
        *,
        taken_bytes: Callable[[], int] = lambda: 0,
        at_once: int | None = None,
    ) -> None:
        """Write into ``ram``.

        Args:
            machine: whose memory it is.
            ram: its file.
            table: of its pages.
            encodings: that chunks may have.
            taken_bytes: how much of the file, from its beginning, surely has memory.
            at_once: up to how many pages the loop puts in by itself; by default as suits this computer.
        """
        self._machine = machine
        self._intake = Intake(ram, table, encodings)
        self._device_state = DeviceStateBuffer()
        self._taken_bytes = taken_bytes
        self._preparing: asyncio.Task[None] | None = None
        self._at_once = pages_at_once(len(os.sched_getaffinity(0))) if at_once is None else at_once

    async def open(self) -> None:
        """Do beforehand what loading needs."""
        self._preparing = await self._machine.get_ready_to_load()

    @property
    def ready(self) -> bool:
        """Whether all of that is done; to load before would keep the guest waiting longer."""
        return self._preparing is None or self._preparing.done()

    def take(self, request: Received) -> int | Awaitable[int]:
        """Check one frame and put it where it belongs, at once if that is done in a moment, else in a thread."""
        if isinstance(request, ChunkFrame) and not self._is_quick(request):
            return asyncio.to_thread(take_frame, self._intake, self._device_state, request)
        return take_frame(self._intake, self._device_state, request)

    def _is_quick(self, chunk: ChunkFrame) -> bool:
        """Whether the loop may put a chunk in by itself; nothing that it says has been checked yet."""
        head = chunk.head
        if chunk.mark:
            return False
        if head.encoding != transfer_pb2.ENCODING_NONE and self._at_once < MAX_PAGES_PER_CHUNK:
            return False
        if len(head.runs) + len(head.zero_runs) > self._at_once:
            return False
        if data_pages(chunk) + sum(run.page_count for run in head.zero_runs) > self._at_once:
            return False
        # Elsewhere the kernel may have to find memory first, which may take any time.
        taken_pages = self._taken_bytes() // PAGE_SIZE
        return all(
            run.first_page + run.page_count <= taken_pages
            for runs in (head.runs, head.zero_runs)
            for run in runs
        )

    async def seal(self) -> tuple[bytes, bytes]:
        """Load the device state; returns the digest of memory, and the device state."""
        device_state = self._device_state.whole()
        # Hashing needs a core and no memory of the hypervisor's, so both go on at once; loading begins first.
        _, root = await together(self._load(device_state), asyncio.to_thread(self._intake.table.root))
        return root, device_state

    async def close(self) -> None:
        """Nothing waits here."""

    async def _load(self, device_state: bytes) -> None:
        async with phase("load", device_state_bytes=len(device_state)):
            await self._machine.load_device_state(device_state)
            reach("dest.loaded")
