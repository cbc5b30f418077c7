"""What a host's journals say together when a hand-off is settled by another way, or by an operator's word."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Final

import pytest

from tests.unit.handoff.samples import ADMIN, A, B, C, attempt, record
from vmferry.handoff import destination, source
from vmferry.handoff.ledger import HostLedger
from vmferry.handoff.rights import Standing
from vmferry.handoff.states import Append, Attempt, AttemptState, RecordKind

K: Final = RecordKind
MACHINE: Final = attempt().machine_id
AWAY: Final = attempt(1, epoch=1, source=A, destination=B)
BACK: Final = attempt(1, epoch=2, source=B, destination=A)
FROM_A_THIRD: Final = attempt(4, epoch=3, source=C, destination=A)
OF_THE_SAME_RIGHT: Final = attempt(2, epoch=1, source=C, destination=A)


@pytest.fixture
def ledger(tmp_path: Path) -> HostLedger:
    """A host on which the machine was born, and from which it was handed off without any word since."""
    ledger = HostLedger(tmp_path / "journals")
    ledger.birth(MACHINE)
    write(ledger, AWAY, K.BEGUN, K.SEALED, K.HANDED_OFF)
    return ledger


def write(ledger: HostLedger, about: Attempt, *kinds: RecordKind) -> None:
    """Append records about one attempt, to the journal of the role that this host has in it."""
    log = ledger.open_source(MACHINE) if about.source == A else ledger.open_destination(MACHINE)
    with closing(log):
        for kind in kinds:
            log.append(Append(record(kind, about)))


def test_a_machine_that_was_handed_off_is_let_in_by_a_later_right_only(ledger: HostLedger) -> None:
    """Rule 4: nobody has a later right unless the hand-off was completed; nobody else brings the machine here."""
    rights = ledger.rights(MACHINE)
    assert rights.standing is Standing.HANDED_OFF
    assert rights.admits(BACK)
    assert rights.admits(FROM_A_THIRD)
    assert not rights.admits(OF_THE_SAME_RIGHT)


def test_a_host_without_the_machine_lets_it_in_and_waits_for_no_word(tmp_path: Path) -> None:
    """Nothing was handed off there, so there is nothing to be settled by a return."""
    rights = HostLedger(tmp_path / "another").rights(MACHINE)
    assert rights.admits(AWAY)
    assert not rights.awaits_word
    assert not rights.proved_gone_by(BACK)


def test_a_damaged_host_neither_runs_it_nor_lets_it_in(ledger: HostLedger) -> None:
    """Whatever the readable part says: the owner's right is not used, and a return settles nothing."""
    rights = replace(ledger.rights(MACHINE), damaged=True)
    assert not rights.admits(BACK)
    assert not rights.awaits_word
    owner = replace(rights, outgoing=source.Quiet(), epochs=replace(rights.epochs, granted=9))
    assert owner.owner
    assert not owner.permitted


def test_how_it_came_here_does_not_settle_how_it_left(ledger: HostLedger) -> None:
    """The attempt by which it arrived is older than its hand-off, and proves nothing about that."""
    write(ledger, BACK, K.ACCEPTED, K.PREPARED, K.OWNED, K.RAN)
    write(ledger, AWAY, K.DONE)
    write(ledger, attempt(2, epoch=3, source=A, destination=B), K.BEGUN, K.SEALED, K.HANDED_OFF)
    rights = ledger.rights(MACHINE)
    assert not rights.moved_on
    assert rights.standing is Standing.HANDED_OFF


@pytest.mark.parametrize("kinds", [(K.ACCEPTED,), (K.ACCEPTED, K.PREPARED), (K.ACCEPTED, K.REFUSED)])
def test_an_accepted_return_settles_the_hand_off(ledger: HostLedger, kinds: tuple[RecordKind, ...]) -> None:
    """The hand-off does not come back to life, whatever becomes of the return, and grants nothing here."""
    write(ledger, BACK, *kinds)
    rights = ledger.rights(MACHINE)
    assert rights.moved_on
    assert not rights.leaving
    assert not rights.permitted
    assert rights.standing is (Standing.GONE if K.REFUSED in kinds else Standing.ARRIVING)


