"""The register itself: marks and entries are read back, torn and rotten ones are noticed, another's is refused."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.handoff.registered import NAME, mark
from tests.unit.handoff.samples import MACHINE, OTHER_MACHINE
from vmferry.errors import JournalDamagedError
from vmferry.handoff import register
from vmferry.handoff.disk import DISK, File, HostDisk, HostFile, Lock
from vmferry.handoff.ledger import Role
from vmferry.handoff.register import ENTRY_BYTES, Register


@pytest.fixture
def small(tmp_path: Path) -> Register:
    """A register with two entries, of which the first was moved on twice."""
    made = Register(tmp_path, DISK)
    made.add(NAME, mark(1))
    made.add(f"{OTHER_MACHINE}/source", mark(7))
    made.note(NAME, mark(2))
    made.note(NAME, mark(4))
    return made


def test_marks_are_read_back(small: Register, tmp_path: Path) -> None:
    """By the same process and by another one; a journal that has no entry has no mark."""
    for one in (small, Register(tmp_path, DISK)):
        assert one.mark(NAME) == mark(4)
        assert one.mark(f"{OTHER_MACHINE}/source") == mark(7)
        assert one.mark(f"{OTHER_MACHINE}/operator") is None
        assert one.names() == [NAME, f"{OTHER_MACHINE}/source"]


def test_an_entry_of_another_process_is_found(small: Register, tmp_path: Path) -> None:
    """Two processes add entries; each sees both, and none is overwritten."""
    other = Register(tmp_path, DISK)
    other.add(f"{MACHINE}/operator", mark(1))
    small.add(f"{MACHINE}/destination", mark(2))
    assert other.mark(f"{MACHINE}/destination") == mark(2)
    assert small.mark(f"{MACHINE}/operator") == mark(1)


@pytest.mark.usefixtures("unsynced")
def test_any_flipped_bit_of_the_register_is_noticed_or_harmless(
    small: Register, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """A damaged mark is one that is missing, never another one: an older one is believed, or nothing is."""
    path = tmp_path / "register"
    whole = path.read_bytes()
    believed = {mark(4), mark(2)}
    bits = range(0, len(whole) * 8, 7)
    record_property("bits flipped", len(bits))
    for bit in bits:
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        with path.open("r+b") as file:
            file.write(flipped)
        try:
            assert Register(tmp_path, DISK).mark(NAME) in believed
        except JournalDamagedError:
            continue


@pytest.mark.usefixtures("unsynced")
def test_a_register_cut_anywhere_is_noticed_or_harmless(
    small: Register, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Entries that are cut off are missing: journals of theirs that have records are not believed then."""
    path = tmp_path / "register"
    whole = path.read_bytes()
    lengths = range(0, len(whole), 61)
    record_property("lengths cut", len(lengths))
    for length in lengths:
        with path.open("r+b") as file:
            file.write(whole)
            file.truncate(length)
        try:
            found = Register(tmp_path, DISK).mark(NAME)
        except JournalDamagedError:
            continue
        assert found in {None, mark(4), mark(2)}
        assert found is None or length > ENTRY_BYTES


def test_a_torn_move_leaves_the_older_mark(small: Register, tmp_path: Path) -> None:
    """Only the older of two copies is overwritten, so a crash in the middle loses nothing that was believed."""
    path = tmp_path / "register"
    for slots in range(5, 9):
        before = path.read_bytes()
        small.note(NAME, mark(slots))
        after = path.read_bytes()
        changed = [at for at in range(len(after)) if after[at] != before[at]]
        torn = bytearray(after)
        torn[changed[0]] = before[changed[0]]
        with path.open("r+b") as file:
            file.write(torn)
        assert Register(tmp_path, DISK).mark(NAME) == mark(slots - 1)
        with path.open("r+b") as file:
            file.write(after)


def test_an_unfinished_entry_is_overwritten(small: Register, tmp_path: Path) -> None:
    """What a crash left behind the last entry is none."""
    path = tmp_path / "register"
    with path.open("ab") as file:
        file.write(b"\0" * 700)
    again = Register(tmp_path, DISK)
    again.add(f"{MACHINE}/operator", mark(3))
    assert Register(tmp_path, DISK).mark(f"{MACHINE}/operator") == mark(3)


