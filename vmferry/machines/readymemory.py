"""Memory that is taken before anybody needs it, for machines that will arrive.

A kernel zeroes each page when it is touched for the first time, which takes longer than receiving the page: 2 GiB
take a second or more. A host may do that beforehand::

    ready_memory_mib = [2048, 2048]

        nothing ──> filling ──> ready ──> a machine's memory      take: a new name, no copy
                       ^  │        │
                       │  └────────┴──> given up                  for somebody else who needs memory
                       └── when nobody arrives

Promise: a file that is given out was made by this object, has been zeroed by the kernel, and was never written: no
other machine's memory is ever in it. What is kept counts as free for newcomers, because it is given up for whoever
needs memory and cannot use it, and while nobody may arrive; it is never filled beyond what ``headroom_bytes`` leaves
to the host. Files of an earlier process are removed, and :meth:`close` leaves none.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vmferry.errors import InsufficientMemoryError, MachineExistsError
from vmferry.machines.host import available_memory_bytes
from vmferry.memory.regions import RamFile
from vmferry.telemetry.logs import get_logger

FOLDER: Final = ".ready"
"""Below ``ram_dir``, so that a file becomes a machine's by another name."""
READY: Final = ".ready"
"""How the name of a file ends that is filled."""
FILLING: Final = ".filling"

_LOG: Final = get_logger(__name__)
_STEP_BYTES: Final = 8 * 1024 * 1024
_LOOK_S: Final = 0.25
_WASTE: Final = 2
"""A file is cut for a machine of less, but not for one of less than such a part of it."""
_MIB: Final = 1024 * 1024


@dataclass
class _File:
    """One file that is filled, or being filled."""

    path: Path
    size_bytes: int
    taken_bytes: int = 0

    @property
    def ready(self) -> bool:
        """Whether all of it is there."""
        return self.taken_bytes >= self.size_bytes


