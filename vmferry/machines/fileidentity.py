"""Which file a description means on this host, and whether another host means the same one.

Promise: :func:`differences` is pure, and empty only if two hosts were shown to have the same file, not one of the
same name. A content's hash is remembered only for a file that did not change since, as the file system tells.

A file that is only read may be an equal copy: size and SHA-256 are compared. A disk that is written to, or is said to
be shared, must be the very same file: its number on its file system, its size, and a beacon beside it that one host
made and the other one sees. The boot of the kernel alone proves nothing: copies of a running virtual host share it.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import stat
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vmferry.machines.process import boot_id
from vmferry.machines.qemu.spec import DiskSpec, QemuSpec
from vmferry.v1.compatibility_pb2 import FileIdentity

MAX_HASHED_BYTES: Final = 8 * 1024**3
"""Larger files are not compared by content: it would take longer than a caller should wait."""

_STEP_BYTES: Final = 1024 * 1024
_REMEMBERED: Final = 256
_SETTLED_S: Final = 2.0
"""A file that was changed so recently may change again without another time stamp, so it is not remembered."""

Version = tuple[int, int, int, int, int]


@dataclass(frozen=True)
class HostFile:
    """A file of the host that a description names."""

    field: str
    path: Path
    disk: DiskSpec | None = None

    @property
    def must_be_same(self) -> bool:
        """Whether two hosts must have the very same file, and an equal one is not enough."""
        return self.disk is not None and (self.disk.shared or not self.disk.read_only)


def files_of(part: QemuSpec) -> list[HostFile]:
    """Every file that a description names."""
    disks = {f"{part.TABLE}disks[{number}].path": disk for number, disk in enumerate(part.disks)}
    return [HostFile(field, Path(path), disks.get(field)) for field, path in part.host_files().items()]


def identify(field: str, real: Path) -> FileIdentity:
    """What the file system tells about a file whose links were followed; raises OSError unless it is regular."""
    found = real.stat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError(0, "it is not a regular file")
    return FileIdentity(
        field=field,
        size_bytes=found.st_size,
        boot_id=boot_id(),
        device=found.st_dev,
        inode=found.st_ino,
    )


def differences(
    theirs: FileIdentity, mine: FileIdentity, *, beacon_problem: str, may_grow: bool
) -> list[str]:
    """What speaks against two hosts having the very same file, as phrases; empty if it is proven.

    Args:
        theirs: as the source tells it.
        mine: as this host sees it.
        beacon_problem: why the source's beacon is not seen here; empty if it is.
        may_grow: whether its size may have changed between the two looks at it.
    """
    if not theirs.inode:
        return ["the source does not say which file it has"]
    found = []
    if theirs.inode != mine.inode:
        found.append(f"it is file number {theirs.inode} at the source and {mine.inode} here")
    elif theirs.boot_id == mine.boot_id and theirs.device != mine.device:
        found.append(f"it lies on device {theirs.device:#x} at the source and {mine.device:#x} here")
    if theirs.size_bytes != mine.size_bytes and not may_grow:
        found.append(f"it has {theirs.size_bytes} bytes at the source and {mine.size_bytes} here")
    if beacon_problem:
        found.append(beacon_problem)
    return found


class Contents:
    """Hashes of files, one at a time, remembered for as long as they stay what they are."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._known: OrderedDict[Version, bytes] = OrderedDict()

    async def sha256(self, real: Path) -> bytes:
        """SHA-256 of a file; the event loop goes on meanwhile.

        Raises:
            OSError: it cannot be read, is larger than :data:`MAX_HASHED_BYTES`, or changes while it is read.
        """
        given_up = threading.Event()
        async with self._lock:  # the threads are needed for the journals too
            try:
                return await asyncio.to_thread(self._hashed, real, given_up)
            finally:
                given_up.set()

    def _hashed(self, real: Path, given_up: threading.Event) -> bytes:
        with os.fdopen(_open(real), "rb", buffering=0) as file:
            before = _version(file.fileno())
            if before in self._known:
                self._known.move_to_end(before)
                return self._known[before]
            digest, left = hashlib.sha256(), MAX_HASHED_BYTES
            while (part := file.read(min(_STEP_BYTES, left))) and not given_up.is_set():
                digest.update(part)
                left -= len(part)
            if given_up.is_set() or _version(file.fileno()) != before:
                raise OSError(0, "it changes while it is read")
            self._remember(before, os.fstat(file.fileno()), digest.digest())
            return digest.digest()

    def _remember(self, version: Version, found: os.stat_result, digest: bytes) -> None:
        if time.time() - max(found.st_mtime, found.st_ctime) > _SETTLED_S:
            self._known[version] = digest
            while len(self._known) > _REMEMBERED:
                self._known.popitem(last=False)


def _open(real: Path) -> int:
    descriptor = os.open(real, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    found = os.fstat(descriptor)
    if stat.S_ISREG(found.st_mode) and found.st_size <= MAX_HASHED_BYTES:
        return descriptor
    os.close(descriptor)
    raise OSError(0, f"only regular files of at most {MAX_HASHED_BYTES} bytes are compared by content")


def _version(descriptor: int) -> Version:
    found = os.fstat(descriptor)
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