def test_adding_waits_for_the_disk_and_noting_does_not(
    small: Register, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A journal's first record must find its entry on disk; a guest's pause must not wait for a mark."""
    synced: list[int] = []
    monkeypatch.setattr(os, "fdatasync", synced.append)
    small.note(NAME, mark(9))
    assert synced == []
    small.note(NAME, mark(10), settled=True)
    assert len(synced) == 1
    small.add(f"{MACHINE}/operator", mark(1))
    assert len(synced) == 2


def test_a_name_longer_than_an_entry_is_not_cut() -> None:
    """The names that there are fit."""
    longest = f"{MACHINE}/{max(Role, key=len)}"
    assert register._decode(register._encode(longest, mark(1))) == (longest, mark(1))


# What is not a register, or not this one


def test_a_register_that_was_replaced_is_neither_read_nor_written(tmp_path: Path) -> None:
    """A process that goes on with another directory's register would mark journals that it never saw."""
    made = []
    for name in ("mine", "another"):
        (tmp_path / name).mkdir()
        one = Register(tmp_path / name, DISK)
        one.add(NAME, mark(2))
        made.append(one)
    (tmp_path / "another/register").replace(tmp_path / "mine/register")
    before = (tmp_path / "mine/register").read_bytes()
    for use in (lambda: made[0].mark(NAME), lambda: made[0].note(NAME, mark(3)), made[0].names):
        with pytest.raises(JournalDamagedError, match="replaced by another"):
            use()
    assert (tmp_path / "mine/register").read_bytes() == before


def test_a_register_of_another_format_is_not_read(small: Register, tmp_path: Path) -> None:
    """A release to come may have given it another meaning."""
    path = tmp_path / "register"
    data = path.read_bytes()
    body = data[: ENTRY_BYTES - 32].replace(b"register 1", b"register 2", 1)
    with path.open("r+b") as file:
        file.write(body + hashlib.sha256(body).digest())
    with pytest.raises(JournalDamagedError, match="no readable header"):
        Register(tmp_path, DISK)


def test_entries_behind_one_that_rots_are_found(small: Register, tmp_path: Path) -> None:
    """Only the journal of the bad one is not believed."""
    with (tmp_path / "register").open("r+b") as file:
        file.seek(ENTRY_BYTES)
        file.write(b"\xff" * ENTRY_BYTES)
    assert Register(tmp_path, DISK).names() == [f"{OTHER_MACHINE}/source"]
    with pytest.raises(JournalDamagedError, match="bad entry"):
        small.mark(NAME)


@pytest.mark.parametrize("copies", [1, 2])
def test_a_mark_of_another_journal_is_none(small: Register, tmp_path: Path, copies: int) -> None:
    """What a disk put in the wrong place is not believed, and does not hide the copy that is left."""
    half = ENTRY_BYTES // 2
    with (tmp_path / "register").open("r+b") as file:
        file.seek(2 * ENTRY_BYTES)
        another = file.read(half)
        for copy in range(copies):
            file.seek(ENTRY_BYTES + half * copy)
            file.write(another)
    if copies == 1:
        assert small.mark(NAME) in {mark(2), mark(4)}
    else:
        with pytest.raises(JournalDamagedError, match="bad entry"):
            small.mark(NAME)


def test_who_adds_an_entry_waits_for_its_turn(small: Register, tmp_path: Path) -> None:
    """Two that look for the end at the same time would write to the same place."""
    asked: list[bool] = []

    class Asked(HostDisk):
        def lock(self, path: Path, *, wait: bool) -> Lock:
            asked.append(wait)
            return super().lock(path, wait=wait)

    Register(tmp_path, Asked()).add(f"{MACHINE}/operator", mark(1))
    assert asked == [True]


def test_two_threads_that_look_at_once_lose_no_entry(small: Register, tmp_path: Path) -> None:
    """One that is overtaken while it takes in an entry remembers it where it is, and sees the next one as well."""
    threads: list[threading.Thread] = []

    class Overtaken(HostFile):
        def read(self, offset: int = 0, length: int = -1) -> bytes:
            data = super().read(offset, length)
            if offset == ENTRY_BYTES and not threads:
                threads.append(threading.Thread(target=both.names))
                threads[0].start()
                threads[0].join(timeout=0.5)  # it ends by then, unless it rightly waits for this one
            return data

    class Watched(HostDisk):
        def open(self, path: Path, *, writable: bool = False) -> File:
            return Overtaken(os.open(path, os.O_RDWR if writable else os.O_RDONLY))

    both = Register(tmp_path, Watched())
    names = both.names()
    threads[0].join()
    assert names == both.names() == small.names()
    assert both.mark(NAME) == mark(4)
    assert both.mark(f"{OTHER_MACHINE}/source") == mark(7)
