"""The journal's file: what was appended is read back as a prefix, or the reader is told that it cannot be trusted."""

from __future__ import annotations

import errno
import itertools
import os
import random
import resource
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.support import require
from vmferry.errors import JournalDamagedError
from vmferry.handoff import journal
from vmferry.handoff.journal import MAX_PAYLOAD_BYTES, SLOT_BYTES, SLOTS_PER_EXTENT, Contents, Journal

LABEL: Final = b"vmferry source of the tests"
SECTOR_BYTES: Final = 512


def payload(number: int) -> bytes:
    """A record of its own length and content."""
    return bytes((number + at) % 256 for at in range(40 + 97 * (number % 40)))


def filled(path: Path, count: int, *, start: int = 0, durable: bool = True) -> None:
    """Append ``count`` records."""
    log = Journal(path, LABEL)
    try:
        for number in range(start, start + count):
            log.append(payload(number), durable=durable)
    finally:
        log.close()


def slots_of(data: bytes) -> list[bytes]:
    """The slots of a file, the last one perhaps cut."""
    return [data[at : at + SLOT_BYTES] for at in range(0, len(data), SLOT_BYTES)]


def read(data: bytes) -> Contents:
    """What a file of this content says."""
    return journal._contents(data, Path("source.journal"), LABEL)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "source.journal"


@pytest.fixture
def three(path: Path) -> bytes:
    """The file of a journal of three records."""
    filled(path, 3)
    return path.read_bytes()


@pytest.fixture
def twelve(path: Path) -> bytes:
    """The file of a journal of twelve records."""
    filled(path, 12)
    return path.read_bytes()


def expected(count: int) -> tuple[bytes, ...]:
    return tuple(payload(number) for number in range(count))


@pytest.mark.parametrize("durable", [True, False])
def test_what_was_appended_is_read_back(path: Path, *, durable: bool) -> None:
    """Records come back complete and in order, over several openings, the longest and the empty one too."""
    filled(path, 3, durable=durable)
    filled(path, 4, start=3, durable=durable)
    log = Journal(path, LABEL)
    log.append(b"", durable=durable)
    log.append(bytes(MAX_PAYLOAD_BYTES), durable=durable)
    log.close()
    contents = journal.read(path, LABEL)
    assert contents.payloads == (*expected(7), b"", bytes(MAX_PAYLOAD_BYTES))
    assert not contents.torn_tail
    assert not contents.damage


def test_a_missing_file_reads_as_empty(path: Path) -> None:
    """Reading makes no file."""
    assert journal.read(path, LABEL) == Contents()
    assert not path.exists()


def test_a_record_is_one_slot_at_most(path: Path) -> None:
    """A longer one is refused before anything is written, and the journal goes on."""
    log = Journal(path, LABEL)
    with pytest.raises(ValueError, match=str(MAX_PAYLOAD_BYTES)):
        log.append(bytes(MAX_PAYLOAD_BYTES + 1), durable=True)
    log.append(b"next", durable=True)
    log.close()
    assert journal.read(path, LABEL).payloads == (b"next",)


def test_only_its_owner_may_read_the_file(path: Path) -> None:
    """The file is 0600 whatever the umask."""
    before = os.umask(0)
    try:
        filled(path, 1)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_the_file_grows_by_whole_extents(path: Path) -> None:
    """More records than an extent holds: all are kept, and the file is allocated ahead of them."""
    count = 2 * SLOTS_PER_EXTENT + 5
    filled(path, count, durable=False)
    assert journal.read(path, LABEL).payloads == expected(count)
    assert path.stat().st_size == 3 * SLOTS_PER_EXTENT * SLOT_BYTES


# Damage


