"""All journals of one host together: birth and end, who sees what, who may write, and what damage does."""

from __future__ import annotations

import fcntl
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Final

import pytest

from tests.unit.handoff.samples import MACHINE, OTHER_MACHINE, attempt, record
from vmferry.errors import (
    ConfigError,
    InvalidArgumentError,
    JournalDamagedError,
    MachineBusyError,
    MachineExistsError,
    MachineNotOwnedError,
)
from vmferry.handoff import destination, journal, records, source
from vmferry.handoff.ledger import HostLedger, Role
from vmferry.handoff.register import Register
from vmferry.handoff.rights import Standing
from vmferry.handoff.states import Append, Attempt, InvalidTransitionError, Record, RecordKind, Update

K: Final = RecordKind
AWAY: Final = attempt(1, epoch=1)
BACK: Final = attempt(1, epoch=2)
REPOSITORY: Final = Path(__file__).parents[3]


@pytest.fixture
def ledger(tmp_path: Path) -> HostLedger:
    return HostLedger(tmp_path / "journals")


def write(ledger: HostLedger, about: Attempt, *kinds: RecordKind) -> None:
    """Append records about one attempt to the journal of their role."""
    outgoing = kinds[0].value < RecordKind.ACCEPTED.value
    log = ledger.open_source(MACHINE) if outgoing else ledger.open_destination(MACHINE)
    with closing(log):
        for kind in kinds:
            log.append(Append(record(kind, about), durable=kind not in {K.SEALED, K.PREPARED, K.RAN}))


def file_of(ledger: HostLedger, role: Role) -> Path:
    return ledger.directory / MACHINE / f"{role}.journal"


# Birth and end


def test_a_born_machine_may_run_here(ledger: HostLedger) -> None:
    """Birth gives a permit of the first epoch, and the right is read back by anybody."""
    permit = ledger.birth(MACHINE)
    assert (permit.machine_id, permit.epoch) == (MACHINE, 1)
    again = HostLedger(ledger.directory)
    assert again.rights(MACHINE).standing is Standing.OWNED
    assert again.permit(MACHINE) == permit
    assert again.machines() == [MACHINE]


def test_a_machine_is_born_once(ledger: HostLedger) -> None:
    """Neither a living nor an ended machine can be born again."""
    ledger.birth(MACHINE)
    with pytest.raises(MachineExistsError):
        ledger.birth(MACHINE)
    ledger.end(MACHINE)
    with pytest.raises(MachineExistsError):
        ledger.birth(MACHINE)


@pytest.mark.parametrize(
    "kinds",
    [
        (K.ACCEPTED,),
        (K.ACCEPTED, K.PREPARED),
        (K.ACCEPTED, K.PREPARED, K.OWNED),
        (K.ACCEPTED, K.REFUSED),
        (K.REFUSED,),
    ],
    ids=lambda kinds: kinds[-1].name,
)
def test_a_machine_that_came_from_elsewhere_is_not_born(
    ledger: HostLedger, kinds: tuple[RecordKind, ...]
) -> None:
    """Whatever a destination's journal says of it: the machine exists already, somewhere."""
    write(ledger, BACK, *kinds)
    with pytest.raises(MachineExistsError):
        ledger.birth(MACHINE)
    assert not file_of(ledger, Role.OPERATOR).exists()


@pytest.mark.parametrize("role", [Role.SOURCE, Role.DESTINATION])
def test_a_machine_with_a_damaged_journal_is_not_born(ledger: HostLedger, role: Role) -> None:
    """What cannot be read may say that the machine runs elsewhere."""
    file_of(ledger, role).parent.mkdir()
    file_of(ledger, role).write_bytes(b"not a journal")
    with pytest.raises(MachineExistsError):
        ledger.birth(MACHINE)


def test_an_ended_machine_may_not_run(ledger: HostLedger) -> None:
    """After its end there is no permit, and no second end."""
    ledger.birth(MACHINE)
    ledger.end(MACHINE)
    for use in (ledger.permit, ledger.end):
        with pytest.raises(MachineNotOwnedError):
            use(MACHINE)


def test_a_machine_that_arrived_can_be_ended(ledger: HostLedger) -> None:
    """Its end closes the right it came with, and it may come again with a later one."""
    write(ledger, BACK, K.ACCEPTED, K.PREPARED, K.OWNED)
    assert ledger.permit(MACHINE).epoch == 3
    ledger.end(MACHINE)
    assert ledger.rights(MACHINE).standing is Standing.GONE
    write(ledger, attempt(1, epoch=5), K.ACCEPTED, K.PREPARED, K.OWNED)
    assert ledger.permit(MACHINE).epoch == 6


