"""The register: a journal that is missing, cut, or older than it was is noticed, and so is a restored directory."""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
import uuid
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Final

import pytest

from tests.unit.handoff.samples import MACHINE, OTHER_MACHINE, attempt, record
from vmferry.errors import JournalDamagedError, MachineExistsError
from vmferry.handoff import register
from vmferry.handoff.disk import DISK, File, HostDisk, HostFile, Lock
from vmferry.handoff.journal import SLOT_BYTES, Journal
from vmferry.handoff.ledger import HostLedger, Role
from vmferry.handoff.register import ENTRY_BYTES, Mark, Register
from vmferry.handoff.rights import Standing
from vmferry.handoff.states import Append, Record, RecordKind, Update

K: Final = RecordKind
AWAY: Final = attempt(1, epoch=1)
BACK: Final = attempt(1, epoch=2)
NAME: Final = f"{MACHINE}/source"


def mark(slots: int) -> Mark:
    return Mark(slots, bytes([slots]) * 32)


@pytest.fixture
def ledger(tmp_path: Path) -> HostLedger:
    """A machine was born here, handed off, came back, and is on its way out again."""
    made = HostLedger(tmp_path / "journals")
    made.birth(MACHINE)
    with closing(made.open_source(MACHINE)) as log:
        for kind in (K.BEGUN, K.SEALED, K.HANDED_OFF, K.DONE):
            log.append(Append(record(kind, AWAY), durable=kind is not K.SEALED))
    with closing(made.open_destination(MACHINE)) as log:
        for kind in (K.ACCEPTED, K.PREPARED, K.OWNED):
            log.append(Append(record(kind, BACK), durable=kind is not K.PREPARED))
    with closing(made.open_update(MACHINE)) as log:
        for kind in (K.UPDATE_BEGUN, K.UPDATE_UNDONE):
            log.append(Append(Record(kind, MACHINE, update=Update(MACHINE, bytes(16), 1))))
    return made


def file_of(ledger: HostLedger, role: Role) -> Path:
    return ledger.directory / MACHINE / f"{role}.journal"


def is_unknown(ledger: HostLedger) -> None:
    """Nobody may resume the machine or write about it, now or after a restart, and it is still listed."""
    for one in (ledger, HostLedger(ledger.directory)):
        assert one.rights(MACHINE).standing is Standing.UNKNOWN
        assert MACHINE in one.machines()
        with pytest.raises(JournalDamagedError):
            one.permit(MACHINE)
        with pytest.raises(JournalDamagedError):
            one.end(MACHINE)
        with pytest.raises(MachineExistsError):
            one.birth(MACHINE)


