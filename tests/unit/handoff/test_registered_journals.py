"""What the register notices of a journal: that it is missing, cut, older than it was, or another one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Final

import pytest

from tests.unit.handoff.registered import file_of, is_unknown, travelled
from tests.unit.handoff.samples import MACHINE, OTHER_MACHINE, attempt, record
from vmferry.errors import JournalDamagedError
from vmferry.handoff.journal import SLOT_BYTES, Journal
from vmferry.handoff.ledger import HostLedger, Role
from vmferry.handoff.register import Register
from vmferry.handoff.rights import Standing
from vmferry.handoff.states import Append, RecordKind

K: Final = RecordKind


@pytest.fixture
def ledger(tmp_path: Path) -> HostLedger:
    """A host to which a machine came back."""
    return travelled(tmp_path / "journals")


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