@pytest.mark.parametrize("kinds", [(K.BEGUN,), (K.BEGUN, K.SEALED), (K.BEGUN, K.SEALED, K.HANDED_OFF)])
def test_a_machine_on_its_way_out_is_not_ended(ledger: HostLedger, kinds: tuple[RecordKind, ...]) -> None:
    """Its end would leave the copy at the destination with nobody to say what became of it."""
    ledger.birth(MACHINE)
    write(ledger, AWAY, *kinds)
    with pytest.raises(MachineBusyError, match="being migrated away"):
        ledger.end(MACHINE)


def test_somebody_elses_machine_is_not_ended(ledger: HostLedger) -> None:
    """Neither an unknown machine nor one that went away or is only arriving is this host's to end."""
    with pytest.raises(MachineNotOwnedError):
        ledger.end(OTHER_MACHINE)
    write(ledger, BACK, K.ACCEPTED, K.PREPARED)
    with pytest.raises(MachineNotOwnedError):
        ledger.end(MACHINE)
    assert ledger.machines() == [MACHINE]  # asking about a machine does not make it known


@pytest.mark.parametrize("text", ["", "..", "a/b", MACHINE.upper(), MACHINE + "\n", "incarnation"])
def test_a_machine_is_named_by_a_uuid_only(ledger: HostLedger, text: str) -> None:
    """No other name reaches the file system."""
    for use in (ledger.birth, ledger.end, ledger.rights, ledger.permit, ledger.open_source):
        with pytest.raises(InvalidArgumentError):
            use(text)


_BIRTH: Final = """
import sys
from pathlib import Path
from vmferry.errors import MachineExistsError
from vmferry.handoff.ledger import HostLedger
ledger = HostLedger(Path(sys.argv[1]))
sys.stdin.readline()
for machine in sys.argv[2:]:
    try:
        ledger.birth(machine)
        print(machine)
    except MachineExistsError:
        pass
"""


