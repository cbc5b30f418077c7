"""Which journals a host has and how far each was on disk, kept apart from them.

A journal can say that its end is torn; it cannot say that it is missing, cut behind a record, or an older copy of
itself. The register can: it has an entry for each journal, on disk before the journal's first record, with the
number and hash of a slot that was on disk. Noting a later slot costs one write to the page cache and waits for
nothing, so an entry may be behind its journal and is never ahead of it.

Layout: entries of 1024 bytes. The first is the header: the incarnation of this journal directory, and which file this
very file is, so that a copy of it is not believed. Each other entry holds its mark twice, and only the older one is
overwritten.

Promise: a mark that is given is of a slot that was on disk in this directory; what cannot be read raises
:class:`JournalDamagedError`. Nothing here ever makes a journal believed that would not be without it.
Any thread may ask.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vmferry.errors import JournalDamagedError
from vmferry.handoff.disk import Disk, File, damaging

ENTRY_BYTES: Final = 1024
_COPY_BYTES: Final = ENTRY_BYTES // 2
_DIGEST_BYTES: Final = 32
_TITLE: Final = "vmferry register 1"
_MAGIC: Final = b"VMFM"
_MARK: Final = struct.Struct("<4sQ32s64s")


@dataclass(frozen=True, order=True)
class Mark:
    """A slot of a journal that was on disk."""

    slots: int
    """Number of slots up to it, the label included."""
    last_hash: bytes

    def contradiction(self, hashes: tuple[bytes, ...]) -> str:
        """Why a journal with these slots is not the one that was marked; empty if it may be."""
        if len(hashes) < self.slots:
            return f"{self.slots - len(hashes)} records that were on disk are gone"
        if hashes[self.slots - 1] != self.last_hash:
            return f"slot {self.slots - 1} is not the one that was on disk"
        return ""


class Register:
    """The register of one journal directory; made with a new incarnation if it is missing."""

    def __init__(self, directory: Path, disk: Disk) -> None:
        self._path = directory / "register"
        self._disk = disk
        self._offsets: dict[str, int] = {}
        self._scanned = ENTRY_BYTES
        self._scanning = threading.Lock()
        """Two threads that take in the same entries would each move on behind them, and so past the next ones."""
        with damaging("use", self._path):
            if not disk.exists(self._path):
                _make(self._path, disk, earlier_incarnation(directory, disk) or str(uuid.uuid4()))
            with contextlib.closing(disk.open(self._path)) as file:
                self.incarnation = self._header(file)
            # It may have been made by a process that was killed before its name was on disk.
            disk.sync_folder(directory)
            disk.sync_folder(directory.parent)

    def names(self) -> list[str]:
        """All journals that have an entry."""
        with self._opened() as file:
            self._scan(file)
        return list(self._offsets)

    def mark(self, name: str) -> Mark | None:
        """How far a journal was on disk at least; ``None`` if it has had no record yet."""
        with self._opened() as file:
            if name not in self._offsets:
                self._scan(file)
            return max(self._marks(file, name)) if name in self._offsets else None

    def add(self, name: str, mark: Mark) -> None:
        """Make an entry; it is on disk on return."""
        with self._locked(), self._opened(writable=True) as file:
            self._scan(file)
            if name not in self._offsets:
                # Behind all that are whole or half readable; what a crash left of another is overwritten.
                offset = max(self._scanned, len(file.read()) // ENTRY_BYTES * ENTRY_BYTES)
                file.write(_encode(name, mark) * 2, offset)
                file.sync_data()
                self._offsets[name] = offset

    def note(self, name: str, mark: Mark, *, settled: bool = False) -> None:
        """Move a journal's mark on, for a slot that is on disk already.

        Waits for no disk, unless it shall be ``settled``: the entry may have been left by a process that was killed,
        or failed, before it was on disk.
        """
        with self._opened(writable=True) as file:
            first, second = self._marks(file, name)
            behind = self._offsets[name] + (0 if first <= second else _COPY_BYTES)
            file.write(_encode(name, mark), behind)
            if settled:
                file.sync_data()

    @contextlib.contextmanager
    def _opened(self, *, writable: bool = False) -> Iterator[File]:
        with (
            damaging("use", self._path),
            contextlib.closing(self._disk.open(self._path, writable=writable)) as file,
        ):
            if self._header(file) != self.incarnation:
                raise self._damaged("was replaced by another one")
            yield file

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        path = self._path.with_suffix(".lock")
        with damaging("lock", path):
            lock = self._disk.lock(path, wait=True)
        with contextlib.closing(lock):
            yield

    def _header(self, file: File) -> str:
        data = file.read(0, ENTRY_BYTES)
        body, digest = data[:-_DIGEST_BYTES], data[-_DIGEST_BYTES:]
        lines = body.rstrip(b"\0").decode("ascii", errors="replace").split("\n")
        if hashlib.sha256(body).digest() != digest or lines[0] != _TITLE:
            raise self._damaged("has no readable header")
        if lines[2] != file.identity():
            raise self._damaged("was copied or restored from elsewhere, and the journals beside it with it")
        return lines[1]

    def _scan(self, file: File) -> None:
        """Take in the entries that were added since.

        A bad one with others behind it is none: its writer failed, or it rotted, and its journal is not believed.
        """
        with self._scanning:
            while data := file.read(self._scanned, ENTRY_BYTES):
                found = [_decode(data[:_COPY_BYTES]), _decode(data[_COPY_BYTES:])]
                names = {mark[0] for mark in found if mark is not None}
                if not names and not file.read(self._scanned + ENTRY_BYTES, 1):
                    return  # another process may be about to write it
                self._offsets.update(dict.fromkeys(names, self._scanned))
                self._scanned += ENTRY_BYTES

    def _marks(self, file: File, name: str) -> tuple[Mark, Mark]:
        offset = self._offsets[name]
        data = file.read(offset, ENTRY_BYTES)
        found = [_decode(data[:_COPY_BYTES]), _decode(data[_COPY_BYTES:])]
        marks = [mark[1] for mark in found if mark is not None and mark[0] == name]
        if not marks:
            raise self._damaged(f"has a bad entry at {offset}")
        # A crash may have torn one of them, which then is the one to be overwritten.
        torn = Mark(0, b"")
        first, second = (mark[1] if mark is not None and mark[0] == name else torn for mark in found)
        return first, second

    def _damaged(self, why: str) -> JournalDamagedError:
        return JournalDamagedError(f"{self._path} {why}", path=self._path)


def earlier_incarnation(directory: Path, disk: Disk) -> str:
    """What the release before kept instead of a register; empty where that has never been, or was taken over."""
    path = directory / "incarnation"
    if not disk.exists(path):
        return ""
    with contextlib.closing(disk.open(path)) as file:
        return file.read().decode("ascii", errors="replace").strip()


def _make(path: Path, disk: Disk, incarnation: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with contextlib.closing(disk.create(temporary)) as file:
        text = f"{_TITLE}\n{incarnation}\n{file.identity()}\n".encode("ascii")
        body = text.ljust(ENTRY_BYTES - _DIGEST_BYTES, b"\0")
        file.write(body + hashlib.sha256(body).digest(), 0)
        file.sync()
    try:
        with contextlib.suppress(FileExistsError):
            disk.link(temporary, path)  # fails if somebody was faster
    finally:
        disk.unlink(temporary)


def _encode(name: str, mark: Mark) -> bytes:
    packed = _MARK.pack(_MAGIC, mark.slots, mark.last_hash, name.encode("ascii"))
    body = packed.ljust(_COPY_BYTES - _DIGEST_BYTES, b"\0")
    return body + hashlib.sha256(body).digest()


def _decode(data: bytes) -> tuple[str, Mark] | None:
    body, digest = data[:-_DIGEST_BYTES], data[-_DIGEST_BYTES:]
    if hashlib.sha256(body).digest() != digest:
        return None
    magic, slots, last_hash, name = _MARK.unpack_from(body)
    return (name.rstrip(b"\0").decode("ascii"), Mark(slots, last_hash)) if magic == _MAGIC else None
