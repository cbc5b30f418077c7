"""What is found out about machines of which there are only journals: whole, damaged, missing, or another host's."""

from __future__ import annotations

import os
import shutil
import time
import uuid
from contextlib import closing
from pathlib import Path

import pytest

from tests.unit.handoff.samples import MACHINE, B, attempt, record
from vmferry.errors import MachineNotFoundError
from vmferry.handoff.blocked import Reason, Word
from vmferry.handoff.journal import SLOT_BYTES
from vmferry.handoff.ledger import HostLedger, Role
from vmferry.handoff.rights import Rights, Standing
from vmferry.handoff.states import Append, AttemptState, RecordKind
from vmferry.machines.directory import MachineDirectory
from vmferry.recovery.contact import Contact
from vmferry.recovery.examination import Examiner
from vmferry.recovery.wire import as_inspection
from vmferry.v1 import journal_pb2

K = RecordKind
DAY_S = 86_400


@pytest.fixture
def ledger(tmp_path: Path) -> HostLedger:
    """The journals of a host."""
    return HostLedger(tmp_path / "journal")


@pytest.fixture
def directory(tmp_path: Path) -> MachineDirectory:
    """A host without a machine."""
    return MachineDirectory(tmp_path / "machines", tmp_path / "ram")


@pytest.fixture
def handed_off(ledger: HostLedger, monkeypatch: pytest.MonkeyPatch) -> int:
    """A machine that was handed off a day ago, without a word since; returns when."""
    written = time.time_ns() - DAY_S * 10**9
    monkeypatch.setattr("vmferry.handoff.ledger.time.time_ns", lambda: written)
    ledger.birth(MACHINE)
    with closing(ledger.open_source(MACHINE)) as log:
        for kind in (K.BEGUN, K.SEALED, K.HANDED_OFF):
            log.append(Append(record(kind), durable=kind is not K.SEALED))
    monkeypatch.undo()
    return written


def examiner(directory: MachineDirectory, ledger: HostLedger | str, root: Path, **others: object) -> Examiner:
    """Somebody who looks."""
    return Examiner(directory, root / "journal", ledger, **others)  # type: ignore[arg-type]


def file_of(ledger: HostLedger, role: Role) -> Path:
    """Where a journal lies."""
    return ledger.directory / MACHINE / f"{role}.journal"


async def test_the_journal_tells_since_when(
    directory: MachineDirectory, ledger: HostLedger, tmp_path: Path, handed_off: int
) -> None:
    """A machine without an entry here is found by its identity; the doubt is as old as the record behind it."""
    known = await examiner(directory, ledger, tmp_path).find(MACHINE)
    assert known.doubt is not None
    assert known.doubt.reason is Reason.OUTCOME_UNKNOWN
    assert known.since_unix_ns == handed_off
    (stray,) = await examiner(directory, ledger, tmp_path).strays(directory.list())
    assert (stray.uuid, stray.name) == (MACHINE, "")
    assert stray.blockage.since.ToNanoseconds() == handed_off


async def test_a_fresh_doubt_is_no_blockage(
    directory: MachineDirectory, ledger: HostLedger, tmp_path: Path
) -> None:
    """A hand-off takes its moment: no list and no count calls it blocked; who asks for this machine is told."""
    ledger.birth(MACHINE)
    with closing(ledger.open_source(MACHINE)) as log:
        for kind in (K.BEGUN, K.SEALED, K.HANDED_OFF):
            log.append(Append(record(kind), durable=kind is not K.SEALED))
    assert await examiner(directory, ledger, tmp_path).strays([]) == []
    assert not await examiner(directory, ledger, tmp_path).census()
    assert (await examiner(directory, ledger, tmp_path).find(MACHINE)).doubt is not None


async def test_what_is_gone_for_good_is_read_once_and_a_change_is_seen(
    directory: MachineDirectory, ledger: HostLedger, tmp_path: Path, handed_off: int
) -> None:
    """A host that sent thousands of machines away lists quickly; a journal that is harmed later is noticed."""
    assert handed_off
    with closing(ledger.open_source(MACHINE)) as log:
        log.append(Append(record(K.DONE)))
    for role in (Role.OPERATOR, Role.SOURCE):
        os.utime(file_of(ledger, role), (1, 1))
    looking = examiner(directory, ledger, tmp_path)
    assert await looking.strays([]) == []
    read: list[str] = []
    rights = ledger.rights

    def noted(machine_id: str) -> Rights:
        read.append(machine_id)
        return rights(machine_id)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ledger, "rights", noted)
        assert await looking.strays([]) == []
        assert read == []
        file_of(ledger, Role.SOURCE).unlink()
        (stray,) = await looking.strays([])
    assert stray.blockage.reason == "JOURNAL_DAMAGED"
    assert read


