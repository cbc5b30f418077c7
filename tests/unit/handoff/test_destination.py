"""The destination's half of the hand-off: every state against every event and every record, the rules by name."""

from __future__ import annotations

from dataclasses import replace
from functools import reduce
from typing import Final

import pytest

from tests.unit.handoff.destination_table import (
    AGAIN,
    EVENTS,
    LATER_OWNER,
    MINE,
    NEWER,
    OLDER,
    STATES,
    TABLE,
    did,
)
from tests.unit.handoff.samples import DIGEST, record
from vmferry.errors import VmferryError
from vmferry.handoff.destination import (
    Current,
    DestinationEvent,
    DestinationState,
    Empty,
    Owned,
    Prepared,
    Receiving,
    Refused,
    Superseded,
    answer,
    decide,
    evolve,
)
from vmferry.handoff.states import Append, Attempt, AttemptState, InvalidTransitionError, RecordKind


def test_the_table_lists_every_state_and_event() -> None:
    """A state or an event that is not in the table cannot slip in."""
    assert {type(state.current) for state in STATES.values()} == set(Current.__args__)
    assert {type(event) for event in EVENTS.values()} == set(DestinationEvent.__args__)
    assert set(TABLE) == {(state, event) for state in STATES for event in EVENTS}


@pytest.mark.parametrize(("state", "event"), sorted(TABLE))
def test_what_is_done_in_each_state_about_each_event(state: str, event: str) -> None:
    """Each pair has exactly the actions of the table, in their order, and every record among them may follow."""
    expected = TABLE[state, event]
    if not isinstance(expected, str):
        with pytest.raises(expected):
            decide(STATES[state], EVENTS[event])
        return
    actions = decide(STATES[state], EVENTS[event])
    assert did(actions) == expected
    reduce(evolve, (action.record for action in actions if isinstance(action, Append)), STATES[state])


LEGAL: Final[dict[tuple[str, RecordKind], Current]] = {
    ("receiving", RecordKind.PREPARED): Prepared(MINE, DIGEST),
    ("receiving", RecordKind.REFUSED): Refused(MINE),
    ("prepared", RecordKind.OWNED): Owned(MINE, DIGEST),
    ("prepared", RecordKind.FORCED): Owned(MINE, DIGEST),
    ("refused", RecordKind.FORCED): Owned(MINE, b""),
    ("prepared", RecordKind.REFUSED): Refused(MINE),
    ("owned", RecordKind.RAN): Owned(MINE, DIGEST, ran=True),
    ("owned", RecordKind.SUPERSEDED): Superseded(MINE),
    ("ran", RecordKind.SUPERSEDED): Superseded(MINE),
    ("empty", RecordKind.ACCEPTED): Receiving(MINE),
    ("empty", RecordKind.REFUSED): Empty(),
}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("kind", RecordKind, ids=lambda kind: kind.name)
def test_which_record_may_follow_in_each_state(state: str, kind: RecordKind) -> None:
    """Each pair of state and record about the open attempt is either in the diagram or refused."""
    expected = LEGAL.get((state, kind))
    if expected is None:
        with pytest.raises(InvalidTransitionError):
            evolve(STATES[state], record(kind, MINE))
    else:
        assert evolve(STATES[state], record(kind, MINE)).current == expected


@pytest.mark.parametrize(
    ("state", "about", "legal"),
    [
        ("refused", NEWER, True),
        ("refused", OLDER, False),
        ("owned", NEWER, False),
        ("owned", AGAIN, True),
        ("ran", NEWER, False),
        ("ran", AGAIN, True),
        ("superseded", NEWER, False),
        ("superseded", AGAIN, True),
        ("receiving", NEWER, False),
        ("prepared", NEWER, False),
    ],
)
def test_which_attempt_may_follow_a_closed_one(state: str, about: Attempt, *, legal: bool) -> None:
    """A closed attempt is followed by a newer one only, and a right that was taken only by a later right."""
    if legal:
        assert evolve(STATES[state], record(RecordKind.ACCEPTED, about)).current == Receiving(about)
    else:
        with pytest.raises(InvalidTransitionError):
            evolve(STATES[state], record(RecordKind.ACCEPTED, about))


@pytest.mark.parametrize("state", STATES)
def test_an_attempt_closed_before_it_began_leaves_the_others_alone(state: str) -> None:
    """Whoever makes an attempt up closes that one: what is open stays, what may begin may begin."""
    made_up = replace(LATER_OWNER, migration_id=b"made up by a foe", epoch_from=1 << 62)
    after = evolve(STATES[state], record(RecordKind.REFUSED, made_up))
    assert after.current == STATES[state].current
    assert answer(after, made_up).state is AttemptState.REFUSED
    with pytest.raises(InvalidTransitionError):
        evolve(after, record(RecordKind.ACCEPTED, made_up))
    assert [_outcome(after, event) for event in EVENTS.values()] == [
        _outcome(STATES[state], event) for event in EVENTS.values()
    ]


def _outcome(state: DestinationState, event: DestinationEvent) -> object:
    try:
        return decide(state, event)
    except VmferryError as error:
        return type(error)
