"""Everything this host holds for one open attempt: memory, the waiting hypervisor, lanes.

Promise: memory is taken before the source pauses its guest; :meth:`Receiver.seal` speaks of the memory that will run
here; :meth:`Receiver.discard` leaves no process, file or descriptor behind, whatever state it finds.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterable, AsyncIterator, Sequence
from pathlib import Path
from typing import Final, Protocol

from dest_svc.intake import DirectMemory
from dest_svc.streaming import StreamedMemory
from vmferry.config import HostConfig
from vmferry.errors import (
    HashMismatchError,
    InvalidArgumentError,
    MachineDeadError,
    PermissionDeniedError,
    StreamBrokenError,
)
from vmferry.failpoints import reach
from vmferry.handoff.states import Attempt
from vmferry.machines.clock import keep
from vmferry.machines.directory import MachineDirectory
from vmferry.machines.launcher import make_memory_file, start_machine, stop_machine
from vmferry.machines.qmp import QmpMachine
from vmferry.machines.readymemory import ReadyMemory
from vmferry.machines.spec import MachineSpec
from vmferry.memory.backings import HUGETLBFS, TMPFS
from vmferry.memory.regions import RamFile
from vmferry.negotiation.encodings import NONE
from vmferry.negotiation.path import STREAM
from vmferry.rpc.allocator import touch_buffers
from vmferry.telemetry import logs, tracing
from vmferry.telemetry.logs import get_logger
from vmferry.telemetry.tracing import phase
from vmferry.together import together
from vmferry.transfer.receiving import Lane, Response
from vmferry.transfer.seal import seal_digest
from vmferry.transfer.streams import MAX_PIECE_BYTES
from vmferry.transfer.tables import page_table
from vmferry.transfer.wire import Received
from vmferry.v1 import transfer_pb2

_LOG: Final = get_logger(__name__)
_RESERVE_STEP_BYTES: Final = 4 * 1024 * 1024
_LANES_END_S: Final = 2.0


class Supply(Protocol):
    """Where a newcomer's memory comes from."""

    @property
    def ready(self) -> ReadyMemory:
        """Memory that is taken already."""

    def make(self) -> None:
        """Have as much free as was promised."""


