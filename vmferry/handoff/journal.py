"""An append-only file of what was decided about one machine in one role; the only memory that survives a crash.

Format: slots of 4096 bytes in a preallocated file, so that a record is one sector and ``fdatasync`` needs no
metadata. A slot is magic, format version, length, sequence number, the hash of the previous slot, the payload,
and a SHA-256 over all that. The first slot names machine and role, so that a swapped or foreign file is noticed.

Promise: :meth:`Journal.append` with ``durable`` returns only when the record is on disk; so does opening a journal
with what was read. At most the last record is not on disk, so a crash leaves no hole. Reading gives a prefix of
what was appended, or says why it cannot be trusted: a bad slot with something valid behind it is *damage*; a bad
slot at the very end, or a file cut short, is a *torn tail* (an append that was not finished, or its record rotted:
the reader cannot know, so a source with an open attempt must ask the destination before it acts alone). An error
of the disk while writing is never retried: the journal refuses every further append.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from vmferry.errors import JournalDamagedError
from vmferry.handoff.disk import DISK, Disk, File, damaging

SLOT_BYTES: Final = 4096
SLOTS_PER_EXTENT: Final = 64
_MAGIC: Final = b"VMFJ"
_VERSION: Final = 1
_HEADER: Final = struct.Struct("<4sHHQ32s")
_HASH_BYTES: Final = 32
MAX_PAYLOAD_BYTES: Final = SLOT_BYTES - _HEADER.size - _HASH_BYTES
_EMPTY: Final = bytes(SLOT_BYTES)
_EXTENT_BYTES: Final = SLOT_BYTES * SLOTS_PER_EXTENT
_RESERVE_SLOTS: Final = 8
"""More than any attempt still has to write."""


@dataclass(frozen=True)
class Contents:
    """What a journal file says."""

    payloads: tuple[bytes, ...] = ()
    torn_tail: bool = False
    damage: str = ""
    sync_failed: bool = False
    """It may not be on disk, and another sync would prove nothing."""
    last_hash: bytes = field(default=bytes(_HASH_BYTES), repr=False)
    hashes: tuple[bytes, ...] = field(default=(), repr=False, compare=False)
    """Of all slots that were read, the label's included."""


def read(path: Path, label: bytes, *, settled: bool = False, known: int = 0, disk: Disk = DISK) -> Contents:
    """Read a journal without changing what it says; a missing file reads as empty.

    With ``settled`` everything returned is on disk. Its writer may be between write and sync, or have been killed
    there, or have failed to sync: then the kernel calls the page clean, tells nobody again, and a sync by another
    process would prove nothing. So the last slot is written again as it is, and synced; it may already have another
    one behind it. Where as many are ``known`` to be on disk, nothing is brought there, and no pause waits for it.
    """
    try:
        opened = disk.open(path, writable=settled)
    except FileNotFoundError:
        return Contents()
    with contextlib.closing(opened) as file:
        data = file.read()
        contents = _contents(data, path, label)
        slots = len(contents.hashes)
        if settled and slots > known:
            try:
                last = (slots - 1) * SLOT_BYTES
                file.write(data[last : last + SLOT_BYTES], last)
                file.sync_data()
            except OSError as error:
                return Contents(damage=f"{path.name} cannot be synced: {error}", sync_failed=True)
    return contents


def salvage(path: Path, disk: Disk = DISK) -> tuple[bytes, ...] | None:
    """The payloads before the first bad slot, the label's first, whoever wrote them; ``None`` without a file.

    For people to read: nothing may be concluded from it.
    """
    try:
        opened = disk.open(path)
    except FileNotFoundError:
        return None
    with contextlib.closing(opened) as file:
        data = file.read()
    return _read_slots(data).payloads


def _slots(data: bytes, start: int = 0) -> Iterator[bytes]:
    """The slots from a place on."""
    for at in range(start, len(data), SLOT_BYTES):
        yield data[at : at + SLOT_BYTES].ljust(SLOT_BYTES, b"\0")


def _contents(data: bytes, path: Path, label: bytes) -> Contents:
    contents = _read_slots(data)
    if contents.payloads and contents.payloads[0] != label:
        return Contents(damage=f"{path.name} belongs to another machine, role or host")
    if not contents.payloads:
        # The first slot is on disk before the file gets its name, so a file without it was not left by us.
        return Contents(damage=contents.damage or f"{path.name} has no readable first slot")
    # The file grows by whole extents before they are used; one that was cut short may have lost records.
    torn = contents.torn_tail or len(data) % _EXTENT_BYTES != 0
    return replace(contents, payloads=contents.payloads[1:], torn_tail=torn)


