"""The disk as the journals use it: the few calls whose effects must survive a crash, and nothing else.

Promise: a :class:`Disk` does one call to the system, or fails with its ``OSError``; what is durable when is the
caller's business, so no call here syncs what it was not asked to. The journals reach the disk in no other way, which
is why they can be tried on a disk that loses everything a real one may lose.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final, Protocol

from vmferry.errors import JournalDamagedError

_AT_EMPTY_PATH: Final = 0x1000
_MAX_HANDLE_BYTES: Final = 128


class File(Protocol):
    """One open file."""

    def read(self, offset: int = 0, length: int = -1) -> bytes:
        """What the file holds from ``offset`` on, at most ``length`` bytes; to its end if negative."""

    def write(self, data: bytes, offset: int) -> None:
        """Write all of ``data``."""

    def allocate(self, offset: int, length: int) -> None:
        """Make sure that writing there will not lack space."""

    def sync_data(self) -> None:
        """Bring what was written, and the file's length, to disk."""

    def sync(self) -> None:
        """Bring everything about the file to disk."""

    def identity(self) -> str:
        """What tells this file from every other that was or will be on its file system, copies of it included."""

    def close(self) -> None:
        """Give the file back; safe to call twice."""


class Lock(Protocol):
    """Held until it is closed, or its process ends."""

    def close(self) -> None:
        """Let somebody else have it; safe to call twice."""


class Disk(Protocol):
    """A file system; every method fails with the ``OSError`` of the call it makes."""

    def open(self, path: Path, *, writable: bool = False) -> File:
        """A file that exists."""

    def create(self, path: Path) -> File:
        """A new, empty file that only its owner may read; an older one of that name is emptied."""

    def exists(self, path: Path) -> bool:
        """Whether there is something of this name."""

    def glob(self, folder: Path, pattern: str) -> Iterable[Path]:
        """What is below ``folder`` and fits ``pattern``."""

    def make_folder(self, path: Path) -> None:
        """Make a folder and those it lies in, unless they exist; only their owner may enter."""

    def rename(self, old: Path, new: Path) -> None:
        """Give a file another name; one that has it is replaced."""

    def link(self, old: Path, new: Path) -> None:
        """Give a file a second name; fails if there is something of that name."""

    def unlink(self, path: Path) -> None:
        """Remove a name."""

    def sync_folder(self, path: Path) -> None:
        """Bring the names in a folder to disk."""

    def lock(self, path: Path, *, wait: bool) -> Lock:
        """Lock a file, which is made if it is missing, against other processes; BlockingIOError if one has it."""


class HostFile:
    """A file of this host."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def read(self, offset: int = 0, length: int = -1) -> bytes:
        """See :class:`File`."""
        pieces, wanted = [], length if length >= 0 else max(0, os.fstat(self._fd).st_size - offset)
        while wanted > 0:
            piece = os.pread(self._fd, wanted, offset)
            if not piece:
                break
            pieces.append(piece)
            offset, wanted = offset + len(piece), wanted - len(piece)
        return b"".join(pieces)

    def write(self, data: bytes, offset: int) -> None:
        """See :class:`File`; short writes happen."""
        view = memoryview(data)
        while view:
            written = os.pwrite(self._fd, view, offset)
            view, offset = view[written:], offset + written

    def allocate(self, offset: int, length: int) -> None:
        """See :class:`File`."""
        os.posix_fallocate(self._fd, offset, length)

    def sync_data(self) -> None:
        """See :class:`File`."""
        os.fdatasync(self._fd)

    def sync(self) -> None:
        """See :class:`File`."""
        os.fsync(self._fd)

    def identity(self) -> str:
        """See :class:`File`."""
        return _handle(self._fd) or f"inode {os.fstat(self._fd).st_ino}"

    def close(self) -> None:
        """See :class:`File`."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class HostDisk:
    """The file systems of this host."""

    def open(self, path: Path, *, writable: bool = False) -> File:
        """See :class:`Disk`."""
        return HostFile(os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC))

    def create(self, path: Path) -> File:
        """See :class:`Disk`."""
        return HostFile(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600))

    def exists(self, path: Path) -> bool:
        """See :class:`Disk`."""
        return path.exists()

    def glob(self, folder: Path, pattern: str) -> Iterable[Path]:
        """See :class:`Disk`."""
        return folder.glob(pattern)

    def make_folder(self, path: Path) -> None:
        """See :class:`Disk`."""
        path.mkdir(mode=0o700, parents=True, exist_ok=True)

    def rename(self, old: Path, new: Path) -> None:
        """See :class:`Disk`."""
        old.rename(new)

    def link(self, old: Path, new: Path) -> None:
        """See :class:`Disk`."""
        os.link(old, new)

    def unlink(self, path: Path) -> None:
        """See :class:`Disk`."""
        path.unlink()

    def sync_folder(self, path: Path) -> None:
        """See :class:`Disk`."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def lock(self, path: Path, *, wait: bool) -> Lock:
        """See :class:`Disk`."""
        file = path.open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException:
            file.close()
            raise
        return file


DISK: Final[Disk] = HostDisk()


@contextlib.contextmanager
def damaging(what: str, path: Path) -> Iterator[None]:
    """Turn an error of the disk into the catalogue's: what is on it is not known any more."""
    try:
        yield
    except BlockingIOError:
        raise  # no error of the disk: another process has the lock
    except OSError as error:
        raise JournalDamagedError(f"cannot {what} {path}: {error}", path=path) from error


class _FileHandle(ctypes.Structure):
    """``struct file_handle`` of name_to_handle_at(2)."""

    _fields_ = (
        ("handle_bytes", ctypes.c_uint),
        ("handle_type", ctypes.c_int),
        ("f_handle", ctypes.c_ubyte * _MAX_HANDLE_BYTES),
    )


@functools.cache
def _name_to_handle_at() -> Any:
    return ctypes.CDLL(None, use_errno=True).name_to_handle_at


def _handle(fd: int) -> str:
    """The file's handle, which holds its number and generation; empty where the file system has none.

    JUSTIFICATION: Python does not offer name_to_handle_at(2), and nothing else tells a restored file from the one it
    was copied from: inode numbers are used again at once.
    SAFETY: the structure says how many bytes it has, the kernel writes no more, and both arguments live until the
    call has returned.
    """
    handle, mount = _FileHandle(_MAX_HANDLE_BYTES, 0), ctypes.c_int()
    if _name_to_handle_at()(fd, b"", ctypes.byref(handle), ctypes.byref(mount), _AT_EMPTY_PATH) != 0:
        return ""
    return f"handle {handle.handle_type} {bytes(handle.f_handle[: handle.handle_bytes]).hex()}"
