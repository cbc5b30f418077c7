"""What the ledger brings to disk, and before what: a permit, an end, and the entries of its register."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Final

import pytest

from tests.unit.handoff.samples import MACHINE, attempt, record
from vmferry.errors import JournalDamagedError, MachineExistsError
from vmferry.handoff.journal import SLOT_BYTES
from vmferry.handoff.ledger import HostLedger, Role
from vmferry.handoff.rights import Standing
from vmferry.handoff.states import Append, RecordKind

K: Final = RecordKind
HERE: Final = attempt(1, epoch=2)


@pytest.fixture
def ledger(tmp_path: Path) -> HostLedger:
    """A host to which the machine came; that it runs here was promised, and may not be on disk."""
    made = HostLedger(tmp_path / "journals")
    with closing(made.open_destination(MACHINE)) as log:
        for kind in (K.ACCEPTED, K.PREPARED):
            log.append(Append(record(kind, HERE)))
        log.append(Append(record(K.OWNED, HERE), durable=False))  # its writer was killed before it synced it
    return made


def name_of(fd: int) -> str:
    return Path(f"/proc/self/fd/{fd}").readlink().name


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """What was on disk of each file when it was synced the last time."""
    contents: dict[str, bytes] = {}
    real: Callable[[int], None] = os.fdatasync

    def remembered(fd: int) -> None:
        contents[name_of(fd)] = Path(f"/proc/self/fd/{fd}").read_bytes()
        real(fd)

    monkeypatch.setattr(os, "fdatasync", remembered)
    return contents


def failing_for(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The disk fails to sync this file."""
    real = os.fdatasync

    def fails(fd: int) -> None:
        if name_of(fd) == name:
            raise OSError(errno.EIO, "the disk failed")
        real(fd)

    monkeypatch.setattr(os, "fdatasync", fails)


def test_a_permit_rests_on_what_is_on_disk(ledger: HostLedger, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record whose writer was killed before its sync is synced by whoever acts on it, or not acted on."""
    failing_for(monkeypatch, "destination.journal")
    assert ledger.rights(MACHINE).standing is Standing.OWNED  # looking costs no sync
    with pytest.raises(JournalDamagedError):
        ledger.permit(MACHINE)


def test_a_permit_waits_for_no_disk_that_has_all_of_it(ledger: HostLedger, synced: dict[str, bytes]) -> None:
    """The register says how far a journal was synced; up to there nothing is, with a guest's pause waiting."""
    with closing(ledger.open_destination(MACHINE)):
        pass  # whoever opens it to append settles it
    synced.clear()
    ledger.permit(MACHINE)
    assert synced == {}


def test_a_machine_is_ended_by_a_right_that_is_on_disk(
    ledger: HostLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end says which right it ends, so that one must not be lost behind it."""
    failing_for(monkeypatch, "destination.journal")
    with pytest.raises(JournalDamagedError):
        ledger.end(MACHINE)
    assert not (ledger.directory / MACHINE / "operator.journal").exists()


def test_an_end_is_on_disk_on_return(ledger: HostLedger, synced: dict[str, bytes]) -> None:
    """The hypervisor is ended next; a crash must not bring the right back without it."""
    ledger.end(MACHINE)
    path = ledger.directory / MACHINE / "operator.journal"
    assert synced["operator.journal"] == path.read_bytes()


def test_an_end_that_was_undone_is_noticed(tmp_path: Path) -> None:
    """An older copy of the operator's journal does not bring an ended machine back."""
    ledger = HostLedger(tmp_path / "journals")
    ledger.birth(MACHINE)
    path = ledger.directory / MACHINE / "operator.journal"
    older = path.read_bytes()
    ledger.end(MACHINE)
    path.write_bytes(older)
    assert ledger.rights(MACHINE).standing is Standing.UNKNOWN


def test_a_birth_that_was_cut_short_is_not_made_good(tmp_path: Path) -> None:
    """The journal was made, its record may have been lost with a crash: that machine is not born a second time."""
    ledger = HostLedger(tmp_path / "journals")
    ledger._made_folder(MACHINE)
    ledger._opened(MACHINE, Role.OPERATOR).close()
    with pytest.raises(MachineExistsError):
        ledger.birth(MACHINE)


def test_opening_a_journal_brings_its_entry_to_disk(ledger: HostLedger, synced: dict[str, bytes]) -> None:
    """Whoever made the entry may have been killed before it was; what is written next relies on it."""
    with closing(ledger.open_destination(MACHINE)):
        assert synced["register"] == (ledger.directory / "register").read_bytes()


def test_a_lazy_record_is_brought_to_disk_when_asked(ledger: HostLedger, synced: dict[str, bytes]) -> None:
    """Beside other work, so that the next record need not wait for it."""
    with closing(ledger.open_destination(MACHINE)) as log:
        log.append(Append(record(K.RAN, HERE), durable=False))
        path = ledger.directory / MACHINE / "destination.journal"
        assert synced["destination.journal"] != path.read_bytes()
        log.sync()
        assert synced["destination.journal"] == path.read_bytes()


@pytest.mark.parametrize("slot", [2, 3], ids=["damage", "torn end"])
def test_a_reader_gives_a_writer_a_moment(
    ledger: HostLedger, monkeypatch: pytest.MonkeyPatch, slot: int
) -> None:
    """What looks torn, or damaged, may be a write that is under way; what is whole is not read twice."""
    path = ledger.directory / MACHINE / "destination.journal"
    whole, expected = path.read_bytes(), ledger.rights(MACHINE)
    waited: list[float] = []

    def written_meanwhile(seconds: float) -> None:
        waited.append(seconds)
        path.write_bytes(whole)

    monkeypatch.setattr("vmferry.handoff.ledger.time.sleep", written_meanwhile)
    at = slot * SLOT_BYTES + 100
    path.write_bytes(whole[:at] + b"\xff" + whole[at + 1 :])
    assert ledger.rights(MACHINE) == expected
    assert len(waited) == 1
    assert ledger.rights(MACHINE) == expected
    assert len(waited) == 1


def test_a_record_that_has_not_come_to_its_end_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A journal whose last record was not marked yet is torn, not damaged, and read again all the same."""
    ledger = HostLedger(tmp_path / "journals")
    path = ledger.directory / MACHINE / "destination.journal"
    with closing(ledger.open_destination(MACHINE)) as log:
        log.append(Append(record(K.ACCEPTED, HERE)))
        before = path.read_bytes()
        log.append(Append(record(K.PREPARED, HERE), durable=False))
    whole, expected = path.read_bytes(), ledger.rights(MACHINE)
    path.write_bytes(whole[: 2 * SLOT_BYTES + 50] + before[2 * SLOT_BYTES + 50 :])
    monkeypatch.setattr("vmferry.handoff.ledger.time.sleep", lambda _: path.write_bytes(whole))
    assert ledger.rights(MACHINE) == expected