def test_a_file_cut_at_any_byte_gives_a_prefix_and_is_not_certain(three: bytes) -> None:
    """Cut anywhere in its last two records, the file gives the whole records before, and says that it was cut."""
    for at in range(2 * SLOT_BYTES, 4 * SLOT_BYTES):
        contents = read(three[:at])
        whole = (at // SLOT_BYTES) - 1
        # A cut slot can only be whole if the bytes that are missing were zero.
        assert contents.payloads in (expected(whole), expected(whole + 1))
        assert contents.torn_tail
        assert not contents.damage


def test_an_append_cut_at_any_byte_is_a_torn_tail(three: bytes) -> None:
    """Written up to any byte of its last two slots, the file gives the records before and a torn tail at most."""
    empty = [bytes(SLOT_BYTES)] * 2
    for at in range(2 * SLOT_BYTES, 4 * SLOT_BYTES):
        contents = journal._read_slots([s.ljust(SLOT_BYTES, b"\0") for s in slots_of(three[:at])] + empty)
        whole = at // SLOT_BYTES
        assert contents.payloads[1:] in (expected(whole - 1), expected(whole))
        assert contents.torn_tail == (at % SLOT_BYTES > 0 and len(contents.payloads) == whole)
        assert not contents.damage


def flips(seed: int) -> Iterator[int]:
    """All bits of every header and hash, and some of what lies between."""
    chance = random.Random(seed)
    for slot in range(13):
        start, end = slot * SLOT_BYTES, (slot + 1) * SLOT_BYTES
        yield from range(start * 8, (start + 48) * 8)
        yield from range((end - 32) * 8, end * 8)
        yield from (chance.randrange((start + 48) * 8, (end - 32) * 8) for _ in range(40))


def test_any_flipped_bit_is_noticed(twelve: bytes) -> None:
    """One flipped bit in the last record is a torn tail, in any other damage; no record changes or appears."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    flipped = bytearray(twelve)
    for bit in flips(seed):
        flipped[bit // 8] ^= 1 << bit % 8
        contents = read(bytes(flipped))
        flipped[bit // 8] ^= 1 << bit % 8
        slot = bit // 8 // SLOT_BYTES
        if slot == 12:
            assert contents.payloads == expected(11)
            assert contents.torn_tail
            assert not contents.damage
        else:
            assert contents.payloads == expected(max(slot - 1, 0)), f"seed {seed}, bit {bit}"
            assert contents.damage


def test_a_flipped_bit_behind_the_end_is_never_a_record(twelve: bytes) -> None:
    """In the slot after the last record it looks like an unfinished append, further on like damage."""
    for slot in range(13, SLOTS_PER_EXTENT):
        flipped = bytearray(twelve)
        flipped[slot * SLOT_BYTES + 7] ^= 16
        contents = read(bytes(flipped))
        assert contents.payloads == expected(12)
        assert contents.torn_tail == (slot == 13)
        assert bool(contents.damage) == (slot > 13)


@pytest.mark.parametrize(("first", "second"), [(1, 2), (3, 9), (0, 1), (11, 12)])
def test_slots_in_the_wrong_place_are_damage(twelve: bytes, first: int, second: int) -> None:
    """A whole slot is believed only where it was written: neither two swapped ones nor a copy of one are."""
    slots = slots_of(twelve)
    copied = [*slots[:second], slots[first], *slots[second + 1 :]]
    slots[first], slots[second] = slots[second], slots[first]
    for changed in (slots, copied):
        contents = read(b"".join(changed))
        assert contents.payloads == expected(len(contents.payloads))
        assert contents.damage or contents.torn_tail
        assert len(contents.payloads) < 12


def test_a_record_of_another_journal_does_not_fit(path: Path, twelve: bytes) -> None:
    """A valid slot of the same number from another file breaks the chain."""
    other = path.with_name("other.journal")
    log = Journal(other, LABEL)
    for number in range(12):
        log.append(payload(number) + b"!", durable=False)
    log.close()
    foreign = other.read_bytes()[5 * SLOT_BYTES : 6 * SLOT_BYTES]
    contents = read(twelve[: 5 * SLOT_BYTES] + foreign + twelve[6 * SLOT_BYTES :])
    assert contents.payloads == expected(4)
    assert contents.damage


@pytest.mark.parametrize(
    "content",
    [b"", b"\0" * SLOT_BYTES, b"not a journal", b"\xa5" * 3 * SLOT_BYTES],
    ids=["empty", "zeros", "text", "noise"],
)
def test_a_file_that_is_no_journal_is_damage(path: Path, content: bytes) -> None:
    """It is neither read as empty nor written to."""
    path.write_bytes(content)
    assert journal.read(path, LABEL).damage
    with pytest.raises(JournalDamagedError):
        Journal(path, LABEL)
    assert path.read_bytes() == content


def test_a_journal_of_another_label_is_damage(path: Path) -> None:
    """A file of another machine, role or host is not believed, although every slot of it is whole."""
    filled(path, 2)
    assert journal.read(path, LABEL + b"!").damage
    with pytest.raises(JournalDamagedError):
        Journal(path, LABEL + b"!")


@pytest.mark.parametrize("cut", [0, 1], ids=["torn", "cut"])
def test_the_next_append_heals_an_uncertain_end(path: Path, twelve: bytes, cut: int) -> None:
    """It takes the bad slot's place; nothing before is lost, and the end is certain again."""
    end = 12 * SLOT_BYTES + 100
    path.write_bytes(twelve[:end] if cut else twelve[:end].ljust(len(twelve), b"\0"))
    log = Journal(path, LABEL)
    assert log.torn_tail
    log.append(b"next", durable=True)
    assert not log.torn_tail
    log.close()
    assert journal.read(path, LABEL) == Contents((*expected(11), b"next"), last_hash=log._previous)


def test_a_file_cut_behind_its_last_record_loses_none_when_it_grows(path: Path, twelve: bytes) -> None:
    """Records in an extent that is not whole survive the next append."""
    filled(path, SLOTS_PER_EXTENT, start=12)
    whole = path.read_bytes()
    path.write_bytes(whole[: 77 * SLOT_BYTES])
    filled(path, 1, start=76)
    assert journal.read(path, LABEL).payloads == expected(77)
    assert not journal.read(path, LABEL).torn_tail


# What is on disk


class Disk:
    """Remembers in which order a journal wrote and synced; the calls are done, too."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[tuple[int, bytes] | None] = []
        pwrite, fdatasync, fsync = os.pwrite, os.fdatasync, os.fsync

        def written(fd: int, data: bytes, offset: int) -> int:
            self.log.append((offset, bytes(data)))
            return pwrite(fd, data, offset)

        def synced(fd: int) -> None:
            self.log.append(None)
            fdatasync(fd)

        def fully_synced(fd: int) -> None:
            self.log.append(None)
            fsync(fd)

        monkeypatch.setattr(os, "pwrite", written)
        monkeypatch.setattr(os, "fdatasync", synced)
        monkeypatch.setattr(os, "fsync", fully_synced)


def crashed(whole: bytes, log: list[tuple[int, bytes] | None]) -> Iterator[bytes]:
    """Every content that a power failure after these calls may leave: unsynced writes are whole, torn or missing."""
    last_sync = max((at for at, entry in enumerate(log) if entry is None), default=-1)
    certain = bytearray(len(whole))
    for entry in log[: last_sync + 1]:
        if entry is not None:
            certain[entry[0] : entry[0] + len(entry[1])] = entry[1]
    pending = [entry for entry in log[last_sync + 1 :] if entry is not None]
    sectors = [
        [(at + part, data[part : part + SECTOR_BYTES]) for part in range(0, len(data), SECTOR_BYTES)]
        for at, data in pending
    ]
    for kept in itertools.product((0, 1, 5, 8, -3), repeat=len(pending)):
        disk = bytearray(certain)
        for parts, keep in zip(sectors, kept, strict=True):
            for at, data in parts[:keep] if keep >= 0 else parts[keep:]:
                disk[at : at + len(data)] = data
        yield bytes(disk)


def test_a_power_failure_leaves_a_prefix_with_all_durable_records(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After each call, with every unsynced write whole, torn or missing: no damage, and nothing durable is gone."""
    disk = Disk(monkeypatch)
    log = Journal(path, LABEL)
    durable_at = {len(disk.log): 0}
    for number in range(9):
        durable = number % 3 == 2
        log.append(payload(number), durable=durable)
        if durable:
            durable_at[len(disk.log)] = number + 1
    log.close()
    whole = path.read_bytes()
    first = next(iter(durable_at))
    for at in range(first, len(disk.log) + 1):
        kept = max(count for moment, count in durable_at.items() if moment <= at)
        for content in crashed(whole, disk.log[:at]):
            contents = read(content)
            assert not contents.damage
            assert contents.payloads == expected(len(contents.payloads))
            assert len(contents.payloads) >= kept


def test_sync_takes_the_wait_for_a_lazy_record_off_the_next_append(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A durable append behind a lazy one syncs twice, and once if the lazy one was synced beside other work."""
    disk = Disk(monkeypatch)
    log = Journal(path, LABEL)
    counts = []
    for beside in (False, True):
        log.append(b"lazy", durable=False)
        if beside:
            log.sync()
        before = disk.log.count(None)
        log.append(b"durable", durable=True)
        counts.append(disk.log.count(None) - before)
    log.close()
    assert counts == [2, 1]


def test_opening_brings_what_was_read_to_disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record whose writer was killed before its sync is written again and synced before anybody may act on it."""
    log = Journal(path, LABEL)
    monkeypatch.setattr(os, "fdatasync", _failing)
    with pytest.raises(JournalDamagedError):
        log.append(payload(0), durable=True)
    monkeypatch.undo()
    log.close()
    disk = Disk(monkeypatch)
    reopened = Journal(path, LABEL)
    reopened.close()
    assert reopened.contents.payloads == expected(1)
    slot = path.read_bytes()[SLOT_BYTES : 2 * SLOT_BYTES]
    assert disk.log == [(SLOT_BYTES, slot), None]


def test_a_settled_reading_is_on_disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that acts on a record syncs it first; where that fails, the journal is not believed."""
    filled(path, 2, durable=False)
    disk = Disk(monkeypatch)
    assert journal.read(path, LABEL).payloads == expected(2)
    assert disk.log == []
    assert journal.read(path, LABEL, settled=True).payloads == expected(2)
    assert disk.log == [None]
    monkeypatch.setattr(os, "fdatasync", _failing)
    assert journal.read(path, LABEL, settled=True).damage


def test_a_new_journal_survives_with_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file, then the folder that names it, then the folder that names that one are synced."""
    folder = tmp_path / "machine"
    folder.mkdir()
    synced = []
    fsync = os.fsync

    def remembered(fd: int) -> None:
        synced.append(Path(f"/proc/self/fd/{fd}").readlink().name)
        fsync(fd)

    monkeypatch.setattr(os, "fsync", remembered)
    filled(folder / "source.journal", 0)
    assert synced == [f"source.{os.getpid()}.new", "machine", tmp_path.name]


# Errors of the disk


def _failing(fd: int) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def is_refused(log: Journal) -> None:
    """Every further use is refused, without another try."""
    for use in (
        lambda: log.append(b"x", durable=True),
        lambda: log.append(b"x", durable=False),
        log.sync,
        log.probe,
    ):
        with pytest.raises(JournalDamagedError, match="failed before"):
            use()


@pytest.mark.parametrize("call", ["append", "sync", "probe"])
def test_after_a_failed_sync_nothing_is_tried_again(
    path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """The kernel may call the lost page clean: a second sync that works would prove nothing."""
    log = Journal(path, LABEL)
    log.append(payload(0), durable=call != "sync")
    monkeypatch.setattr(os, "fdatasync", _failing)
    with pytest.raises(JournalDamagedError):
        log.append(payload(1), durable=True) if call == "append" else getattr(log, call)()
    monkeypatch.undo()
    is_refused(log)
    log.close()


def test_after_a_failed_write_nothing_is_tried_again(path: Path) -> None:
    """The descriptor is replaced by one that has no space: the append fails, and so do all others afterwards."""
    log = Journal(path, LABEL)
    log.append(payload(0), durable=True)
    full = os.open("/dev/full", os.O_RDWR)
    kept = os.dup(log._fd)
    os.dup2(full, log._fd)
    try:
        with pytest.raises(JournalDamagedError):
            log.append(payload(1), durable=False)
        os.dup2(kept, log._fd)
        is_refused(log)
    finally:
        os.close(full)
        os.close(kept)
        log.close()
    assert journal.read(path, LABEL).payloads == expected(1)


@pytest.fixture
def no_growth() -> Iterator[None]:
    """No file can become larger than one extent of a journal."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SLOTS_PER_EXTENT * SLOT_BYTES, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("no_growth")
def test_a_file_that_cannot_grow_breaks_the_append_that_needs_it(path: Path) -> None:
    """What fits is written, the first record that does not is refused with all others, and nothing is lost."""
    log = Journal(path, LABEL)
    for number in range(SLOTS_PER_EXTENT - 1):
        log.append(payload(number), durable=False)
    with pytest.raises(JournalDamagedError):
        log.append(payload(63), durable=True)
    is_refused(log)
    log.close()
    assert journal.read(path, LABEL).payloads == expected(SLOTS_PER_EXTENT - 1)


@pytest.mark.usefixtures("no_growth")
def test_a_probe_notices_in_time_that_space_runs_out(path: Path) -> None:
    """Before the last slots are needed the probe fails, and the records that still fit can be written."""
    log = Journal(path, LABEL)
    for number in range(SLOTS_PER_EXTENT - 9):
        log.append(payload(number), durable=False)
    log.probe()
    log.append(payload(SLOTS_PER_EXTENT - 9), durable=True)
    for number in range(SLOTS_PER_EXTENT - 8, SLOTS_PER_EXTENT - 1):
        with pytest.raises(JournalDamagedError, match="cannot extend"):
            log.probe()
        log.append(payload(number), durable=True)
    log.close()
    assert journal.read(path, LABEL).payloads == expected(SLOTS_PER_EXTENT - 1)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one extent and a little."""
    require(os.geteuid() == 0, "mounting a small file system needs root")
    folder = tmp_path / "disk"
    folder.mkdir()
    size = SLOTS_PER_EXTENT * SLOT_BYTES + 4 * SLOT_BYTES
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=False, capture_output=True
    )
    require(mounted.returncode == 0, "a tmpfs cannot be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_an_error_of_the_journal(small_disk: Path) -> None:
    """Without space a journal is neither made nor extended, and no half-made file is left."""
    path = small_disk / "source.journal"
    filled(path, SLOTS_PER_EXTENT - 1)
    log = Journal(path, LABEL)
    with pytest.raises(JournalDamagedError, match="No space left"):
        log.append(b"x", durable=True)
    is_refused(log)
    log.close()
    assert journal.read(path, LABEL).payloads == expected(SLOTS_PER_EXTENT - 1)
    with pytest.raises(JournalDamagedError, match="cannot create"):
        Journal(small_disk / "another.journal", LABEL)
    assert [entry.name for entry in small_disk.iterdir()] == [path.name]


# Reading beside a writer

_WRITER: Final = """
import sys
from pathlib import Path
from tests.unit.handoff.test_journal import LABEL, payload
from vmferry.handoff.journal import Journal
log = Journal(Path(sys.argv[1]), LABEL)
for number in range(int(sys.argv[2])):
    log.append(payload(number), durable=number % 4 == 0)
log.close()
"""


def test_a_reader_beside_a_writer_never_sees_a_wrong_record(path: Path) -> None:
    """Whatever moment it reads at, the records are the first ones that were written, and at last they are all."""
    count = 600
    filled(path, 0)
    writer = subprocess.Popen(
        [sys.executable, "-c", _WRITER, str(path), str(count)], cwd=Path(__file__).parents[3]
    )
    seen = set()
    try:
        while writer.poll() is None:
            payloads = journal.read(path, LABEL).payloads
            assert payloads == expected(len(payloads))
            seen.add(len(payloads))
        assert writer.wait(timeout=60) == 0
    finally:
        if writer.poll() is None:
            writer.kill()
            writer.wait()
    assert journal.read(path, LABEL).payloads == expected(count)
    assert len(seen) > 1