class ReadyMemory:
    """The files of one host."""

    def __init__(
        self,
        ram_dir: Path,
        sizes_mib: Sequence[int],
        *,
        headroom_bytes: int,
        busy: Callable[[], bool],
        closed: Callable[[], bool] = lambda: False,
        available: Callable[[], int] = available_memory_bytes,
    ) -> None:
        """Nothing is made yet.

        Args:
            ram_dir: where guest memory is made.
            sizes_mib: a file of each is kept.
            headroom_bytes: what has to stay free on this host.
            busy: whether somebody arrives, so that processors and memory are needed otherwise.
            closed: whether nobody may arrive, so that nothing is kept for anybody; it may change at any time.
            available: says how much memory this host has to give.
        """
        self._folder = ram_dir / FOLDER
        self._sizes = tuple(size * _MIB for size in sizes_mib)
        self._headroom_bytes = headroom_bytes
        self._busy = busy
        self._closed = closed
        self._available = available
        self._files: list[_File] = []
        self._lock = threading.Lock()
        """Held while the list is changed, which both the filling and the giving out do, in threads."""
        self._filling: asyncio.Task[None] | None = None

    @property
    def held_bytes(self) -> int:
        """Memory that is taken for nobody."""
        return sum(file.taken_bytes for file in tuple(self._files))

    @property
    def ready_bytes(self) -> int:
        """The part of it that machines would find ready."""
        return sum(file.size_bytes for file in tuple(self._files) if file.ready)

    def start(self) -> None:
        """Remove what an earlier process left, and fill from now on whenever nobody arrives."""
        self._remove_leftovers()
        if self._sizes:
            self._filling = asyncio.create_task(self._keep_filling(), name="ready memory")

    async def close(self) -> None:
        """Stop filling, and give all of it back; safe to call twice."""
        if self._filling is not None:
            self._filling.cancel()
            await asyncio.gather(self._filling, return_exceptions=True)
            self._filling = None
            await asyncio.to_thread(self._give_up_all)

    def take(self, path: Path, size_bytes: int) -> int:
        """Make one of the files a machine's; returns how much of its memory is there already, 0 if none suits.

        Raises:
            MachineExistsError: the machine has a file already.
        """
        with self._lock:
            file = self._suiting(size_bytes)
            if file is None:
                return 0
            self._files.remove(file)
        try:
            with RamFile.open(file.path, file.size_bytes, writable=True) as ram:
                os.ftruncate(ram.fileno(), size_bytes)
            # A link, because a new name by renaming would take the place of a file that has it.
            path.hardlink_to(file.path)
        except FileExistsError as error:
            raise MachineExistsError(
                f"the memory file {path} exists already", remedy="Remove it if no machine uses it.", path=path
            ) from error
        finally:
            file.path.unlink(missing_ok=True)
        return min(file.size_bytes, size_bytes)

    def make_room(self, wanted_bytes: int) -> None:
        """Give up as much as it takes to have so much free on this host besides the headroom."""
        while self._files and self._available() - self._headroom_bytes < wanted_bytes:
            with self._lock:
                if not self._files:
                    return
                # What is not filled yet is of the least use, and then the smallest.
                file = min(self._files, key=lambda one: (one.ready, one.size_bytes))
                self._files.remove(file)
            file.path.unlink(missing_ok=True)
            _LOG.info("ready memory given up", bytes=file.taken_bytes)

    def _suiting(self, size_bytes: int) -> _File | None:
        """The smallest that is large enough, and not far too large; or else the largest."""
        ready = [file for file in self._files if file.ready and file.size_bytes <= size_bytes * _WASTE]
        enough = [file for file in ready if file.size_bytes >= size_bytes]
        if enough:
            return min(enough, key=lambda file: file.size_bytes)
        return max(ready, key=lambda file: file.size_bytes, default=None)

    async def _keep_filling(self) -> None:
        while True:
            if self._files and self._closed():
                held = self.held_bytes
                await asyncio.to_thread(self._give_up_all)
                _LOG.info("ready memory given up: this host takes no newcomers", bytes=held)
            size_bytes = None if self._busy() or self._closed() else self._missing()
            if size_bytes is None:
                await asyncio.sleep(_LOOK_S)
                continue
            try:
                await self._fill(size_bytes)
            except (InsufficientMemoryError, OSError) as error:
                _LOG.warning("no memory can be kept ready now", detail=str(error))
                await asyncio.sleep(_LOOK_S)

    def _missing(self) -> int | None:
        """The size of a file that is not there, for which there is memory."""
        there = [file.size_bytes for file in self._files]
        for size_bytes in sorted(self._sizes):
            if size_bytes in there:
                there.remove(size_bytes)
            elif self._available() - self._headroom_bytes >= size_bytes:
                return size_bytes
        return None

    async def _fill(self, size_bytes: int) -> None:
        """Make a file and take its memory, step by step; whoever arrives meanwhile comes first."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        name = f"{size_bytes // _MIB}-{secrets.token_hex(4)}"
        file = _File(self._folder / f"{name}{FILLING}", size_bytes)
        with RamFile.create(file.path, size_bytes) as ram:
            with self._lock:
                self._files.append(file)
            try:
                await self._take_all(file, ram)
            except BaseException:
                self._forget(file)
                raise
        with self._lock:
            if file not in self._files:  # given up meanwhile
                return
            ready = file.path.with_suffix(READY)
            file.path.rename(ready)
            file.path = ready

    async def _take_all(self, file: _File, ram: RamFile) -> None:
        while file.taken_bytes < file.size_bytes and file in self._files:
            if self._closed():
                self._forget(file)
                return
            if self._busy():
                await asyncio.sleep(_LOOK_S)
                continue
            started = time.monotonic()
            length = min(_STEP_BYTES, file.size_bytes - file.taken_bytes)
            if self._available() - self._headroom_bytes < length:
                raise InsufficientMemoryError("this host has no memory left beyond its headroom")
            await asyncio.to_thread(ram.reserve_warm, file.taken_bytes, length)
            file.taken_bytes += length
            # Half of a processor is enough for what is not urgent.
            await asyncio.sleep(time.monotonic() - started)

    def _forget(self, file: _File) -> None:
        with self._lock:
            if file not in self._files:  # given out, or given up by somebody else, who sees to it
                return
            self._files.remove(file)
        file.path.unlink(missing_ok=True)

    def _give_up_all(self) -> None:
        for file in tuple(self._files):
            self._forget(file)
        with contextlib.suppress(OSError):
            self._folder.rmdir()

    def _remove_leftovers(self) -> None:
        for path in _entries(self._folder):
            path.unlink(missing_ok=True)


def ready_files(ram_dir: Path) -> list[int]:
    """The sizes in MiB of the files that are ready on a host; for those who look from outside."""
    names = [path.name for path in _entries(ram_dir / FOLDER) if path.suffix == READY]
    return sorted(int(name.partition("-")[0]) for name in names)


def filling_files(ram_dir: Path) -> int:
    """How many are being filled."""
    return sum(path.suffix == FILLING for path in _entries(ram_dir / FOLDER))


def _entries(folder: Path) -> Iterator[Path]:
    if folder.is_dir():
        yield from sorted(folder.iterdir())