def test_of_two_births_one_wins(ledger: HostLedger) -> None:
    """Two processes that give birth to the same machines at once share them: each machine is born exactly once."""
    machines = [str(uuid.UUID(int=number + 1)) for number in range(40)]
    command = [sys.executable, "-c", _BIRTH, str(ledger.directory), *machines]
    racers = [
        subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    try:
        for racer in racers:
            assert racer.stdin is not None
            racer.stdin.write("\n")
            racer.stdin.flush()
        born = [racer.communicate(timeout=60)[0].split() for racer in racers]
    finally:
        for racer in racers:
            racer.kill()
            racer.communicate()
    assert [racer.returncode for racer in racers] == [0, 0]
    assert sorted(born[0] + born[1]) == machines
    assert all(ledger.rights(machine).permitted for machine in machines)


# Views over all roles


def test_each_role_sees_what_the_others_wrote(ledger: HostLedger) -> None:
    """A machine that leaves and comes back: at each record everybody's view is that of all journals together."""
    seen = []

    def look() -> None:
        seen.append(ledger.rights(MACHINE).standing)

    ledger.birth(MACHINE)
    look()
    for about, kinds in (
        (AWAY, (K.BEGUN, K.SEALED, K.HANDED_OFF, K.DONE)),
        (BACK, (K.ACCEPTED, K.PREPARED, K.OWNED, K.RAN)),
        (attempt(2, epoch=3), (K.BEGUN, K.ABORTED)),
    ):
        for kind in kinds:
            write(ledger, about, kind)
            look()
    assert [standing.name for standing in seen] == [
        *("OWNED", "LEAVING", "LEAVING", "HANDED_OFF", "GONE"),
        *("ARRIVING", "ARRIVING", "OWNED", "OWNED"),
        *("LEAVING", "OWNED"),
    ]
    assert ledger.permit(MACHINE).epoch == 3
    assert ledger.rights(MACHINE).epoch == 3


def test_machines_are_listed_by_role(ledger: HostLedger) -> None:
    """All machines of the host, or those of which one role has a journal; other folders are none."""
    ledger.birth(OTHER_MACHINE)
    write(ledger, BACK, K.ACCEPTED)
    (ledger.directory / "lost+found").mkdir()
    assert ledger.machines() == sorted([MACHINE, OTHER_MACHINE])
    assert ledger.machines(Role.DESTINATION) == [MACHINE]
    assert ledger.machines(Role.SOURCE) == []


def test_a_reopened_journal_goes_on_where_it_ended(ledger: HostLedger) -> None:
    """State and past answers come back from the file."""
    write(ledger, BACK, K.ACCEPTED, K.PREPARED)
    with closing(ledger.open_destination(MACHINE)) as log:
        assert log.state.current == destination.Prepared(BACK, record(K.PREPARED, BACK).digest)
        assert not log.torn_tail
    with closing(ledger.open_source(MACHINE)) as empty:
        assert empty.state == source.Quiet()


def test_what_cannot_follow_is_not_written(ledger: HostLedger) -> None:
    """A record that the state does not allow is refused before it reaches the file."""
    ledger.birth(MACHINE)
    with closing(ledger.open_source(MACHINE)) as log:
        for kind in set(K) - {K.BEGUN, K.SUPERSEDED}:
            with pytest.raises(InvalidTransitionError):
                log.append(Append(record(kind, AWAY)))
        assert log.state == source.Quiet()
    assert ledger.permit(MACHINE)


def test_goodbyes_are_owed_for_what_was_closed_by_the_present_right_or_an_operator(
    ledger: HostLedger,
) -> None:
    """Closed attempts are told of; those that were completed are not, nor those of a right of long ago."""
    ledger.birth(MACHINE)
    aborted, forced, done = (attempt(number) for number in (1, 2, 3))
    write(ledger, aborted, K.BEGUN, K.ABORTED)
    assert ledger.goodbyes(MACHINE) == (aborted,)
    write(ledger, forced, K.BEGUN, K.SEALED, K.HANDED_OFF)
    with closing(ledger.open_source(MACHINE)) as log:
        log.append(Append(replace(record(K.FORCED, forced), epoch=5)))
    assert ledger.goodbyes(MACHINE) == (forced,)
    assert [one.attempt for one in ledger.forced(MACHINE, Role.SOURCE)] == [forced]
    write(ledger, done, K.BEGUN, K.SEALED, K.HANDED_OFF, K.DONE)
    assert ledger.goodbyes(MACHINE) == (forced,)


def test_a_goodbye_is_owed_for_a_hand_off_that_came_back(ledger: HostLedger) -> None:
    """The right came back with a higher number, and the destination may not know that it was given back."""
    ledger.birth(MACHINE)
    back = attempt(1)
    write(ledger, back, K.BEGUN, K.SEALED, K.HANDED_OFF)
    with closing(ledger.open_source(MACHINE)) as log:
        log.append(Append(replace(record(K.RECLAIMED, back), epoch=back.epoch_from + 2)))
    assert ledger.rights(MACHINE).epochs.granted == back.epoch_from + 2
    assert ledger.goodbyes(MACHINE) == (back,)


def test_a_superseded_copy_is_ended_by_its_operator_alone(ledger: HostLedger) -> None:
    """It may not run, nothing else ends it, and afterwards the machine is gone from here."""
    write(ledger, BACK, K.ACCEPTED, K.PREPARED, K.OWNED)
    with closing(ledger.open_destination(MACHINE)) as log:
        log.append(Append(replace(record(K.SUPERSEDED, BACK), epoch=BACK.epoch_to)))
    assert ledger.rights(MACHINE).standing is Standing.SUPERSEDED
    with pytest.raises(MachineNotOwnedError):
        ledger.permit(MACHINE)
    ledger.end(MACHINE)
    assert ledger.rights(MACHINE).standing is Standing.GONE
    with pytest.raises(MachineNotOwnedError):
        ledger.end(MACHINE)


# Damage


def damage(path: Path, slot: int) -> None:
    """Flip a bit."""
    data = bytearray(path.read_bytes())
    data[slot * journal.SLOT_BYTES + 60] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("role", Role)
def test_a_damaged_journal_of_any_role_permits_nothing(ledger: HostLedger, role: Role) -> None:
    """The view is UNKNOWN, nothing is minted, taken in or ended, and the journal is not opened for writing."""
    ledger.birth(MACHINE)
    write(ledger, AWAY, K.BEGUN, K.SEALED, K.ABORTED)
    write(ledger, BACK, K.REFUSED)
    with closing(ledger.open_update(MACHINE)) as log:
        log.append(Append(Record(K.UPDATE_BEGUN, MACHINE, update=Update(MACHINE, bytes(16), 1))))
    damage(file_of(ledger, role), slot=0)
    rights = ledger.rights(MACHINE)
    assert rights.standing is Standing.UNKNOWN
    assert rights.holds
    for use in (ledger.permit, ledger.end):
        with pytest.raises(JournalDamagedError):
            use(MACHINE)
    opens = {Role.SOURCE: ledger.open_source, Role.DESTINATION: ledger.open_destination}
    if role is not Role.OPERATOR:
        with pytest.raises(JournalDamagedError):
            opens.get(role, ledger.open_update)(MACHINE)


def test_a_rotten_handover_is_damage(ledger: HostLedger) -> None:
    """With HANDED_OFF rotted at the end the register knows that it was on disk: nothing may be concluded here."""
    ledger.birth(MACHINE)
    write(ledger, AWAY, K.BEGUN, K.SEALED, K.HANDED_OFF)
    damage(file_of(ledger, Role.SOURCE), slot=3)
    assert ledger.rights(MACHINE).standing is Standing.UNKNOWN
    with pytest.raises(JournalDamagedError):
        ledger.permit(MACHINE)
    with pytest.raises(JournalDamagedError, match="gone"):
        ledger.open_source(MACHINE)


def test_a_torn_handover_is_not_taken_for_an_open_right(
    ledger: HostLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the register had not been told yet the source is LEAVING and uncertain: no permit, and it must ask."""
    ledger.birth(MACHINE)
    write(ledger, AWAY, K.BEGUN, K.SEALED)
    with monkeypatch.context() as patch:
        patch.setattr(Register, "note", lambda *_, **__: None)
        write(ledger, AWAY, K.HANDED_OFF)
    damage(file_of(ledger, Role.SOURCE), slot=3)
    assert ledger.rights(MACHINE).standing is Standing.LEAVING
    with pytest.raises(MachineNotOwnedError):
        ledger.permit(MACHINE)
    with closing(ledger.open_source(MACHINE)) as log:
        assert log.torn_tail
        assert isinstance(log.state, source.Sealed)


def test_a_record_that_cannot_be_read_is_damage(ledger: HostLedger) -> None:
    """A whole slot with something a later release wrote is neither skipped nor guessed at, by reader or writer."""
    write(ledger, BACK, K.ACCEPTED)
    path, label = ledger._file(MACHINE, Role.DESTINATION)
    log = journal.Journal(path, label)
    log.append(b"\x08\x63", durable=True)  # kind 99
    log.close()
    assert ledger.rights(MACHINE).standing is Standing.UNKNOWN
    with pytest.raises(JournalDamagedError):
        ledger.open_destination(MACHINE)


def test_records_in_an_order_that_cannot_be_are_damage(ledger: HostLedger) -> None:
    """Whole slots whose records contradict each other are not believed either."""
    path, label = ledger._file(MACHINE, Role.SOURCE)
    ledger.birth(MACHINE)
    ledger.open_source(MACHINE).close()
    log = journal.Journal(path, label)
    log.append(records.encode(record(K.DONE, AWAY), boot_id="", write_unix_ns=0), durable=True)
    log.close()
    assert ledger.rights(MACHINE).standing is Standing.UNKNOWN
    with pytest.raises(JournalDamagedError, match="DONE cannot follow Quiet"):
        ledger.open_source(MACHINE)


_HISTORY: Final = {
    Role.SOURCE: (record(K.BEGUN, AWAY), record(K.ABORTED, AWAY)),
    Role.DESTINATION: (record(K.ACCEPTED, BACK), record(K.REFUSED, BACK)),
    Role.UPDATE: tuple(
        Record(kind, MACHINE, update=Update(MACHINE, bytes(16), 1))
        for kind in (K.UPDATE_BEGUN, K.UPDATE_UNDONE)
    ),
}


@pytest.mark.parametrize("wrong", [None, *_HISTORY])
def test_which_journal_is_not_to_be_believed_is_said(ledger: HostLedger, wrong: Role | None) -> None:
    """Whoever reads at night what a host has sees which of its journals contradicts itself, and how."""
    ledger.birth(MACHINE)
    opens = {Role.SOURCE: ledger.open_source, Role.DESTINATION: ledger.open_destination}
    for role, (first, last) in _HISTORY.items():
        with closing(opens.get(role, ledger.open_update)(MACHINE)) as log:
            log.append(Append(first))
            log.append(Append(last))
            if role is wrong:
                log._journal.append(ledger._encode(last), durable=True)  # as no decision does
    health = ledger.health(MACHINE)
    assert {role for role, one in health.items() if one.damage} == ({wrong} if wrong else set())
    assert not any(one.torn_tail for one in health.values())
    if wrong:
        assert health[wrong].damage.startswith(f"{_HISTORY[wrong][1].kind.name} cannot follow")


@pytest.mark.parametrize("wrong", ["role", "machine", "host"])
def test_a_journal_in_the_wrong_place_is_damage(ledger: HostLedger, tmp_path: Path, wrong: str) -> None:
    """A file of another role, machine or host is not believed."""
    write(ledger, BACK, K.ACCEPTED, K.PREPARED, K.OWNED)
    data = file_of(ledger, Role.DESTINATION).read_bytes()
    other = HostLedger(tmp_path / "other") if wrong == "host" else ledger
    machine = OTHER_MACHINE if wrong == "machine" else MACHINE
    role = Role.OPERATOR if wrong == "role" else Role.DESTINATION
    folder = other.directory / machine
    folder.mkdir(exist_ok=True)
    (folder / f"{role}.journal").write_bytes(data)
    assert other.rights(machine).standing is Standing.UNKNOWN
    with pytest.raises(JournalDamagedError):
        other.permit(machine)


# Writers


def test_a_role_has_one_writer(ledger: HostLedger) -> None:
    """A second service of the same role is turned away until the first one has ended; other roles are not."""
    with closing(ledger.lock_role(Role.SOURCE)):
        with pytest.raises(ConfigError):
            ledger.lock_role(Role.SOURCE)
        ledger.lock_role(Role.DESTINATION).close()
    ledger.lock_role(Role.SOURCE).close()


@pytest.fixture
def other_service(ledger: HostLedger) -> Iterator[subprocess.Popen[str]]:
    """Another process that has the destination's role."""
    script = (
        "import sys; from pathlib import Path; from vmferry.handoff.ledger import HostLedger, Role;"
        "lock = HostLedger(Path(sys.argv[1])).lock_role(Role.DESTINATION); print('locked', flush=True);"
        "sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, str(ledger.directory)]
    with subprocess.Popen(
        command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        process.kill()


def test_a_killed_service_gives_its_role_back(
    ledger: HostLedger, other_service: subprocess.Popen[str]
) -> None:
    """The role is held by the process, not by a file that it leaves behind."""
    assert other_service.stdout is not None
    assert other_service.stdout.readline() == "locked\n"
    with pytest.raises(ConfigError):
        ledger.lock_role(Role.DESTINATION)
    other_service.kill()
    other_service.wait(timeout=30)
    ledger.lock_role(Role.DESTINATION).close()


def test_the_machine_lock_keeps_others_out(ledger: HostLedger) -> None:
    """While it is held nobody else gets the machine's lock; another machine's is free."""
    with (
        ledger.machine_lock(MACHINE),
        ledger.machine_lock(OTHER_MACHINE),
        (ledger.directory / MACHINE / "lock").open("w") as file,
        pytest.raises(BlockingIOError),
    ):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with ledger.machine_lock(MACHINE):
        pass


# Incarnation


def test_an_incarnation_stays_with_its_journals(ledger: HostLedger, tmp_path: Path) -> None:
    """It is the same at every start, and another one in another directory."""
    assert HostLedger(ledger.directory).incarnation == ledger.incarnation
    assert HostLedger(tmp_path / "other").incarnation != ledger.incarnation
    assert str(uuid.UUID(ledger.incarnation)) == ledger.incarnation
    assert [entry.name for entry in ledger.directory.iterdir()] == ["register"]


@pytest.mark.parametrize("content", [b"", b"\0" * 1024, b"\xff" * 1024, b"none"])
def test_a_damaged_register_is_not_used(ledger: HostLedger, content: bytes) -> None:
    """An empty incarnation would fit everybody's: the ledger is not opened."""
    (ledger.directory / "register").write_bytes(content)
    with pytest.raises(JournalDamagedError, match="register"):
        HostLedger(ledger.directory)


def test_journals_without_their_incarnation_are_not_believed(ledger: HostLedger) -> None:
    """A host that lost the file is another one, and says so rather than running what the old one owned."""
    ledger.birth(MACHINE)
    (ledger.directory / "register").unlink()
    assert HostLedger(ledger.directory).rights(MACHINE).standing is Standing.UNKNOWN