def _read_slots(data: bytes) -> Contents:
    payloads: list[bytes] = []
    hashes: list[bytes] = []
    torn_tail, damage = False, ""
    for number, slot in enumerate(_slots(data)):
        payload = _decode(slot, number, hashes[-1] if hashes else bytes(_HASH_BYTES))
        if payload is None:
            at = number * SLOT_BYTES
            if data[at:] == bytes(len(data) - at):
                break  # as almost always, and fast: a guest's pause waits for it
            rest = list(_slots(data, at + SLOT_BYTES))
            if any(_is_slot(later) for later in rest):
                damage = f"slot {number} is bad, later ones are not"
            elif any(later != _EMPTY for later in rest):
                damage = f"garbage behind slot {number}"
            else:
                torn_tail = slot != _EMPTY
            break
        payloads.append(payload)
        hashes.append(slot[-_HASH_BYTES:])
    last_hash = hashes[-1] if hashes else bytes(_HASH_BYTES)
    return Contents(tuple(payloads), torn_tail, damage, last_hash=last_hash, hashes=tuple(hashes))


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

    def __init__(self, path: Path, label: bytes, disk: Disk = DISK) -> None:
        self.path = path
        self._broken = ""
        with damaging("open", path):
            if not disk.exists(path):
                _create(path, label, disk)
            self._file: File = disk.open(path, writable=True)
        try:
            self._settle(label, disk)
        except BaseException:
            self.close()
            raise

    def _settle(self, label: bytes, disk: Disk) -> None:
        data = self._file.read()
        contents = _contents(data, self.path, label)
        if contents.damage:
            raise JournalDamagedError(f"{self.path}: {contents.damage}", path=self.path)
        self.contents = contents
        self.torn_tail = contents.torn_tail
        self._previous = contents.last_hash
        self._count = len(contents.payloads) + 1
        self._slots = max(len(data) // SLOT_BYTES, self._count)
        # The last record may exist in the page cache only: its writer was killed before the sync, or the sync
        # failed and the kernel called the page clean. Written again and synced, it may be believed.
        last = (self._count - 1) * SLOT_BYTES
        with self._breaking("settle"):
            self._file.write(data[last : last + SLOT_BYTES], last)
            self._file.sync_data()
            # Its maker may have been killed before the file's name was on disk, or that of its new folder.
            disk.sync_folder(self.path.parent)
            disk.sync_folder(self.path.parent.parent)
        self._synced = self._count

    @property
    def end(self) -> tuple[int, bytes]:
        """How many slots there are, and the hash of the last one."""
        return self._count, self._previous

    def append(self, payload: bytes, *, durable: bool) -> None:
        """Add one record; when ``durable`` it is on disk on return.

        Raises:
            JournalDamagedError: the disk failed now or before; nothing may be concluded from this file any more.
        """
        if len(payload) > MAX_PAYLOAD_BYTES:
            raise ValueError(f"a record has at most {MAX_PAYLOAD_BYTES} bytes")
        slot = _encode(self._count, self._previous, payload)
        self.sync()
        with self._breaking("write"):
            if self._count >= self._slots or self._slots % SLOTS_PER_EXTENT:
                self._allocate()
                self._fill()
            self._file.write(slot, self._count * SLOT_BYTES)
            if durable:
                self._file.sync_data()
        self._count += 1
        if durable:
            self._synced = self._count
        self._previous = slot[-_HASH_BYTES:]
        self.torn_tail = False

    def sync(self) -> None:
        """Bring a record that was not appended as durable to disk, as the next append would have to.

        Called beside other work, it takes that wait off the critical path; callable from another thread.
        """
        count = self._count
        with self._breaking("sync"):
            if self._synced < count:
                self._file.sync_data()
                self._synced = max(self._synced, count)

    def probe(self) -> None:
        """Check that the records to come could be written: space for them, and a sync that works.

        Raises:
            JournalDamagedError: they could not. Where only space is missing, the journal itself goes on.
        """
        with self._breaking("sync"):
            self._file.sync_data()
            self._synced = self._count
        if self._count + _RESERVE_SLOTS > self._slots:
            try:
                self._allocate()
            except OSError as error:
                raise JournalDamagedError(f"cannot extend {self.path}: {error}", path=self.path) from error
            with self._breaking("extend"):
                self._fill()

    def _allocate(self) -> None:
        self._file.allocate(self._slots * SLOT_BYTES, _to_next_extent(self._slots))

    def _fill(self) -> None:
        # Written zeros, not only allocated blocks: a later record then changes no metadata of the file system.
        missing = _to_next_extent(self._slots)
        self._file.write(bytes(missing), self._slots * SLOT_BYTES)
        self._file.sync()
        self._slots += missing // SLOT_BYTES

    @contextlib.contextmanager
    def _breaking(self, what: str) -> Iterator[None]:
        """After a failed write or sync the kernel may call lost pages clean: trying again would prove nothing."""
        if self._broken:
            raise JournalDamagedError(f"{self.path} failed before: {self._broken}", path=self.path)
        try:
            yield
        except OSError as error:
            self._broken = f"cannot {what}: {error}"
            raise JournalDamagedError(f"cannot {what} {self.path}: {error}", path=self.path) from error

    def give_up(self, why: str) -> None:
        """Something beside this file failed: no record may follow until somebody has read it anew."""
        self._broken = self._broken or why

    def close(self) -> None:
        """Give the file back; safe to call twice."""
        self._file.close()


def _create(path: Path, label: bytes, disk: Disk) -> None:
    """Make a journal whose first slot is on disk before the file has its name."""
    temporary = path.with_suffix(f".{os.getpid()}.new")
    try:
        with damaging("create", path), contextlib.closing(disk.create(temporary)) as file:
            file.allocate(0, _EXTENT_BYTES)
            file.write(_encode(0, bytes(_HASH_BYTES), label).ljust(_EXTENT_BYTES, b"\0"), 0)
            file.sync()
    except JournalDamagedError:
        with contextlib.suppress(OSError):
            disk.unlink(temporary)
        raise
    disk.rename(temporary, path)


def _to_next_extent(slots: int) -> int:
    """Bytes from the end of ``slots`` to the end of the extent that begins or goes on there."""
    return _EXTENT_BYTES - slots * SLOT_BYTES % _EXTENT_BYTES
