"""The journal of updates in place: what may follow what, what is decided, and what both mean for the right to run."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Final

import pytest

from tests.unit.handoff.samples import MACHINE, OTHER_MACHINE, attempt, record
from vmferry.errors import JournalDamagedError, MachineBusyError, MachineNotOwnedError
from vmferry.handoff import source, updating
from vmferry.handoff.ledger import HostLedger
from vmferry.handoff.rights import Standing
from vmferry.handoff.states import Append, InvalidTransitionError, Record, RecordKind, Resume, Update, Wait
from vmferry.handoff.updating import Adopt, EndNew, GiveUp, LetRun, New

K: Final = RecordKind
UPDATE: Final = Update(MACHINE, bytes(range(16)), 1)
STATES: Final = {
    "still": updating.Still(),
    "begun": updating.Begun(UPDATE),
    "switched": updating.Switched(UPDATE),
    "ran": updating.Ran(UPDATE),
}
FOLLOWS: Final = {
    ("still", K.UPDATE_BEGUN): "begun",
    ("begun", K.UPDATE_SWITCHED): "switched",
    ("switched", K.UPDATE_RAN): "ran",
    ("begun", K.UPDATE_UNDONE): "still",
    ("switched", K.UPDATE_UNDONE): "still",
    ("ran", K.UPDATE_UNDONE): "still",
    ("ran", K.UPDATE_DONE): "still",
}


def of(kind: RecordKind, update: Update | None = UPDATE) -> Record:
    """A record about an update."""
    return Record(kind, MACHINE, update=update)


@pytest.mark.parametrize("kind", RecordKind)
@pytest.mark.parametrize("name", STATES)
def test_which_record_may_follow_in_each_state(name: str, kind: RecordKind) -> None:
    """The diagram and nothing else; a closed update's number is never used again."""
    expected = FOLLOWS.get((name, kind))
    if expected is None:
        with pytest.raises(InvalidTransitionError):
            updating.evolve(STATES[name], of(kind))
        return
    after = updating.evolve(STATES[name], of(kind))
    assert after == (updating.Still(1) if expected == "still" else STATES[expected])


@pytest.mark.parametrize("name", ["begun", "switched", "ran"])
def test_nothing_of_another_update_counts(name: str) -> None:
    """Neither by another id nor by another number."""
    for kind in (K.UPDATE_SWITCHED, K.UPDATE_RAN, K.UPDATE_UNDONE, K.UPDATE_DONE):
        for other in (replace(UPDATE, update_id=bytes(16)), replace(UPDATE, number=2), None):
            with pytest.raises(InvalidTransitionError):
                updating.evolve(STATES[name], of(kind, other))


def test_a_record_that_names_no_update_does_not_begin_one() -> None:
    """Such a journal was not written by us: it is damaged, and that is said by the catalogue's error."""
    with pytest.raises(InvalidTransitionError, match="UPDATE_BEGUN without an update"):
        updating.evolve(updating.Still(), of(K.UPDATE_BEGUN, None))


def test_an_update_number_is_used_once() -> None:
    """Neither again nor backwards, in the journal and when it is wanted."""
    with pytest.raises(InvalidTransitionError):
        updating.evolve(updating.Still(1), of(K.UPDATE_BEGUN))
    with pytest.raises(InvalidTransitionError):
        updating.decide(updating.Still(1), updating.UpdateWanted(UPDATE))
    assert updating.decide(updating.Still(0), updating.UpdateWanted(UPDATE))


def words(actions: list[updating.UpdateAction]) -> list[str]:
    """Actions in short."""
    return [
        f"{do.record.kind.name}{'*' if do.durable else ''}" if isinstance(do, Append) else type(do).__name__
        for do in actions
    ]


