"""What becomes of the frames that an attempt's lanes bring: guest memory, and the device state beside it.

Promise: a frame is checked before it counts, and :meth:`DirectMemory.take` returns only when it is in memory.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import Final

from vmferry.errors import ChunkRejectedError, StreamBrokenError
from vmferry.failpoints import reach
from vmferry.machines.qmp import QmpMachine
from vmferry.memory.digest import PageTable
from vmferry.memory.regions import RamFile
from vmferry.negotiation.encodings import NONE
from vmferry.telemetry.tracing import phase
from vmferry.together import together
from vmferry.transfer.frames import Intake
from vmferry.transfer.wire import ChunkFrame, PieceFrame, Received
from vmferry.v1 import transfer_pb2

MAX_DEVICE_STATE_BYTES: Final = 64 * 1024 * 1024
MAX_DEVICE_STATE_PIECES: Final = 1024
"""Bounds what crumbs would cost beyond their bytes."""


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


class DirectMemory:
    """Memory that is written here, and the device state that goes beside it."""

    def __init__(self, machine: QmpMachine, ram: RamFile, encodings: Collection[str] = (NONE,)) -> None:
        self._machine = machine
        self._intake = Intake(ram, PageTable(machine.ram.page_count), encodings)
        self._device_state = DeviceStateBuffer()

    async def open(self) -> None:
        """Do beforehand what loading needs."""
        await self._machine.get_ready_to_load()

    async def take(self, request: Received) -> int:
        """Check one frame and write it; a piece of the device state, which is only kept, needs no thread for that."""
        if not isinstance(request, ChunkFrame):
            return take_frame(self._intake, self._device_state, request)
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
            await self._machine.load_device_state(device_state)
            reach("dest.loaded")