class Receiver:
    """One open attempt's share of this host."""

    def __init__(
        self,
        attempt: Attempt,
        spec: MachineSpec,
        directory: MachineDirectory,
        config: HostConfig,
        lanes: int,
        path: str,
        *,
        encodings: Sequence[str] = (),
        room: Supply | None = None,
    ) -> None:
        self.attempt = attempt
        self.spec = spec
        self.trace_id = tracing.current_trace_id()
        """The trace that began it."""
        self.transfer_token = secrets.token_bytes(32)
        self.progressed_at = time.monotonic()
        self.reconnect_timeout_s = 0.0
        """How long its source may be gone, beyond the time in which nothing needs to happen."""
        self.machine: QmpMachine | None = None
        self._directory = directory
        self._state_dir = config.state_dir
        self._lanes = [Lane(config.window_bytes // lanes) for _ in range(lanes)]
        self._path = path
        # An older source names none, and sends pages as they are.
        self._encodings = frozenset(encodings or (NONE,))
        self._buffer_bytes = min(3 * config.window_bytes, spec.memory_bytes)
        """What is in flight at most, as it comes, as it is put together, and as it is decompressed."""
        # A lane may always have one frame on its way, even where the window is smaller.
        self._window_bytes = max(config.window_bytes, lanes * MAX_PIECE_BYTES)
        self._ram: RamFile | None = None
        self._memory: DirectMemory | StreamedMemory | None = None
        self._reservation: asyncio.Task[None] | None = None
        self._reserved_bytes = 0
        self._room = room
        self._early: asyncio.Task[tuple[bytes, bytes]] | None = None
        self._sealing = False
        """The call that seals was faster than the end of the last lane, and loads by itself."""

    @property
    def memory_bytes(self) -> int:
        """Guest memory."""
        return self.spec.memory_bytes

    @property
    def reserved_bytes(self) -> int:
        """Memory already taken."""
        return self._reserved_bytes

    @property
    def outstanding_bytes(self) -> int:
        """Memory promised and not taken yet."""
        return self.memory_bytes - self._reserved_bytes

    async def prepare(self) -> None:
        """Make the memory file, start the hypervisor on it, waiting, and begin to take the memory."""
        async with phase("prepare"):
            await together(self._start(), asyncio.to_thread(touch_buffers, self._buffer_bytes))

    async def _start(self) -> None:
        self.machine = await start_machine(
            self.spec, self._directory, incoming=True, make_memory=self._make_memory
        )
        reach("dest.copy-started")
        await self.machine.check_images()
        if self.spec.shared_memory:
            region = self.machine.ram
            self._ram = RamFile.open(region.path, region.size_bytes, writable=True)
            self._reservation = asyncio.create_task(self._reserve(self._ram))
        self._memory = self._way(self.machine)
        await self._memory.open()

    def _make_memory(self, spec: MachineSpec, path: Path) -> None:
        """Find the machine's memory ready, as far as that is kept here; make the rest, and room for it."""
        if self._room is not None and spec.memory_backing == TMPFS:
            self._reserved_bytes = self._room.ready.take(path, spec.memory_bytes)
        if self._room is not None and spec.memory_backing != HUGETLBFS and self.outstanding_bytes:
            self._room.make()
        if not self._reserved_bytes:
            make_memory_file(spec, path)

    def _way(self, machine: QmpMachine) -> DirectMemory | StreamedMemory:
        if self._path == STREAM:
            return StreamedMemory(machine, self._encodings, window_bytes=self._window_bytes)
        assert self._ram is not None, "only shared memory can be written from outside"
        table = page_table(machine.ram.page_count, self._state_dir)
        return DirectMemory(
            machine, self._ram, table, self._encodings, taken_bytes=lambda: self._reserved_bytes
        )

    async def _reserve(self, ram: RamFile) -> None:
        for offset in range(self._reserved_bytes, self.memory_bytes, _RESERVE_STEP_BYTES):
            length = min(_RESERVE_STEP_BYTES, self.memory_bytes - offset)
            await asyncio.to_thread(ram.reserve, offset, length)
            self._reserved_bytes += length

    def lane(self, opening: transfer_pb2.LaneOpen) -> Lane:
        """The lane that ``opening`` asks for.

        Raises:
            PermissionDeniedError: it does not know the attempt's secret.
            InvalidArgumentError: there is no such lane.
        """
        if not secrets.compare_digest(opening.transfer_token, self.transfer_token):
            raise PermissionDeniedError(
                "the transfer token is not the one that Begin returned", field="transfer_token"
            )
        if opening.lane >= len(self._lanes):
            raise InvalidArgumentError(f"there are {len(self._lanes)} lanes", field="open.lane")
        return self._lanes[opening.lane]

    async def serve(
        self, lane: Lane, requests: AsyncIterable[Received], connection: int = 0
    ) -> AsyncIterator[Response]:
        """Take in what one connection of a lane brings."""
        assert self._memory is not None, "lanes open after Begin was answered"
        logs.bind_migration(self.attempt.migration_id.hex())
        async for response in lane.serve(requests, self._memory.take, connection):
            self.progressed_at = time.monotonic()
            reach("dest.frame-taken")
            if response.HasField("ended"):
                self._load_early()
            yield response

    def _load_early(self) -> None:
        """All has come: the guest is paused, so what has to be done is not put off until the call that seals."""
        if (
            self._early is None
            and not self._sealing
            and isinstance(self._memory, DirectMemory)
            and all(lane.ended.is_set() and not lane.different_pages for lane in self._lanes)
        ):
            self._early = asyncio.create_task(self._memory.seal())
            self._early.add_done_callback(_retrieve)

    async def preflight(self) -> list[str]:
        """What stands in the way of finishing this attempt now."""
        self.progressed_at = time.monotonic()
        problems = []
        if self._reservation is None:  # memory that is no file is the hypervisor's own affair
            pass
        elif not self._reservation.done():
            problems.append(f"memory: {self._reserved_bytes} of {self.memory_bytes} bytes taken so far")
        elif (error := self._reservation.exception()) is not None:
            raise error
        if isinstance(self._memory, DirectMemory) and not self._memory.ready:
            problems.append("hypervisor: it is still taking the memory to load with")
        if self.machine is None or not await self.machine.alive():
            raise MachineDeadError(f"the waiting copy of {self.spec.name} has died")
        return problems

    async def seal_as(self, digest: bytes) -> bytes:
        """The same, if it is what the source sealed.

        Raises:
            HashMismatchError: it is not, or the byte-for-byte comparison found pages that differ.
        """
        own = await self.seal()
        if own != digest:
            fault = "memory or device state here are not what the source sealed"
            raise HashMismatchError(fault, field="digest")
        return own

    async def seal(self) -> bytes:
        """Close the lanes, have everything loaded, and return the digest of what this host holds.

        Raises:
            StreamBrokenError: something has not arrived.
            HashMismatchError: the byte-for-byte comparison found pages that differ.
        """
        assert self._memory is not None
        async with phase("verify"):
            await self._until_ended()
            different = sum(lane.different_pages for lane in self._lanes)
            if different:
                raise HashMismatchError(f"{different} pages differ from the source's", pages=different)
        early, self._early = self._early, None
        self._sealing = True
        root, device_state = await (self._memory.seal() if early is None else early)
        return seal_digest(
            self.attempt, memory_root=root, device_state=device_state, spec_digest=self.spec.digest()
        )

    async def keep_clock(self, realtime_ns: int) -> None:
        """See that the guest of a loaded micro-VM is never told an earlier time than it has read at its source."""
        if self.machine is not None:
            await keep(self.machine, realtime_ns)

    async def _until_ended(self) -> None:
        """Wait a moment for the ends of the lanes, which may be overtaken by the call that seals."""
        try:
            async with asyncio.timeout(_LANES_END_S):
                for lane in self._lanes:
                    await lane.ended.wait()
        except TimeoutError as error:
            still_open = [number for number, lane in enumerate(self._lanes) if not lane.ended.is_set()]
            raise StreamBrokenError(f"lanes {still_open} have not ended") from error

    def acknowledgements(self) -> list[transfer_pb2.Ack]:
        """What each lane has taken in."""
        return [
            transfer_pb2.Ack(acknowledged=lane.frames, different_pages=lane.different_pages)
            for lane in self._lanes
        ]

    async def release(self) -> None:
        """Let go of memory file and lanes; the machine lives on. Safe to call twice."""
        if self._reservation is not None:
            self._reservation.cancel()
            await asyncio.gather(self._reservation, return_exceptions=True)
        if self._early is not None:
            self._early.cancel()
            await asyncio.gather(self._early, return_exceptions=True)
        if self._memory is not None:
            await self._memory.close()
        async with contextlib.AsyncExitStack() as stack:
            for lane in self._lanes:  # a frame on its way into memory ends first
                await stack.enter_async_context(lane.lock)
                lane.closed = True
            if self._ram is not None:
                self._ram.close()
        if self.machine is not None:
            await self.machine.close()

    async def discard(self) -> None:
        """End the waiting hypervisor and remove its memory; safe to call twice."""
        await self.release()
        if self.machine is not None:
            await stop_machine(self.machine, self._directory)


def _retrieve(task: asyncio.Task[tuple[bytes, bytes]]) -> None:
    """What went wrong is told by the call that seals, which may never come."""
    if not task.cancelled():
        task.exception()