_UNDONE: Final = ["UPDATE_UNDONE*", "EndNew"]
DECIDED: Final = {
    ("begun", True, New.GONE): [*_UNDONE, "Resume"],
    ("begun", True, New.EMPTY): [*_UNDONE, "Resume"],
    ("begun", True, New.SILENT): [*_UNDONE, "Resume"],
    ("begun", True, New.READY): [*_UNDONE, "Resume"],
    ("begun", False, New.GONE): _UNDONE,
    ("begun", False, New.EMPTY): _UNDONE,
    ("begun", False, New.SILENT): ["Wait"],
    ("begun", False, New.READY): ["UPDATE_SWITCHED*"],
    ("switched", True, New.GONE): [*_UNDONE, "Resume"],
    ("switched", True, New.SILENT): [*_UNDONE, "Resume"],
    ("switched", True, New.READY): [],
    ("switched", False, New.GONE): _UNDONE,
    ("switched", False, New.SILENT): ["Wait"],
    ("switched", False, New.READY): [],
    ("ran", True, New.GONE): ["Adopt", "UPDATE_DONE*"],
    ("ran", True, New.SILENT): ["Wait"],
    ("ran", True, New.READY): ["LetRun"],
    ("ran", False, New.GONE): ["Adopt", "UPDATE_DONE*"],
    ("ran", False, New.SILENT): ["Wait"],
    ("ran", False, New.READY): ["LetRun"],
    ("still", True, New.READY): ["EndNew"],
}


@pytest.mark.parametrize(("case", "expected"), DECIDED.items(), ids=str)
def test_what_goes_on_when_it_is_given_up(case: tuple[str, bool, New], expected: list[str]) -> None:
    """The old one, unless it is gone or the new one may have run; silence of the only copy decides nothing."""
    name, old_intact, new = case
    assert words(updating.decide(STATES[name], GiveUp("why", old_intact, new))) == expected


def test_one_that_never_ran_gives_the_guest_back() -> None:
    """Even behind RAN, but only to an old process that is there."""
    back = GiveUp("why", old_intact=True, new=New.READY, never_ran=True)
    assert words(updating.decide(STATES["ran"], back)) == [*_UNDONE, "Resume"]
    assert words(updating.decide(STATES["ran"], replace(back, old_intact=False))) == ["LetRun"]


def test_the_way_forward() -> None:
    """Step by step; what comes at another time is a fault of the caller."""
    forward = {
        "begun": (updating.Loaded(in_time=True, old_intact=True), ["UPDATE_SWITCHED*"]),
        "switched": (updating.Answered(), ["UPDATE_RAN", "LetRun"]),
        "ran": (updating.LetGo(), ["Adopt", "UPDATE_DONE*"]),
    }
    for name, state in STATES.items():
        for right, (event, expected) in forward.items():
            if name == right:
                assert words(updating.decide(state, event)) == expected
            elif right == "ran":
                assert updating.decide(state, event) == []
            else:
                with pytest.raises(InvalidTransitionError):
                    updating.decide(state, event)
    late = updating.Loaded(in_time=False, old_intact=True)
    assert words(updating.decide(STATES["begun"], late)) == [*_UNDONE, "Resume"]
    assert words(updating.decide(STATES["begun"], replace(late, old_intact=False))) == ["UPDATE_SWITCHED*"]
    with pytest.raises(InvalidTransitionError):
        updating.decide(STATES["begun"], updating.UpdateWanted(replace(UPDATE, number=2)))


def test_why_is_kept() -> None:
    """The reason stands in the record that closes an update, for whoever reads it at night."""
    done = updating.decide(STATES["ran"], GiveUp("it crashed", old_intact=False, new=New.GONE))[-1]
    undone = updating.decide(STATES["begun"], GiveUp("too long", old_intact=True, new=New.GONE))[0]
    assert isinstance(done, Append)
    assert isinstance(undone, Append)
    assert (done.record.note, undone.record.note) == ("it crashed", "too long")
    assert {type(one) for one in (Resume(), Wait(""), EndNew(), LetRun(), Adopt())}


# What it means for the right to run


@pytest.fixture
def ledger(tmp_path: Path) -> HostLedger:
    """A host's journals, with a machine that was born here."""
    found = HostLedger(tmp_path / "journals")
    found.birth(MACHINE)
    return found


