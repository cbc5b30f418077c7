"""Where guest memory is: the RAM file, and the place where a machine's process maps it.

Promise: :func:`find_mapping` answers only for memory whose every write a tracker can see (one shared mapping
of the whole file), and :class:`RamFile` moves pages between the file and a caller's buffer by system calls, without
mapping any of it: the resident memory of a service does not grow with the machine, a page that nobody has is never
touched, and Python's lock is free while pages are copied.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from vmferry.errors import (
    ChunkRejectedError,
    InsufficientMemoryError,
    MachineDeadError,
    MachineFailedError,
    TrackerUnavailableError,
)
from vmferry.memory.hugepages import file_page_bytes, path_page_bytes, write_spans
from vmferry.memory.runs import PAGE_SIZE, PageRuns

PIECE_BYTES: Final = 128 * 1024
"""What is written and read back at a time, so that it is still in the processor's cache when it is looked at."""
_ZEROS: Final = bytes(PIECE_BYTES)
_THREAD: Final = threading.local()
_KEEP_SIZE: Final = 1
_PUNCH_HOLE: Final = 2

_MAPS_LINE: Final = re.compile(
    r"(?P<start>[0-9a-f]+)-(?P<end>[0-9a-f]+) ...(?P<sharing>[sp]) "
    r"(?P<offset>[0-9a-f]+) (?P<major>[0-9a-f]+):(?P<minor>[0-9a-f]+) (?P<inode>\d+)"
)

# JUSTIFICATION: Python has no binding for fallocate(2), the only way to give back part of a tmpfs file.
# SAFETY: takes a descriptor and three integers, touches no memory of this process.
_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


@dataclass(frozen=True)
class Region:
    """One block of guest RAM, held in a shared-memory file."""

    name: str
    path: Path
    size_bytes: int

    def __post_init__(self) -> None:
        if self.size_bytes <= 0 or self.size_bytes % PAGE_SIZE:
            raise ValueError(f"region {self.name}: {self.size_bytes} bytes are not a whole number of pages")

    @property
    def page_count(self) -> int:
        """How many pages the region has."""
        return self.size_bytes // PAGE_SIZE


@dataclass(frozen=True)
class MappedRegion:
    """A region and where the machine's process has it in its address space."""

    region: Region
    pid: int
    address: int
    huge: bool = False
    """Whether it consists of huge pages, of which the kernel notes writes as a whole."""


@dataclass(frozen=True)
class _Piece:
    """One line of /proc/PID/maps that belongs to the file."""

    start: int
    end: int
    offset: int
    shared: bool


def _pieces(pid: int, path: Path) -> list[_Piece]:
    """All mappings of the file at ``path`` in process ``pid``, by address."""
    try:
        status = path.stat()
    except OSError as exc:
        raise TrackerUnavailableError(
            f"RAM file {path} cannot be examined: {exc.strerror}", path=path
        ) from exc
    wanted = (os.major(status.st_dev), os.minor(status.st_dev), status.st_ino)
    try:
        lines = Path(f"/proc/{pid}/maps").read_text("utf-8", "surrogateescape").splitlines()
    except (FileNotFoundError, ProcessLookupError) as exc:
        raise MachineDeadError(f"process {pid} is gone", pid=pid) from exc
    except PermissionError as exc:
        raise TrackerUnavailableError(
            f"the mappings of process {pid} may not be read: {exc}", pid=pid
        ) from exc
    if not lines:
        raise MachineDeadError(f"process {pid} has no memory any more", pid=pid)
    found = []
    # A hypervisor has hundreds of mappings, and a guest's pause may wait for this.
    number = f" {status.st_ino} "
    for match in filter(None, (_MAPS_LINE.match(line) for line in lines if number in line)):
        if (int(match["major"], 16), int(match["minor"], 16), int(match["inode"])) == wanted:
            start, end, offset = (int(match[key], 16) for key in ("start", "end", "offset"))
            found.append(_Piece(start, end, offset, match["sharing"] == "s"))
    return found


def find_mapping(pid: int, region: Region) -> MappedRegion:
    """Find where process ``pid`` maps the whole of ``region``, shared and exactly once.

    The kernel lists a mapping in several pieces when parts of it have different advice; pieces without a gap
    count as one.

    Raises:
        MachineDeadError: the process is gone.
        TrackerUnavailableError: not mapped, mapped privately, in part, or more than once (a write through the
            other mapping would not be seen).
    """
    where = f"RAM region {region.name} ({region.path}) in process {pid}"
    pieces = _pieces(pid, region.path)
    if not pieces:
        raise TrackerUnavailableError(f"{where} is not mapped", pid=pid, region=region.name)
    if not all(piece.shared for piece in pieces):
        raise TrackerUnavailableError(
            f"{where} is a private mapping: what the machine writes is not in the file",
            remedy="Start the machine with share=on for its memory.",
            pid=pid,
            region=region.name,
        )
    address = pieces[0].start
    expected = 0
    for piece in pieces:
        if piece.offset != expected or piece.start != address + expected:
            raise TrackerUnavailableError(
                f"{where} is mapped more than once or with a gap at {expected:#x}",
                pid=pid,
                region=region.name,
            )
        expected += piece.end - piece.start
    if expected < region.size_bytes:
        raise TrackerUnavailableError(
            f"{where} is mapped only in part: {expected} of {region.size_bytes} bytes",
            pid=pid,
            region=region.name,
        )
    return MappedRegion(region, pid, address, huge=path_page_bytes(region.path) > 0)


