"""A host's directory of journals: made, restored from a backup, mixed with another's, left by the release before."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from tests.unit.handoff.registered import file_of, is_unknown, travelled
from tests.unit.handoff.samples import MACHINE, OTHER_MACHINE
from vmferry.errors import JournalDamagedError
from vmferry.handoff.disk import DISK
from vmferry.handoff.journal import SLOT_BYTES
from vmferry.handoff.ledger import HostLedger, Role


@pytest.fixture
def ledger(tmp_path: Path) -> HostLedger:
    """A host to which a machine came back."""
    return travelled(tmp_path / "journals")


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


def test_every_directory_is_another_host(ledger: HostLedger, tmp_path: Path) -> None:
    """Its incarnation is a fresh UUID: an empty journal is never taken for the one that promised something."""
    other = HostLedger(tmp_path / "other")
    assert uuid.UUID(other.incarnation) != uuid.UUID(ledger.incarnation)


# Files as such


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


# What the release before left


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