async def test_each_service_counts_its_own_half(
    directory: MachineDirectory, ledger: HostLedger, tmp_path: Path, handed_off: int
) -> None:
    """The sum over both services is the number of machines."""
    assert handed_off
    counts = [
        await examiner(directory, ledger, tmp_path, service=role).census()
        for role in (Role.SOURCE, Role.DESTINATION)
    ]
    assert counts == [{Reason.OUTCOME_UNKNOWN: 1}, {}]


async def test_the_other_hosts_word_is_part_of_it(
    directory: MachineDirectory, ledger: HostLedger, tmp_path: Path, handed_off: int
) -> None:
    """What the service heard refines the reason, and is told with its time."""
    assert handed_off
    contact = Contact()
    contact.hear_state(AttemptState.OWNED, lost_journal=False)
    looking = examiner(directory, ledger, tmp_path, service=Role.SOURCE, contact=lambda _: contact)
    seen = as_inspection(await looking.find(MACHINE), looking, host=attempt().source)
    assert seen.machine.blockage.reason == "PEER_NOT_RESUMED"
    assert (seen.peer.host, seen.peer.heard) == (B, "owned")
    assert seen.peer.HasField("heard_time")
    assert contact.word == Word(AttemptState.OWNED)


async def test_no_ticket_is_shown(directory: MachineDirectory, ledger: HostLedger, tmp_path: Path) -> None:
    """Everything of a record is shown but the ticket's number."""
    with closing(ledger.open_destination(MACHINE)) as log:
        log.append(Append(record(K.ACCEPTED)))
    looking = examiner(directory, ledger, tmp_path)
    seen = as_inspection(await looking.find(MACHINE), looking, host=B)
    (shown,) = [one for journal in seen.journals for one in journal.records]
    assert shown.kind == journal_pb2.RECORD_KIND_ACCEPTED
    assert shown.attempt.source == attempt().source
    assert not shown.ticket_nonce


@pytest.mark.parametrize("harm", ["flipped", "missing", "foreign"])
async def test_a_journal_that_cannot_be_believed_is_shown_as_far_as_it_goes(
    directory: MachineDirectory, ledger: HostLedger, tmp_path: Path, handed_off: int, harm: str
) -> None:
    """The right is unknown, the reason is told, and no time is made up; what can be read is there to be read."""
    assert handed_off
    path = file_of(ledger, Role.SOURCE)
    match harm:
        case "flipped":
            data = bytearray(path.read_bytes())
            data[2 * SLOT_BYTES] ^= 1
            path.write_bytes(data)
        case "missing":
            path.unlink()
        case "foreign":
            shutil.copy(file_of(ledger, Role.OPERATOR), path)
    known = await examiner(directory, HostLedger(ledger.directory), tmp_path).find(MACHINE)
    assert known.rights.standing is Standing.UNKNOWN
    assert known.doubt is not None
    assert known.doubt.reason is Reason.JOURNAL_DAMAGED
    assert known.since_unix_ns is None
    journals = {one.role: one for one in known.journals}
    assert journals[Role.SOURCE].damage
    assert journals[Role.SOURCE].exists == (harm != "missing")
    assert [one.record.kind for one in journals[Role.SOURCE].entries] == {
        "flipped": [K.BEGUN],
        "missing": [],
        "foreign": [K.BORN],
    }[harm]
    assert [one.record.kind for one in journals[Role.OPERATOR].entries] == [K.BORN]
    assert not journals[Role.OPERATOR].damage


async def test_journals_are_read_without_anybody_who_believes_them(
    directory: MachineDirectory, ledger: HostLedger, tmp_path: Path, handed_off: int
) -> None:
    """When not even the register can be read, the records are shown, and nothing is concluded from them."""
    assert handed_off
    looking = examiner(directory, "the register was copied", tmp_path)
    seen = as_inspection(await looking.find(MACHINE), looking, host="")
    assert seen.machine.blockage.reason == "JOURNAL_DAMAGED"
    assert seen.incarnation == ""
    assert [len(journal.records) for journal in seen.journals] == [1, 3, 0, 0]
    assert {journal.damage for journal in seen.journals} == {"the register was copied"}
    assert ledger.rights(MACHINE).standing is Standing.HANDED_OFF


@pytest.mark.parametrize("name", ["web-1", str(uuid.UUID(int=7)), "../journal", MACHINE.upper(), ""])
async def test_what_nobody_knows_is_not_found(
    directory: MachineDirectory, ledger: HostLedger, tmp_path: Path, name: str
) -> None:
    """Neither a name nor an identity nor a path that leads elsewhere; and nothing is made by asking."""
    for believed in (ledger, "nothing can be read"):
        with pytest.raises(MachineNotFoundError):
            await examiner(directory, believed, tmp_path).find(name)
    assert [path.name for path in ledger.directory.iterdir() if path.is_dir()] == []
