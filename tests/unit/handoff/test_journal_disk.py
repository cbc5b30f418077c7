"""The journal against its disk: what is there after a power failure, and what a failing disk does."""

from __future__ import annotations

import errno
import itertools
import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Final

import pytest

from tests.support import require
from tests.unit.handoff.journals import LABEL, expected, filled, payload, read
from vmferry.errors import JournalDamagedError
from vmferry.handoff import journal
from vmferry.handoff.disk import HostFile
from vmferry.handoff.journal import SLOT_BYTES, SLOTS_PER_EXTENT, Journal

SECTOR_BYTES: Final = 512


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "source.journal"


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
    path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None]
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
    first, failures = next(iter(durable_at)), 0
    for at in range(first, len(disk.log) + 1):
        kept = max(count for moment, count in durable_at.items() if moment <= at)
        for content in crashed(whole, disk.log[:at]):
            contents = read(content)
            assert not contents.damage
            assert contents.payloads == expected(len(contents.payloads))
            assert len(contents.payloads) >= kept
            failures += 1
    record_property("power failures", failures)


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
    # The file, and the folders that name it: its maker may have been killed before their sync.
    assert disk.log == [(SLOT_BYTES, slot), None, None, None]


def test_a_settled_reading_is_on_disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that acts on a record brings it to disk first; where that fails, the journal is not believed."""
    filled(path, 2, durable=False)
    disk = Disk(monkeypatch)
    assert journal.read(path, LABEL).payloads == expected(2)
    assert disk.log == []
    assert journal.read(path, LABEL, settled=True).payloads == expected(2)
    slot = path.read_bytes()[2 * SLOT_BYTES : 3 * SLOT_BYTES]
    # Written again: if its writer's sync failed, another sync would find nothing to do, and succeed.
    assert disk.log == [(2 * SLOT_BYTES, slot), None]
    assert journal.read(path, LABEL, settled=True, known=2).payloads == expected(2)
    assert len(disk.log) == 4
    assert journal.read(path, LABEL, settled=True, known=3).payloads == expected(2)
    assert len(disk.log) == 4, "what is known to be on disk is neither written nor synced again"
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


def test_a_journal_that_was_given_up_takes_nothing_more_and_says_what_failed_first(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Something beside the file failed: its records are there, none follows; the first failure is the cause."""
    with closing(Journal(path, LABEL)) as log:
        log.append(payload(0), durable=True)
        log.give_up("no mark")
        log.give_up("whatever failed after that")
        is_refused(log)
        with pytest.raises(JournalDamagedError, match=r"failed before: no mark$"):
            log.probe()
    assert journal.read(path, LABEL).payloads == expected(1)


def test_after_a_failed_write_nothing_is_tried_again(path: Path) -> None:
    """The descriptor is replaced by one that has no space: the append fails, and so do all others afterwards."""
    log = Journal(path, LABEL)
    log.append(payload(0), durable=True)
    full = os.open("/dev/full", os.O_RDWR)
    assert isinstance(log._file, HostFile)
    fd = log._file._fd
    kept = os.dup(fd)
    os.dup2(full, fd)
    try:
        with pytest.raises(JournalDamagedError):
            log.append(payload(1), durable=False)
        os.dup2(kept, fd)
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


def test_a_probe_leaves_what_it_added_on_disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The record that uses it is written in a guest's pause, and its sync then has no more than that to do."""
    filled(path, SLOTS_PER_EXTENT - 3)
    log = Journal(path, LABEL)
    disk = Disk(monkeypatch)
    log.probe()
    log.close()
    assert any(entry is not None and len(entry[1]) > SLOT_BYTES for entry in disk.log)
    assert disk.log[-1] is None


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