def data_runs(fd: int, size_bytes: int) -> PageRuns:
    """The pages of a file's first ``size_bytes`` that are not holes; pages in holes read as zero."""
    runs = PageRuns()
    position = 0
    while position < size_bytes:
        try:
            start = os.lseek(fd, position, os.SEEK_DATA)
        except OSError as exc:
            if exc.errno == errno.ENXIO:
                break
            raise
        if start >= size_bytes:
            break
        position = min(os.lseek(fd, start, os.SEEK_HOLE), size_bytes)
        first = start // PAGE_SIZE
        runs.add(first, -(-position // PAGE_SIZE) - first)
    return runs


class RamFile:
    """An open RAM file; reads and writes whole pages by run."""

    def __init__(self, fd: int, path: Path, size_bytes: int) -> None:
        self._fd = fd
        self.path = path
        self.size_bytes = size_bytes
        self.page_count = size_bytes // PAGE_SIZE
        self._huge_page_bytes = file_page_bytes(fd)

    @classmethod
    def open(cls, path: Path, size_bytes: int, *, writable: bool = False) -> Self:
        """Open the RAM file of a machine that exists.

        Raises:
            MachineFailedError: there is no such file, or it is smaller than ``size_bytes``.
        """
        try:
            fd = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
        except OSError as exc:
            raise MachineFailedError(f"RAM file {path} cannot be opened: {exc.strerror}", path=path) from exc
        actual = os.fstat(fd).st_size
        if actual < size_bytes:
            os.close(fd)
            raise MachineFailedError(f"RAM file {path} has {actual} bytes, not {size_bytes}", path=path)
        return cls(fd, path, size_bytes)

    @classmethod
    def create(cls, path: Path, size_bytes: int) -> Self:
        """Make a new RAM file, all zero, that only this user may open; it must not exist yet."""
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, size_bytes)
        except OSError as exc:
            os.close(fd)
            path.unlink()
            raise InsufficientMemoryError(
                f"RAM file {path} cannot have {size_bytes} bytes: {exc.strerror}"
            ) from exc
        return cls(fd, path, size_bytes)

    def fileno(self) -> int:
        """The descriptor, for calls that need one."""
        return self._fd

    def close(self) -> None:
        """Close the file; more than once does no harm."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read_pages(self, runs: Sequence[tuple[int, int]], into: memoryview | bytearray) -> int:
        """Read the pages of ``runs``, one behind the other, into ``into``; returns the bytes read."""
        position = 0
        with memoryview(into) as view:
            for offset, length in self._spans(runs, len(view)):
                self._read(view[position : position + length], offset)
                position += length
        return position

    def is_zero(self, runs: Sequence[tuple[int, int]]) -> bool:
        """Whether the pages of ``runs`` hold nothing but zeros, by their bytes.

        What holds something else nearly always does so in its first page, so that asking costs next to nothing. The
        rest is looked at in pieces, which stay in the processor's cache.
        """
        spans = self._spans(runs, self.size_bytes)
        return self._is_zero(spans[0][0], PAGE_SIZE) and all(
            self._is_zero(offset + at, min(PIECE_BYTES, length - at))
            for offset, length in spans
            for at in range(0, length, PIECE_BYTES)
        )

    def _is_zero(self, offset: int, length: int) -> bool:
        buffer = _thread_buffer()
        with memoryview(buffer) as view:
            self._read(view[:length], offset)
        # Compared where it lies: a view is compared byte by byte, and a copy is one more.
        return buffer.startswith(_ZEROS[:length])

    def _read(self, into: memoryview, offset: int) -> None:
        done = 0
        while done < len(into):
            count = os.preadv(self._fd, [into[done:]], offset + done)
            if not count:
                raise MachineFailedError(f"RAM file {self.path} ends at {offset + done}", path=self.path)
            done += count

    def write_pages(self, runs: Sequence[tuple[int, int]], data: memoryview) -> None:
        """Write ``data``, which holds the pages of ``runs`` one behind the other."""
        spans = self._filled(runs, data)
        if self._huge_page_bytes:
            with _out_of_memory(self.path):
                write_spans(self._fd, self._huge_page_bytes, spans, data)
            return
        position = 0
        for offset, length in spans:
            self._write(data[position : position + length], offset)
            position += length

    def put(self, runs: Sequence[tuple[int, int]], data: memoryview, back: memoryview) -> Iterator[int]:
        """Write ``data`` as :meth:`write_pages` does, and read what memory holds then, piece by piece, into ``back``.

        Yields how many pages lie there; all pieces have to be asked for. A few of them at a time, such as 32, stay
        in the processor's cache between the two.
        """
        spans = self._filled(runs, data)
        if self._huge_page_bytes:
            self.write_pages(runs, data)
        position = 0
        for offset, length in spans:
            for at in range(0, length, len(back)):
                size = min(len(back), length - at)
                if not self._huge_page_bytes:
                    self._write(data[position : position + size], offset + at)
                position += size
                self._read(back[:size], offset + at)
                yield size // PAGE_SIZE

    def _filled(self, runs: Sequence[tuple[int, int]], data: memoryview) -> list[tuple[int, int]]:
        spans = self._spans(runs, len(data))
        if sum(length for _, length in spans) != len(data):
            raise ChunkRejectedError(f"the runs do not fill {len(data)} bytes", path=self.path)
        return spans

    def _write(self, data: memoryview, offset: int) -> None:
        done = 0
        while done < len(data):
            with _out_of_memory(self.path):
                done += os.pwrite(self._fd, data[done:], offset + done)

    def _spans(self, runs: Sequence[tuple[int, int]], room: int) -> list[tuple[int, int]]:
        """Offset and length of each run in bytes; refuses runs outside the region or without room."""
        spans: list[tuple[int, int]] = []
        for first, count in runs:
            if first < 0 or count < 1 or first + count > self.page_count:
                raise ChunkRejectedError(
                    f"{count} pages at {first} lie outside a region of {self.page_count} pages",
                    path=self.path,
                )
            room -= count * PAGE_SIZE
            spans.append((first * PAGE_SIZE, count * PAGE_SIZE))
        if room < 0:
            raise ChunkRejectedError(f"the buffer is {-room} bytes too small for its runs", path=self.path)
        return spans

    def reserve(self, offset: int, length: int) -> None:
        """Have the kernel set memory aside for a part of the file.

        Raises:
            InsufficientMemoryError: there is not that much.
        """
        with _out_of_memory(self.path):
            os.posix_fallocate(self._fd, offset, length)

    def reserve_warm(self, offset: int, length: int) -> None:
        """The same for a part that nobody has used yet, with memory that was touched a moment ago.

        Where this host is a virtual machine itself, its memory comes into being when it is touched, and whoever does
        that waits for it. So zeros are written, given back, and set aside again: the kernel hands out first what it
        got back last. Kept as written, they would count as data, and have to be looked through when a machine leaves.

        Raises:
            InsufficientMemoryError: there is not that much.
        """
        if not self._huge_page_bytes:  # to set huge pages aside is to touch them
            for at in range(offset, offset + length, PIECE_BYTES):
                self._write(memoryview(_ZEROS)[: min(PIECE_BYTES, offset + length - at)], at)
            self.punch(offset // PAGE_SIZE, length // PAGE_SIZE)
        self.reserve(offset, length)

    def punch(self, first_page: int, count: int) -> None:
        """Make pages zero again and give their memory back."""
        for offset, length in self._spans([(first_page, count)], count * PAGE_SIZE):
            if _libc.fallocate(self._fd, _PUNCH_HOLE | _KEEP_SIZE, offset, length):
                code = ctypes.get_errno()
                raise OSError(code, os.strerror(code), str(self.path))

    def data_runs(self) -> PageRuns:
        """The pages that are not holes."""
        return data_runs(self._fd, self.size_bytes)

    @property
    def allocated_bytes(self) -> int:
        """How much memory the file occupies."""
        return os.fstat(self._fd).st_blocks * 512


def _thread_buffer() -> bytearray:
    """A buffer of this thread for a piece."""
    buffer: bytearray | None = getattr(_THREAD, "buffer", None)
    if buffer is None:
        buffer = _THREAD.buffer = bytearray(PIECE_BYTES)
    return buffer


@contextmanager
def _out_of_memory(path: Path) -> Iterator[None]:
    """Turn the kernel's "no space" of a memory file system into the error that callers know."""
    try:
        yield
    except OSError as exc:
        if exc.errno not in (errno.ENOSPC, errno.ENOMEM, errno.EDQUOT):
            raise
        raise InsufficientMemoryError(
            f"no memory left for RAM file {path}: {exc.strerror}", path=path
        ) from exc