def test_a_machine_that_came_back_may_run_before_the_old_hand_off_is_closed(ledger: HostLedger) -> None:
    """The permit is of the later right, and a second return is refused as by any owner."""
    write(ledger, BACK, K.ACCEPTED, K.PREPARED, K.OWNED)
    assert ledger.permit(MACHINE).epoch == BACK.epoch_to
    assert not ledger.rights(MACHINE).admits(FROM_A_THIRD)
    with closing(ledger.open_source(MACHINE)) as log:
        for action in source.decide(log.state, source.OwnerBegan(BACK)):
            if isinstance(action, Append):
                log.append(action)
    assert ledger.permit(MACHINE).epoch == BACK.epoch_to
    assert not ledger.rights(MACHINE).moved_on


def test_an_attempt_that_is_on_its_way_out_is_settled_by_nobody_else(tmp_path: Path) -> None:
    """Before the right was given up, no Begin of anybody proves anything."""
    ledger = HostLedger(tmp_path / "journals")
    ledger.birth(MACHINE)
    for kind in (K.BEGUN, K.SEALED):
        write(ledger, AWAY, kind)
        assert not ledger.rights(MACHINE).admits(BACK)


def test_a_forced_reclaim_is_later_than_what_the_destination_may_have(ledger: HostLedger) -> None:
    """It closes the attempt, is read back with who and why, and gives the right e + 2."""
    with closing(ledger.open_source(MACHINE)) as log:
        event = source.ForceReclaim(
            ADMIN, "switch port 7 is down", memory_intact=True, with_memory=True, moved_on=False
        )
        for action in source.decide(log.state, event):
            if isinstance(action, Append):
                log.append(action)
        assert log.state == source.Quiet(AWAY.number)
    assert ledger.permit(MACHINE).epoch == AWAY.epoch_from + 2


def test_a_forced_accept_is_the_right_that_was_to_be_handed_over(tmp_path: Path) -> None:
    """It takes the place of OWNED, so that the source, should it come back, is told what became of the attempt."""
    ledger = HostLedger(tmp_path / "journals")
    write(ledger, BACK, K.ACCEPTED, K.PREPARED)
    with closing(ledger.open_destination(MACHINE)) as log:
        event = destination.ForceAccept(ADMIN, "its power is off", copy_intact=True, with_memory=True)
        for action in destination.decide(log.state, event):
            if isinstance(action, Append):
                log.append(action)
        assert destination.answer(log.state, BACK).state is AttemptState.OWNED
    assert ledger.permit(MACHINE).epoch == BACK.epoch_to


def test_a_guest_runs_on_only_where_the_right_is(ledger: HostLedger) -> None:
    """An open attempt alone lets no guest go on while it is copied."""
    begun = replace(ledger.rights(MACHINE), outgoing=source.Begun(AWAY))
    assert not begun.owner
    assert not begun.runs_on
    assert replace(begun, epochs=replace(begun.epochs, granted=9)).runs_on


def test_only_a_right_that_was_taken_later_shows_that_it_came_back(ledger: HostLedger) -> None:
    """What is on its way here proves nothing yet, nor does the way on which the machine came before it left."""
    assert not ledger.rights(MACHINE).came_back_after(AWAY)
    write(ledger, BACK, K.ACCEPTED, K.PREPARED)
    assert not ledger.rights(MACHINE).came_back_after(AWAY)
    write(ledger, BACK, K.OWNED)
    assert ledger.rights(MACHINE).came_back_after(AWAY)
    assert not ledger.rights(MACHINE).came_back_after(FROM_A_THIRD)