def test_nothing_follows_a_record_whose_mark_cannot_be_moved_on(
    ledger: HostLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record is there and counts, for this process and the next one; the same decision is not written twice."""
    again = attempt(2, epoch=3)
    with closing(ledger.open_source(MACHINE)) as log:
        log.append(Append(record(K.BEGUN, again), durable=True))
        with monkeypatch.context() as broken:
            broken.setattr(Register, "note", failing)
            with pytest.raises(JournalDamagedError, match="no mark"):
                log.append(Append(record(K.ABORTED, again), durable=True))
        with pytest.raises(JournalDamagedError, match="failed before"):
            log.append(Append(record(K.BEGUN, attempt(3, epoch=3)), durable=True))
    assert ledger.rights(MACHINE).standing is Standing.OWNED
    assert HostLedger(ledger.directory).rights(MACHINE).permitted


def failing(*what: object, **how: object) -> None:
    """A disk that fails."""
    raise JournalDamagedError("no mark", path="register")


# Journals


@pytest.mark.parametrize("role", Role)
def test_a_missing_journal_is_damage(ledger: HostLedger, role: Role) -> None:
    """Without it the host would seem to own what it gave away; it is neither read as empty nor made anew."""
    file_of(ledger, role).unlink()
    is_unknown(ledger)
    for wanted, use in (
        (Role.SOURCE, ledger.open_source),
        (Role.DESTINATION, ledger.open_destination),
        (Role.UPDATE, ledger.open_update),
    ):
        if role is wanted:
            with pytest.raises(JournalDamagedError, match="is missing"):
                use(MACHINE)
            assert not file_of(ledger, role).exists()
        assert (MACHINE in ledger.machines(wanted)) is True


def test_a_missing_folder_is_damage(ledger: HostLedger) -> None:
    """With all journals of a machine gone it is not taken for one that nobody has seen."""
    shutil.rmtree(ledger.directory / MACHINE)
    is_unknown(ledger)


@pytest.mark.usefixtures("unsynced")
@pytest.mark.parametrize("role", [Role.SOURCE, Role.DESTINATION])
def test_a_journal_cut_anywhere_before_its_end_is_damage(
    ledger: HostLedger, role: Role, record_property: Callable[[str, object], None]
) -> None:
    """Whatever length is left, records that were on disk are missed; a cut behind them loses nothing."""
    path = file_of(ledger, role)
    whole = path.read_bytes()
    expected = ledger.rights(MACHINE)
    count = 5 if role is Role.SOURCE else 4
    lengths = {*range(0, (count + 2) * SLOT_BYTES, 499), *(n * SLOT_BYTES for n in range(count + 3))}
    record_property("lengths cut", len(lengths))
    # Bytes that are missing are read as zeros, which the padding of a slot is anyway: only its hash must be there.
    for length in sorted(lengths):
        path.write_bytes(whole[:length])
        rights = HostLedger(ledger.directory).rights(MACHINE)
        if length >= count * SLOT_BYTES:
            assert (rights.outgoing, rights.incoming) == (expected.outgoing, expected.incoming)
        else:
            assert rights.standing is Standing.UNKNOWN, length


@pytest.mark.parametrize("how", ["replaced", "in place"])
@pytest.mark.parametrize("role", [Role.SOURCE, Role.DESTINATION])
def test_an_older_copy_of_a_journal_is_damage(ledger: HostLedger, role: Role, how: str) -> None:
    """A journal restored from a backup of before its last record is not believed, whichever way it was restored."""
    path = file_of(ledger, role)
    older = path.read_bytes()
    if role is Role.SOURCE:
        with closing(ledger.open_source(MACHINE)) as log:
            log.append(Append(record(K.BEGUN, attempt(2, epoch=3))))
    else:
        with closing(ledger.open_destination(MACHINE)) as log:
            log.append(Append(record(K.ACCEPTED, attempt(3, epoch=5))))
    if how == "replaced":
        path.unlink()
    path.write_bytes(older)
    is_unknown(ledger)


def test_a_journal_that_went_another_way_is_damage(
    ledger: HostLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many records, with other contents: the hash of the marked slot tells."""
    path = file_of(ledger, Role.SOURCE)
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(Register, "note", lambda *_, **__: None)
        with closing(ledger.open_source(MACHINE)) as log:
            log.append(Append(record(K.BEGUN, attempt(2, epoch=3))))
    another = path.read_bytes()
    path.write_bytes(before)
    with closing(ledger.open_source(MACHINE)) as log:
        log.append(Append(record(K.BEGUN, attempt(3, epoch=3))))
    path.write_bytes(another)
    is_unknown(ledger)


def test_a_journal_that_is_not_registered_is_damage(ledger: HostLedger) -> None:
    """Records of a machine that this directory never had are not believed, although they name this host."""
    folder = ledger.directory / OTHER_MACHINE
    folder.mkdir()
    path, label = ledger._file(OTHER_MACHINE, Role.OPERATOR)
    with closing(Journal(path, label)) as log:
        assert not ledger.rights(OTHER_MACHINE).damaged  # made, and its maker killed before it was registered
        log.append(b"", durable=True)
    assert ledger.rights(OTHER_MACHINE).damaged


def test_a_journal_whose_maker_was_killed_is_registered_by_the_next(ledger: HostLedger) -> None:
    """Nothing is lost with it: its first record comes behind the entry."""
    (ledger.directory / OTHER_MACHINE).mkdir()
    Journal(*ledger._file(OTHER_MACHINE, Role.DESTINATION)).close()
    with closing(ledger.open_destination(OTHER_MACHINE)):
        pass
    file = ledger.directory / OTHER_MACHINE / "destination.journal"
    file.unlink()
    assert HostLedger(ledger.directory).rights(OTHER_MACHINE).damaged


# The directory


def test_a_new_directory_survives_a_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folders that were made for it are on disk, and the register's own name, at every start again."""
    synced: list[str] = []
    fsync = os.fsync

    def remembered(fd: int) -> None:
        synced.append(Path(f"/proc/self/fd/{fd}").readlink().name)
        fsync(fd)

    monkeypatch.setattr(os, "fsync", remembered)
    directory = tmp_path / "state" / "journals"
    HostLedger(directory)
    # What was made, from above; then the register, whose name appears last.
    assert sorted(synced[:2]) == sorted([tmp_path.name, "state"])
    assert synced[-2:] == ["journals", "state"]
    assert any(name.startswith(".register.") for name in synced)  # its content before its name
    synced.clear()
    HostLedger(directory)  # its maker may have been killed before these
    assert synced == ["journals", "state"]


def restored_by_copying(directory: Path) -> None:
    backup = directory.with_name("backup")
    shutil.copytree(directory, backup)
    shutil.rmtree(directory)
    shutil.copytree(backup, directory)


def register_replaced(directory: Path) -> None:
    path = directory / "register"
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data)


@pytest.mark.parametrize("restore", [restored_by_copying, register_replaced])
def test_a_restored_directory_is_not_used(ledger: HostLedger, restore: Callable[[Path], None]) -> None:
    """Everything in it may be older than what was promised; neither a running service nor a new one believes it."""
    restore(ledger.directory)
    assert ledger.rights(MACHINE).damaged
    with pytest.raises(JournalDamagedError, match="copied or restored"):
        HostLedger(ledger.directory)


