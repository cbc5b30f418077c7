"""The destination's rules by name: what it never does, whatever arrives in whichever order."""

from __future__ import annotations

from dataclasses import replace
from functools import reduce
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.handoff.destination_table import (
    ACCEPTED,
    AGAIN,
    EVENTS,
    LATER_OWNER,
    MINE,
    NEWER,
    OLDER,
    OWNED,
    PREPARED,
    REFUSE,
    STATES,
    TABLE,
    TOMBSTONE,
    begin,
    did,
    folded,
)
from tests.unit.handoff.samples import (
    DIGEST,
    A,
    B,
    C,
    attempt,
    foreign_attempts,
    record,
)
from vmferry.errors import (
    InvalidArgumentError,
    MachineExistsError,
    StaleAttemptError,
    TicketUsedError,
    VmferryError,
    WrongPhaseError,
)
from vmferry.handoff.destination import (
    CloseAsked,
    CopyLost,
    DestinationState,
    Empty,
    ForceAccept,
    GoAsked,
    Owned,
    Refused,
    Stalled,
    StatusAsked,
    Verified,
    answer,
    decide,
    evolve,
)
from vmferry.handoff.states import (
    Answer,
    Append,
    AttemptState,
    InvalidTransitionError,
    Record,
    RecordKind,
    Release,
    Resume,
    Wait,
)


@pytest.mark.parametrize("state", ["receiving", "prepared", "owned"])
def test_rule_7_nothing_of_another_attempt_counts(state: str) -> None:
    """No Seal and no Go of an attempt that differs in any one thing is acted on."""
    for other in foreign_attempts(MINE):
        assert answer(STATES[state], other).state is AttemptState.UNSEEN
        assert did(decide(STATES[state], GoAsked(other, DIGEST, copy_intact=True))) == "(UNSEEN)"
        with pytest.raises(WrongPhaseError):
            decide(STATES[state], Verified(other, DIGEST))
        for kind in set(RecordKind) - {RecordKind.ACCEPTED, RecordKind.REFUSED}:
            with pytest.raises(InvalidTransitionError):
                evolve(STATES[state], record(kind, other))


@pytest.mark.parametrize("state", [name for name in STATES if name != "empty"])
def test_rule_1_an_older_attempt_is_refused_for_ever(state: str) -> None:
    """Whatever became of the newer one, a late Begin of an older attempt finds no way in."""
    with pytest.raises(StaleAttemptError):
        decide(STATES[state], begin(OLDER))
    with pytest.raises(InvalidTransitionError):
        evolve(STATES[state], record(RecordKind.ACCEPTED, OLDER))


@pytest.mark.parametrize("state", [name for name in STATES if name != "receiving"])
def test_rule_3_a_host_that_holds_the_machine_takes_none_in(state: str) -> None:
    """No Begin is accepted by an owner or by a host with an attempt open that takes the machine away."""
    for about in (MINE, NEWER, LATER_OWNER, AGAIN):
        with pytest.raises((MachineExistsError, WrongPhaseError)):
            decide(STATES[state], begin(about, holds=True))


def test_rule_5_an_unseen_attempt_is_not_refused_without_a_tombstone() -> None:
    """REFUSED about an attempt that the journal does not know is answered only behind a durable record."""
    for event in (CloseAsked(MINE, "reason"), StatusAsked(MINE)):
        actions = decide(DestinationState(), event)
        assert did(actions) == TOMBSTONE
        assert isinstance(actions[0], Append)
        after = evolve(DestinationState(), actions[0].record)
        with pytest.raises(StaleAttemptError):
            decide(after, begin(MINE))
    assert answer(DestinationState(), MINE).state is AttemptState.UNSEEN


def test_rule_8_what_moves_the_right_is_on_disk_before_anything_follows() -> None:
    """Only PREPARED and RAN are lazy; REFUSED and a resume are said or done behind a durable record only."""
    lazy = {RecordKind.PREPARED, RecordKind.RAN}
    for state in STATES.values():
        for event in EVENTS.values():
            try:
                actions = decide(state, event)
            except VmferryError:
                continue
            written: list[RecordKind] = []
            for action in actions:
                if isinstance(action, Append):
                    assert action.durable == (action.record.kind not in lazy)
                    written.append(action.record.kind)
                elif isinstance(action, Resume):
                    taken = {RecordKind.OWNED, RecordKind.FORCED} & set(written)
                    assert taken or isinstance(state.current, Owned)
                elif isinstance(action, Release):
                    assert set(written) - lazy or isinstance(event, ForceAccept)


def test_rule_9_no_timer_drops_a_prepared_copy_or_takes_the_right() -> None:
    """Silence closes an attempt that is not complete, and nothing else."""
    for name, state in STATES.items():
        assert did(decide(state, Stalled())) == (REFUSE if name == "receiving" else "")


