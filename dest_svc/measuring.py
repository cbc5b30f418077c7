"""What a destination does with pages that are sent only to see how fast they come.

Promise: they are decoded, checked and written as in a migration, to a small file without a name, and forgotten with
it; a call takes a bounded number of bytes and seconds, and only a few hosts are served at a time; nothing is left
behind, also if the service is killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from vmferry.errors import (
    InsufficientMemoryError,
    InvalidArgumentError,
    TimedOutError,
    TooManyMigrationsError,
)
from vmferry.memory.digest import PageTable
from vmferry.memory.nameless import open_nameless
from vmferry.memory.regions import RamFile
from vmferry.memory.runs import PAGE_SIZE
from vmferry.security.identity import Identity
from vmferry.together import to_the_end
from vmferry.transfer.frames import MAX_PAGES_PER_CHUNK, Intake
from vmferry.transfer.wire import ChunkFrame
from vmferry.v1 import handoff_pb2

MAX_SOURCES: Final = 2
"""Hosts that may measure at a time."""
MAX_CALLS: Final = 16
"""Calls of one host at a time: one for each lane that a migration may have."""
MAX_BYTES: Final = 64 * 1024 * 1024
"""Page contents in one call."""
MAX_SECONDS: Final = 2.0
"""Length of one call."""
_SCRATCH_BYTES: Final = MAX_PAGES_PER_CHUNK * PAGE_SIZE
_RESERVE_STEP_BYTES: Final = 4 * 1024 * 1024
_RESERVE_STEPS: Final = 4


class Measurements:
    """All measurements that this host serves."""

    def __init__(self, ram_dir: Path, memory_is_ready: Callable[[], bool] = bool) -> None:
        """Nothing is measured yet.

        Args:
            ram_dir: where guest memory is made.
            memory_is_ready: whether newcomers find memory that is taken already, so that taking it is no part of it.
        """
        self._ram_dir = ram_dir
        self._memory_is_ready = memory_is_ready
        self._calls: Counter[str] = Counter()
        self._reserving: set[str] = set()

    async def measure(
        self, caller: Identity, requests: AsyncIterator[ChunkFrame]
    ) -> handoff_pb2.MeasureResponse:
        """Take in what one call brings, and say how it went.

        Raises:
            TooManyMigrationsError: as many measurements as allowed are going on.
            InvalidArgumentError: the call brings more than it may.
            TimedOutError: the call lasts longer than it may.
        """
        with self._counted(caller.uri):
            try:
                async with asyncio.timeout(MAX_SECONDS):
                    return await self._take_all(caller.uri, requests)
            except TimeoutError as error:
                raise TimedOutError(
                    f"a measurement lasts {MAX_SECONDS:g} s at most",
                    limit="measurement",
                    remedy="Send less in each call.",
                ) from error

    @contextlib.contextmanager
    def _counted(self, source: str) -> Iterator[None]:
        others = len(self._calls.keys() - {source})
        if others >= MAX_SOURCES or self._calls[source] >= MAX_CALLS:
            raise TooManyMigrationsError(
                f"{sum(self._calls.values())} measurements are going on here already",
                limit="measurements",
                remedy="Plan again in a moment.",
            )
        self._calls[source] += 1
        try:
            yield
        finally:
            self._calls[source] -= 1
            if not self._calls[source]:
                del self._calls[source]

    async def _take_all(
        self, source: str, requests: AsyncIterator[ChunkFrame]
    ) -> handoff_pb2.MeasureResponse:
        taken, began = 0, 0.0
        reservation: _Reservation | None = None
        async with contextlib.AsyncExitStack() as stack:
            intake: Intake | None = None
            async for request in requests:
                if intake is None:
                    began = time.monotonic()
                    scratch = stack.enter_context(_nameless(self._ram_dir, _SCRATCH_BYTES))
                    intake = Intake(scratch, PageTable(MAX_PAGES_PER_CHUNK))
                    reservation = await stack.enter_async_context(self._reservation(source))
                taken += len(request.data)
                if taken > MAX_BYTES:
                    raise InvalidArgumentError(
                        f"a measurement takes {MAX_BYTES} bytes at most", field="chunk"
                    )
                # The file is closed after the writing has ended, also of a call that is cancelled.
                await to_the_end(asyncio.to_thread(_take, intake, request))
            response = handoff_pb2.MeasureResponse(data_bytes=taken)
            if began:
                response.elapsed.FromNanoseconds(int((time.monotonic() - began) * 1e9))
        # A step that was begun has ended by now, so that the shortest call measures one, too.
        if reservation is not None:
            response.reserve_bytes_per_second = reservation.rate
        return response

    @contextlib.asynccontextmanager
    async def _reservation(self, source: str) -> AsyncIterator[_Reservation]:
        """Take memory meanwhile, as a migration does; in one of a host's calls, as it is one newcomer's memory."""
        reservation = _Reservation()
        if source in self._reserving or self._memory_is_ready():
            yield reservation
            return
        self._reserving.add(source)
        try:
            with _nameless(self._ram_dir, _RESERVE_STEPS * _RESERVE_STEP_BYTES) as file:
                task = asyncio.create_task(reservation.take(file))
                try:
                    yield reservation
                finally:
                    reservation.enough = True
                    await to_the_end(_settled(task))
        finally:
            self._reserving.discard(source)


@dataclass
class _Reservation:
    """Memory that is taken for nobody."""

    enough: bool = False
    seconds: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Bytes per second; 0 if none was taken."""
        return _RESERVE_STEP_BYTES * len(self.seconds) / sum(self.seconds) if self.seconds else 0.0

    async def take(self, file: RamFile) -> None:
        """Take memory in steps as large as a migration's."""
        for step in range(_RESERVE_STEPS):
            if self.enough:
                return
            started = time.monotonic()
            with contextlib.suppress(InsufficientMemoryError):  # whether there is enough is for others to say
                await asyncio.to_thread(file.reserve, step * _RESERVE_STEP_BYTES, _RESERVE_STEP_BYTES)
                self.seconds.append(time.monotonic() - started)


async def _settled(task: asyncio.Task[None]) -> None:
    await asyncio.wait([task])
    task.result()


def _take(intake: Intake, chunk: ChunkFrame) -> None:
    intake.write(intake.check(chunk))


def _nameless(folder: Path, size_bytes: int) -> RamFile:
    """A memory file that the kernel removes when it is closed, even by a process's death."""
    try:
        fd = open_nameless(folder)
    except OSError as error:
        raise InsufficientMemoryError(f"no file can be made in {folder}: {error.strerror}") from error
    os.ftruncate(fd, size_bytes)
    return RamFile(fd, folder, size_bytes)