def test_a_register_of_another_directory_believes_no_journal(ledger: HostLedger) -> None:
    """The journals beside it name another incarnation."""
    other = HostLedger(ledger.directory.with_name("other"))
    (other.directory / "register").replace(ledger.directory / "register")
    assert ledger.rights(MACHINE).damaged
    assert HostLedger(ledger.directory).rights(MACHINE).damaged


def test_a_file_is_told_from_its_copy(tmp_path: Path) -> None:
    """The same content and name are not the same file, and the same file stays itself when it is renamed."""
    path = tmp_path / "file"
    seen = set()
    for _ in range(50):  # inode numbers are used again at once
        path.write_bytes(b"content")
        with closing(DISK.open(path)) as file:
            seen.add(file.identity())
        renamed = path.rename(tmp_path / "renamed")
        with closing(DISK.open(renamed)) as file:
            assert file.identity() in seen
        renamed.unlink()
    assert len(seen) == 50


def test_a_file_system_without_handles_still_tells_most_files_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There the number of the file has to do."""
    monkeypatch.setattr("vmferry.handoff.disk._handle", lambda _: "")
    for name in ("a", "b"):
        (tmp_path / name).touch()
    with closing(DISK.open(tmp_path / "a")) as first, closing(DISK.open(tmp_path / "b")) as second:
        assert first.identity() != second.identity()


# The register itself


@pytest.fixture
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many registers are opened, and none needs to survive a crash."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(os, "fdatasync", lambda _: None)
    monkeypatch.setattr("vmferry.handoff.ledger.time.sleep", lambda _: None)


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


def of_the_release_before(ledger: HostLedger) -> None:
    """Leave what that release would have: an incarnation, and no register."""
    (ledger.directory / "register").unlink()
    (ledger.directory / "incarnation").write_text(f"{ledger.incarnation}\n", encoding="ascii")


def test_journals_of_the_release_before_are_taken_over_once(ledger: HostLedger) -> None:
    """Where an incarnation was kept instead of a register, both go on; from then on what is missing is damage."""
    before = ledger.rights(MACHINE)
    of_the_release_before(ledger)
    taken_over = HostLedger(ledger.directory)
    assert taken_over.incarnation == ledger.incarnation
    assert taken_over.rights(MACHINE) == before
    assert not (ledger.directory / "incarnation").exists()
    file_of(ledger, Role.SOURCE).unlink()
    is_unknown(taken_over)


def test_machines_without_some_of_the_journals_are_taken_over(ledger: HostLedger) -> None:
    """A machine that never left has no journal of its leaving, and gets no entry for one."""
    ledger.birth(OTHER_MACHINE)
    before = ledger.rights(OTHER_MACHINE)
    of_the_release_before(ledger)
    taken_over = HostLedger(ledger.directory)
    assert taken_over.rights(OTHER_MACHINE) == before
    assert taken_over.machines(Role.SOURCE) == [MACHINE]


def test_a_damaged_journal_is_not_taken_over(ledger: HostLedger) -> None:
    """What cannot be believed then is not believed later either, whatever is put in its place."""
    path = file_of(ledger, Role.SOURCE)
    whole = path.read_bytes()
    path.write_bytes(whole[: 2 * SLOT_BYTES] + bytes(SLOT_BYTES) + whole[3 * SLOT_BYTES :])
    of_the_release_before(ledger)
    taken_over = HostLedger(ledger.directory)
    is_unknown(taken_over)
    path.write_bytes(whole)
    is_unknown(taken_over)


def test_what_is_taken_over_is_on_disk(ledger: HostLedger, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each journal before its entry says so; and that it is not to be done again, when it is done."""
    of_the_release_before(ledger)
    incarnation = ledger.directory / "incarnation"
    synced: list[tuple[str, bool]] = []

    def noting(sync: Callable[[int], None]) -> Callable[[int], None]:
        def noted(fd: int) -> None:
            synced.append((Path(f"/proc/self/fd/{fd}").readlink().name, incarnation.exists()))
            sync(fd)

        return noted

    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, noting(getattr(os, name)))
    HostLedger(ledger.directory)
    for role in Role:
        journal = synced.index((f"{role}.journal", True))
        assert ("register", True) in synced[journal:]
    assert synced[-1] == ("journals", False)


def test_an_incarnation_of_another_directory_takes_nothing_over(ledger: HostLedger) -> None:
    """A register that is there already is not another's: the stray file changes nothing."""
    before = ledger.rights(MACHINE)
    (ledger.directory / "incarnation").write_text("00000000-0000-4000-8000-000000000000\n", encoding="ascii")
    assert HostLedger(ledger.directory).rights(MACHINE) == before


# What is not a register, or not this one


def test_every_directory_is_another_host(ledger: HostLedger, tmp_path: Path) -> None:
    """Its incarnation is a fresh UUID: an empty journal is never taken for the one that promised something."""
    other = HostLedger(tmp_path / "other")
    assert uuid.UUID(other.incarnation) != uuid.UUID(ledger.incarnation)


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