def test_only_go_makes_an_owner_and_only_of_what_is_here() -> None:
    """Of all events in all states, one alone writes OWNED: Go, for the prepared attempt, its digest, and a copy."""
    taking = set()
    for (state, event), expected in TABLE.items():
        if isinstance(expected, str) and "OWNED*" in expected:
            taking.add((state, event))
    assert taking == {("prepared", "go")}


def test_a_torn_end_behind_prepared_is_never_refused_alone() -> None:
    """OWNED may hide there: to refuse could bring an older copy back to life after the guest has run here."""
    assert [type(action) for action in decide(STATES["prepared"], CopyLost("gone", tail_certain=False))] == [
        Wait
    ]


def test_closing_a_newer_attempt_closes_the_older_one_too() -> None:
    """A source that lost its memory before Begin gets its answer although an older copy still waits here."""
    actions = decide(STATES["prepared"], CloseAsked(NEWER, "asked"))
    after = reduce(evolve, (a.record for a in actions if isinstance(a, Append)), STATES["prepared"])
    assert answer(after, NEWER).state is AttemptState.REFUSED
    assert answer(after, MINE).state is AttemptState.REFUSED


def test_past_attempts_are_answered_from_the_journal() -> None:
    """A late question about a closed attempt gets what became of it; a right that moved on had been used."""
    returned = attempt(1, epoch=3)
    journal = [
        record(RecordKind.REFUSED, OLDER, note="no"),
        ACCEPTED,
        PREPARED,
        OWNED,  # RAN is lazy and was lost
        record(RecordKind.ACCEPTED, returned),
    ]
    state = folded(*journal)
    assert answer(state, OLDER) == Answer(AttemptState.REFUSED, "no")
    assert answer(state, MINE) == Answer(AttemptState.RUNNING)
    assert answer(state, returned) == Answer(AttemptState.RECEIVING)


def test_a_ticket_number_stays_burnt() -> None:
    """It is refused after any later course of the attempt that used it."""
    for name in ("refused", "ran"):
        with pytest.raises(TicketUsedError):
            decide(STATES[name], begin(AGAIN, nonce=MINE.migration_id))


RECORDS: Final = st.builds(
    record,
    st.sampled_from(RecordKind),
    st.builds(
        attempt,
        st.integers(1, 3),
        epoch=st.integers(1, 3),
        source=st.sampled_from([A, C]),
        destination=st.just(B),
    ),
)


@given(st.lists(RECORDS, max_size=14))
def test_any_sequence_of_records_is_legal_or_refused(written: list[Record]) -> None:
    """Folding never fails in another way, the order only grows, and a final answer stays but for an operator."""
    state = DestinationState()
    final: dict[bytes, AttemptState] = {}
    for entry in written:
        before = state
        try:
            state = evolve(state, entry)
        except InvalidTransitionError:
            continue
        if not isinstance(before.current, Empty):
            assert state.current.attempt.order >= before.current.attempt.order
        for migration_id, said in final.items():
            assert state.past.get(migration_id, Answer(said)).state is said
        if isinstance(state.current, Refused):
            final[state.current.attempt.migration_id] = AttemptState.REFUSED
        if isinstance(state.current, Owned):
            refused = final.get(state.current.attempt.migration_id) is AttemptState.REFUSED
            assert not refused or entry.kind is RecordKind.FORCED
            final[state.current.attempt.migration_id] = AttemptState.RUNNING


def test_a_record_without_an_attempt_is_refused() -> None:
    """Every record of a destination is about an attempt."""
    with pytest.raises(InvalidTransitionError):
        evolve(DestinationState(), replace(ACCEPTED, attempt=None))


def test_an_unseen_attempt_of_the_same_order_is_refused_without_a_record() -> None:
    """Two attempts that claim the same place: the one that was not begun here leaves nothing behind."""
    known, unknown = attempt(), attempt(tag=1)
    state = evolve(DestinationState(), record(RecordKind.ACCEPTED, known))
    for event in (CloseAsked(unknown, "asked to"), StatusAsked(unknown)):
        (only,) = decide(state, event)
        assert isinstance(only, Answer)
        assert only.state is AttemptState.REFUSED


def test_a_forced_right_is_of_the_attempt_that_was_refused() -> None:
    """An operator's record about any other attempt follows nothing here."""
    refused = STATES["refused"]
    for other in foreign_attempts(MINE):
        with pytest.raises(InvalidTransitionError):
            evolve(refused, record(RecordKind.FORCED, other))


@pytest.mark.parametrize(("operator", "evidence"), [("", "power is off"), ("somebody", "")])
def test_nothing_is_forced_without_a_name_and_a_reason(operator: str, evidence: str) -> None:
    """Both are what is left to whoever asks afterwards."""
    with pytest.raises(InvalidArgumentError):
        decide(STATES["prepared"], ForceAccept(operator, evidence, copy_intact=True, with_memory=True))
