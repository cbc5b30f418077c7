"""An append-only file of what was decided about one machine in one role; the only memory that survives a crash.

Format: slots of 4096 bytes in a preallocated file, so that a record is one sector and ``fdatasync`` needs no
metadata. A slot is magic, format version, length, sequence number, the hash of the previous slot, the payload,
and a SHA-256 over all that. The first slot names machine and role, so that a swapped or foreign file is noticed.

Promise: :meth:`Journal.append` with ``durable`` returns only when the record is on disk. Reading gives a prefix
of what was appended, or says why it cannot be trusted: a bad slot with something valid behind it is *damage*; a
bad slot at the very end is a *torn tail* (an append that was not finished, or its record rotted: the reader
cannot know, so a source with an open attempt must ask the destination before it acts alone). An error of the
disk while writing is never retried: the journal refuses every further append.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from vmferry.errors import JournalDamagedError

SLOT_BYTES: Final = 4096
SLOTS_PER_EXTENT: Final = 64
_MAGIC: Final = b"VMFJ"
_VERSION: Final = 1
_HEADER: Final = struct.Struct("<4sHHQ32s")
_HASH_BYTES: Final = 32
MAX_PAYLOAD_BYTES: Final = SLOT_BYTES - _HEADER.size - _HASH_BYTES
_EMPTY: Final = bytes(SLOT_BYTES)


@dataclass(frozen=True)
class Contents:
    """What a journal file says."""

    payloads: tuple[bytes, ...] = ()
    torn_tail: bool = False
    damage: str = ""
    last_hash: bytes = field(default=bytes(_HASH_BYTES), repr=False)


def read(path: Path, label: bytes) -> Contents:
    """Read a journal without changing it; a missing file reads as empty."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return Contents()
    slots = [data[at : at + SLOT_BYTES].ljust(SLOT_BYTES, b"\0") for at in range(0, len(data), SLOT_BYTES)]
    contents = _read_slots(slots)
    if contents.payloads and contents.payloads[0] != label:
        return Contents(damage=f"{path.name} belongs to another machine or role")
    if not contents.payloads:
        # The first slot is on disk before the file gets its name, so a file without it was not left by us.
        return Contents(damage=contents.damage or f"{path.name} has no readable first slot")
    return Contents(contents.payloads[1:], contents.torn_tail, contents.damage, contents.last_hash)


def _read_slots(slots: Sequence[bytes]) -> Contents:
    payloads: list[bytes] = []
    previous = bytes(_HASH_BYTES)
    for number, slot in enumerate(slots):
        payload = _decode(slot, number, previous)
        if payload is None:
            rest = slots[number + 1 :]
            if any(_is_slot(later) for later in rest):
                return Contents(
                    tuple(payloads), damage=f"slot {number} is bad, later ones are not", last_hash=previous
                )
            if any(later != _EMPTY for later in rest):
                return Contents(tuple(payloads), damage=f"garbage behind slot {number}", last_hash=previous)
            return Contents(tuple(payloads), torn_tail=slot != _EMPTY, last_hash=previous)
        payloads.append(payload)
        previous = slot[-_HASH_BYTES:]
    return Contents(tuple(payloads), last_hash=previous)


def _encode(number: int, previous: bytes, payload: bytes) -> bytes:
    head = _HEADER.pack(_MAGIC, _VERSION, len(payload), number, previous) + payload
    body = head.ljust(SLOT_BYTES - _HASH_BYTES, b"\0")
    return body + hashlib.sha256(body).digest()


def _is_slot(slot: bytes) -> bool:
    body, digest = slot[:-_HASH_BYTES], slot[-_HASH_BYTES:]
    return slot[:4] == _MAGIC and hashlib.sha256(body).digest() == digest


def _decode(slot: bytes, number: int, previous: bytes) -> bytes | None:
    if not _is_slot(slot):
        return None
    _, version, length, sequence, chained = _HEADER.unpack_from(slot)
    if version != _VERSION or sequence != number or chained != previous or length > MAX_PAYLOAD_BYTES:
        return None
    return slot[_HEADER.size : _HEADER.size + length]


class Journal:
    """One journal file, open for appending by the one process that holds its role's lock."""

    def __init__(self, path: Path, label: bytes) -> None:
        self.path = path
        self._label = label
        self._broken = ""
        contents = read(path, label)
        if contents.damage:
            raise JournalDamagedError(f"{path}: {contents.damage}", path=path)
        self.torn_tail = contents.torn_tail
        self._count = len(contents.payloads) + 1
        self._previous = contents.last_hash
        self._slots = 0
        if not path.exists():
            self._create()
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._slots = os.fstat(self._fd).st_size // SLOT_BYTES

    def _create(self) -> None:
        first = _encode(0, bytes(_HASH_BYTES), self._label)
        temporary = self.path.with_suffix(f".{os.getpid()}.new")
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            _preallocate(fd, 0)
            _write_all(fd, first, 0)
            os.fsync(fd)
        finally:
            os.close(fd)
        temporary.rename(self.path)
        _sync_directory(self.path.parent)
        self._previous = first[-_HASH_BYTES:]

    def append(self, payload: bytes, *, durable: bool) -> None:
        """Add one record; when ``durable`` it is on disk on return.

        Raises:
            JournalDamagedError: the disk failed now or before; nothing may be concluded from this file any more.
        """
        if self._broken:
            raise JournalDamagedError(f"{self.path} failed before: {self._broken}", path=self.path)
        if len(payload) > MAX_PAYLOAD_BYTES:
            raise ValueError(f"a record has at most {MAX_PAYLOAD_BYTES} bytes")
        slot = _encode(self._count, self._previous, payload)
        try:
            if self._count >= self._slots:
                _preallocate(self._fd, self._slots)
                os.fsync(self._fd)
                self._slots += SLOTS_PER_EXTENT
            _write_all(self._fd, slot, self._count * SLOT_BYTES)
            if durable:
                os.fdatasync(self._fd)
        except OSError as error:
            # After a failed sync the kernel may call lost pages clean: trying again would prove nothing.
            self._broken = str(error)
            raise JournalDamagedError(f"cannot write {self.path}: {error}", path=self.path) from error
        self._count += 1
        self._previous = slot[-_HASH_BYTES:]
        self.torn_tail = False

    def probe(self) -> None:
        """Check that a further record could be written: space for it, and a sync that works."""
        if self._broken:
            raise JournalDamagedError(f"{self.path} failed before: {self._broken}", path=self.path)
        try:
            if self._count + 8 > self._slots:
                _preallocate(self._fd, self._slots)
                self._slots += SLOTS_PER_EXTENT
            os.fsync(self._fd)
        except OSError as error:
            raise JournalDamagedError(f"cannot sync {self.path}: {error}", path=self.path) from error

    def close(self) -> None:
        """Give the file back; safe to call twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _preallocate(fd: int, slots: int) -> None:
    # Written zeros, not only allocated blocks: a later record then changes no metadata of the file system.
    os.posix_fallocate(fd, slots * SLOT_BYTES, SLOTS_PER_EXTENT * SLOT_BYTES)
    _write_all(fd, bytes(SLOTS_PER_EXTENT * SLOT_BYTES), slots * SLOT_BYTES)


def _write_all(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