def write(ledger: HostLedger, *kinds: RecordKind) -> None:
    """Append records about the update, as its decisions do."""
    with closing(ledger.open_update(MACHINE)) as log:
        for kind in kinds:
            log.append(Append(of(kind), durable=kind is not K.UPDATE_RAN))


@pytest.mark.parametrize("count", [1, 2, 3])
async def test_while_an_update_is_open_the_old_one_has_no_permit(ledger: HostLedger, count: int) -> None:
    """It is neither resumed nor sent away nor ended; the new one has a permit from RAN on."""
    write(ledger, *(K.UPDATE_BEGUN, K.UPDATE_SWITCHED, K.UPDATE_RAN)[:count])
    assert ledger.rights(MACHINE).standing is Standing.OWNED
    assert ledger.rights(MACHINE).being_updated
    assert not ledger.rights(MACHINE).permitted  # nor sent away, told to be blocked or resumed at a start
    for use in (ledger.permit, ledger.end):
        with pytest.raises(MachineBusyError, match="being updated in place"):
            use(MACHINE)
    if count == 3:
        async with ledger.for_update(MACHINE) as permit:
            assert (permit.machine_id, permit.epoch) == (MACHINE, 1)
    else:
        with pytest.raises(MachineNotOwnedError):
            async with ledger.for_update(MACHINE):
                pass


@pytest.mark.parametrize("last", [K.UPDATE_DONE, K.UPDATE_UNDONE])
async def test_once_it_is_closed_the_usual_permit_is_back(ledger: HostLedger, last: RecordKind) -> None:
    """And the new process has none of its own any more."""
    write(ledger, K.UPDATE_BEGUN, K.UPDATE_SWITCHED, K.UPDATE_RAN, last)
    assert ledger.permit(MACHINE).epoch == 1
    assert ledger.rights(MACHINE).permitted
    with pytest.raises(MachineNotOwnedError):
        async with ledger.for_update(MACHINE):
            pass
    with closing(ledger.open_update(MACHINE)) as log:
        assert log.state == updating.Still(1)


async def test_a_right_that_went_elsewhere_lets_no_new_process_run(ledger: HostLedger) -> None:
    """Superseded meanwhile, or on its way, or damaged."""
    write(ledger, K.UPDATE_BEGUN, K.UPDATE_SWITCHED, K.UPDATE_RAN)
    rights = ledger.rights(MACHINE)
    assert rights.may_let_run
    assert not replace(rights, damaged=True).may_let_run
    assert not replace(rights, outgoing=source.Begun(attempt())).may_let_run
    assert not replace(rights, epochs=replace(rights.epochs, left=1)).may_let_run


def test_a_machine_that_nobody_owns_is_not_told_to_be_busy(ledger: HostLedger) -> None:
    """Where the right is elsewhere, that is what is said."""
    write(ledger, K.UPDATE_BEGUN)
    with closing(ledger.open_source(MACHINE)) as log:
        for kind in (K.BEGUN, K.SEALED, K.HANDED_OFF):
            log.append(Append(record(kind, attempt())))
    with pytest.raises(MachineNotOwnedError):
        ledger.permit(MACHINE)


def test_a_journal_of_updates_is_read_back(ledger: HostLedger) -> None:
    """Another process sees the same, by the register and the file."""
    write(ledger, K.UPDATE_BEGUN, K.UPDATE_SWITCHED)
    again = HostLedger(ledger.directory)
    assert again.rights(MACHINE).update == updating.Switched(UPDATE)
    assert again.machines() == [MACHINE]
    assert again.rights(OTHER_MACHINE).update == updating.Still()


def test_a_record_of_another_kind_is_damage(ledger: HostLedger) -> None:
    """A journal of updates that says something else permits nothing."""
    with closing(ledger.open_update(MACHINE)) as log:
        log.append(Append(of(K.UPDATE_BEGUN)))
        log._journal.append(ledger._encode(of(K.UPDATE_DONE)), durable=True)  # as no decision does
    assert ledger.rights(MACHINE).damaged
    with pytest.raises(JournalDamagedError):
        ledger.open_update(MACHINE)
