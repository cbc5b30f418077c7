"""The source's half of the hand-off: every state against every event and every record, and the rules by name."""

from __future__ import annotations

from dataclasses import replace
from functools import reduce
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.handoff.samples import (
    ADMIN,
    DIGEST,
    INCARNATION_A,
    INCARNATION_B,
    OTHER_DIGEST,
    A,
    B,
    C,
    attempt,
    foreign_attempts,
    record,
)
from tests.unit.handoff.source_states import MINE, STATES, force
from vmferry.errors import InvalidArgumentError, WrongPhaseError
from vmferry.handoff.source import (
    AbortWanted,
    BeginWanted,
    Begun,
    HandedOff,
    Heard,
    OwnerBegan,
    Paused,
    Quiet,
    Sealed,
    SourceEvent,
    SourceState,
    TakenThere,
    Unheard,
    WaitedEnough,
    decide,
    evolve,
)
from vmferry.handoff.states import (
    Action,
    Append,
    AttemptState,
    InvalidTransitionError,
    Record,
    RecordKind,
    Release,
    Resume,
    Tell,
    Wait,
)


def heard(
    state: AttemptState,
    *,
    incarnation: str = INCARNATION_B,
    digest: bytes = DIGEST,
    memory: bool = True,
    tail: bool = True,
) -> Heard:
    """What the destination says."""
    return Heard(MINE, state, incarnation, digest, memory_intact=memory, tail_certain=tail)


def waited(*, memory: bool = False, tail: bool = True) -> WaitedEnough:
    """The destination was silent for long enough."""
    return WaitedEnough(memory_intact=memory, tail_certain=tail)


EVENTS: Final[dict[str, SourceEvent]] = {
    "begin": BeginWanted(MINE),
    "paused": Paused(DIGEST),
    "abort": AbortWanted("reason", memory_intact=True, tail_certain=True),
    "abort, torn end": AbortWanted("reason", memory_intact=True, tail_certain=False),
    "abort, no memory": AbortWanted("reason", memory_intact=False, tail_certain=True),
    "abort, no memory, torn end": AbortWanted("reason", memory_intact=False, tail_certain=False),
    "unheard": Unheard(),
    **{f"heard {state.name}": heard(state) for state in AttemptState},
    **{f"heard {state.name}, no memory": heard(state, memory=False) for state in AttemptState},
    **{
        f"heard {state.name}, other journal": heard(state, incarnation=INCARNATION_A)
        for state in AttemptState
    },
    **{f"heard {state.name}, torn end": heard(state, tail=False) for state in AttemptState},
    **{
        f"heard {state.name}, no memory, torn end": heard(state, memory=False, tail=False)
        for state in AttemptState
    },
    "heard REFUSED, other journal, torn end": heard(
        AttemptState.REFUSED, incarnation=INCARNATION_A, tail=False
    ),
    "came back": OwnerBegan(attempt(1, epoch=2, source=B, destination=A)),
    "came back from a third": OwnerBegan(attempt(7, epoch=3, source=C, destination=A)),
    "an older attempt came": OwnerBegan(attempt(1, epoch=1, source=C, destination=A)),
    "waited enough": waited(),
    "waited enough, memory": waited(memory=True),
    "waited enough, torn end": waited(tail=False),
    "forced": force(),
    "forced, no memory": force(memory=False),
    "forced, memory that is gone": force(memory=False, with_memory=True),
    "forced, without the memory that is here": force(with_memory=False),
    "forced, moved on": force(moved_on=True),
    "forced, nobody": force(operator=""),
    "forced, no evidence": force(evidence=""),
    "taken there": TakenThere(MINE, 3),
    "taken there, not ours": TakenThere(MINE, 0),
}


def did(actions: list[Action]) -> str:
    """The actions in short: ``*`` is on disk before what follows."""
    return " ".join(_word(action) for action in actions)


def _word(action: Action) -> str:
    match action:
        case Append(record=written, durable=durable):
            return written.kind.name + ("*" if durable else "")
        case Tell(method=method):
            return f"->{method}"
        case _:
            return type(action).__name__.lower()


ILLEGAL: Final = "illegal"
REFUSALS: Final = {
    "illegal": InvalidTransitionError,
    "argument": InvalidArgumentError,
    "phase": WrongPhaseError,
}
TABLE: Final[dict[tuple[str, str], str]] = {
    ("quiet", "begin"): "BEGUN*",
    ("quiet", "paused"): ILLEGAL,
    ("begun", "paused"): "SEALED",
    ("sealed", "paused"): ILLEGAL,
    ("handed-off", "paused"): ILLEGAL,
    **{(state, "begin"): ILLEGAL for state in ("begun", "sealed", "handed-off")},
    # Nothing is open: late messages do nothing.
    **{("quiet", event): "" for event in EVENTS if event not in {"begin", "paused"}},
    **{
        (state, event): did_it
        for state in STATES
        for event, did_it in {
            "forced": "FORCED* resume ->Abort",
            "forced, no memory": "FORCED* ->Abort",
            "forced, memory that is gone": "phase",
            "forced, without the memory that is here": "phase",
            "forced, moved on": "phase",
            "forced, nobody": "argument",
            "forced, no evidence": "argument",
            "taken there": "",
            "taken there, not ours": "",
            "came back": "",
            "came back from a third": "",
            "an older attempt came": "",
            "waited enough": "ABORTED* ->Abort",
            "waited enough, memory": "",
            "waited enough, torn end": "wait",
        }.items()
    },
    **{("quiet", event): "phase" for event in ("forced", "forced, no memory", "forced, moved on")},
    # Both took the right, and there it was not given up when it was told of ours.
    ("quiet", "taken there"): "SUPERSEDED* halt",
    **{
        (state, f"waited enough{which}"): ""
        for state in ("quiet", "handed-off")
        for which in ("", ", memory", ", torn end")
    },
    # Rule 4: whoever begins with a later right proves that the hand-off was completed.
    ("handed-off", "came back"): "DONE* release",
    ("handed-off", "came back from a third"): "DONE* release",
    # The right has not moved: with its memory the source aborts alone.
    **{
        (state, event): did_it
        for state in ("begun", "sealed")
        for event, did_it in {
            "abort": "ABORTED* resume ->Abort",
            "abort, torn end": "wait ->Abort",
            "abort, no memory": "wait ->GetAttempt",
            "abort, no memory, torn end": "wait ->GetAttempt",
            "unheard": "",
            "heard REFUSED": "ABORTED* resume",
            "heard REFUSED, no memory": "ABORTED*",
            "heard REFUSED, other journal": "ABORTED* resume",
            # Behind a torn end may be ABORTED, and all that the guest did since; or HANDED_OFF.
            "heard REFUSED, torn end": "ABORTED* resume",
            "heard REFUSED, no memory, torn end": "ABORTED*",
            "heard REFUSED, other journal, torn end": "",
            "heard PREPARED, torn end": "->Abort",
            "heard PREPARED, no memory, torn end": "wait",
            **{
                f"heard {word}{memory}, torn end": "wait" if memory else ""
                for word in ("UNSEEN", "RECEIVING", "OWNED", "RUNNING", "SUPERSEDED")
                for memory in ("", ", no memory")
            },
            **{
                f"heard {word}, no memory": "wait"
                for word in ("UNSEEN", "RECEIVING", "PREPARED", "OWNED", "RUNNING", "SUPERSEDED")
            },
            **{
                f"heard {word}": ""
                for word in ("UNSEEN", "RECEIVING", "PREPARED", "OWNED", "RUNNING", "SUPERSEDED")
            },
            **{
                f"heard {word}, other journal": ""
                for word in ("UNSEEN", "RECEIVING", "PREPARED", "OWNED", "RUNNING", "SUPERSEDED")
            },
        }.items()
    },
    ("begun", "heard PREPARED, no memory"): "SEALED HANDED_OFF* ->Go",
    ("sealed", "heard PREPARED"): "HANDED_OFF* ->Go",
    ("sealed", "heard PREPARED, no memory"): "HANDED_OFF* ->Go",
    ("sealed", "heard OWNED"): "HANDED_OFF* wait",
    ("sealed", "heard OWNED, no memory"): "HANDED_OFF* wait",
    ("sealed", "heard RUNNING"): "HANDED_OFF* DONE* release",
    ("sealed", "heard RUNNING, no memory"): "HANDED_OFF* DONE* release",
    ("sealed", "heard OWNED, torn end"): "HANDED_OFF* wait",
    ("sealed", "heard OWNED, no memory, torn end"): "HANDED_OFF* wait",
    ("sealed", "heard RUNNING, torn end"): "HANDED_OFF* DONE* release",
    ("sealed", "heard RUNNING, no memory, torn end"): "HANDED_OFF* DONE* release",
    # The right was given up: only the journal that said ready can bring it back or let it go.
    **{("handed-off", event): "wait" for event in EVENTS if event.startswith("abort")},
    ("handed-off", "unheard"): "->Go",
    **{
        ("handed-off", f"heard {word}{memory}"): did_it
        for word, did_it in {
            "UNSEEN": "wait",
            "RECEIVING": "->Go",
            "PREPARED": "->Go",
            "OWNED": "wait",
            "RUNNING": "DONE* release",
            "SUPERSEDED": "wait",
        }.items()
        for memory in ("", ", no memory", ", torn end", ", no memory, torn end")
    },
    ("handed-off", "heard REFUSED"): "RECLAIMED* resume",
    ("handed-off", "heard REFUSED, torn end"): "RECLAIMED* resume",
    ("handed-off", "heard REFUSED, no memory"): "RECLAIMED*",
    ("handed-off", "heard REFUSED, no memory, torn end"): "RECLAIMED*",
    ("handed-off", "heard REFUSED, other journal, torn end"): "wait",
    **{("handed-off", f"heard {state.name}, other journal"): "wait" for state in AttemptState},
}


def test_the_table_lists_every_state_and_event() -> None:
    """A state, an event or an answer that is not in the table cannot slip in."""
    assert {type(state) for state in STATES.values()} == set(SourceState.__args__)
    assert {type(event) for event in EVENTS.values()} == set(SourceEvent.__args__)
    assert set(TABLE) == {(state, event) for state in STATES for event in EVENTS}


@pytest.mark.parametrize(("state", "event"), sorted(TABLE))
def test_what_is_done_in_each_state_about_each_event(state: str, event: str) -> None:
    """Each pair has exactly the actions of the table, in their order, and every record among them may follow."""
    if TABLE[state, event] in REFUSALS:
        with pytest.raises(REFUSALS[TABLE[state, event]]):
            decide(STATES[state], EVENTS[event])
        return
    actions = decide(STATES[state], EVENTS[event])
    assert did(actions) == TABLE[state, event]
    reduce(evolve, (action.record for action in actions if isinstance(action, Append)), STATES[state])


LEGAL: Final[dict[tuple[str, RecordKind], SourceState]] = {
    ("quiet", RecordKind.BEGUN): Begun(MINE),
    ("begun", RecordKind.SEALED): Sealed(MINE, DIGEST),
    ("begun", RecordKind.ABORTED): Quiet(1),
    ("sealed", RecordKind.HANDED_OFF): HandedOff(MINE, DIGEST),
    ("sealed", RecordKind.ABORTED): Quiet(1),
    ("handed-off", RecordKind.DONE): Quiet(1),
    ("handed-off", RecordKind.RECLAIMED): Quiet(1),
    **{(state, RecordKind.FORCED): Quiet(1) for state in ("begun", "sealed", "handed-off")},
    ("quiet", RecordKind.SUPERSEDED): Quiet(),
}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("kind", RecordKind, ids=lambda kind: kind.name)
def test_which_record_may_follow_in_each_state(state: str, kind: RecordKind) -> None:
    """Each pair of state and record is either in the diagram or refused."""
    expected = LEGAL.get((state, kind))
    if expected is None:
        with pytest.raises(InvalidTransitionError):
            evolve(STATES[state], record(kind))
    else:
        assert evolve(STATES[state], record(kind)) == expected


@pytest.mark.parametrize("state", [name for name in STATES if name != "quiet"])
def test_rule_7_nothing_of_another_attempt_counts(state: str) -> None:
    """Neither a record nor an answer of an attempt that differs in any one thing changes the open one."""
    for other in foreign_attempts(MINE):
        for kind in RecordKind:
            with pytest.raises(InvalidTransitionError):
                evolve(STATES[state], record(kind, other))
        for said in AttemptState:
            assert decide(STATES[state], replace(heard(said), attempt=other)) == []


def test_rule_1_an_attempt_number_is_used_once() -> None:
    """Neither the wish nor a record begins an attempt whose number is not higher than all before."""
    for number in (1, 2):
        with pytest.raises(InvalidTransitionError):
            decide(Quiet(last_number=2), BeginWanted(attempt(number)))
        with pytest.raises(InvalidTransitionError):
            evolve(Quiet(last_number=2), record(RecordKind.BEGUN, attempt(number)))
    assert evolve(Quiet(last_number=2), record(RecordKind.BEGUN, attempt(3))) == Begun(attempt(3))


@pytest.mark.parametrize("state", [Begun(MINE), Sealed(MINE, DIGEST)], ids=["begun", "sealed"])
@pytest.mark.parametrize("tail_certain", [True, False])
def test_rule_2_a_source_without_memory_asks_and_never_closes(
    state: SourceState, *, tail_certain: bool
) -> None:
    """Without memory nothing is recorded, and the destination is not told to drop what may be the only copy."""
    actions = decide(state, AbortWanted("reboot", memory_intact=False, tail_certain=tail_certain))
    assert did(actions) == "wait ->GetAttempt"


def test_rule_2_a_lost_seal_is_rescued_from_the_destination() -> None:
    """The destination's copy is taken for the latest one after a crash that took SEALED together with the memory."""
    actions = decide(Begun(MINE), heard(AttemptState.PREPARED, memory=False))
    written = [action.record for action in actions if isinstance(action, Append)]
    assert reduce(evolve, written, STATES["begun"]) == HandedOff(MINE, DIGEST)
    assert actions[-1] == Tell("Go")


def test_rule_2_a_running_guest_is_never_handed_off_by_an_answer() -> None:
    """While the memory is here an answer of ready cannot overtake the seal, nor can one that names no digest."""
    assert decide(Begun(MINE), heard(AttemptState.PREPARED)) == []
    assert did(decide(Begun(MINE), heard(AttemptState.PREPARED, digest=b"", memory=False))) == "wait"


def test_rule_5_an_empty_journal_moves_no_right() -> None:
    """Once handed off, an answer from another incarnation of the destination's journal never changes anything."""
    for said in AttemptState:
        actions = decide(HandedOff(MINE, DIGEST), heard(said, incarnation=INCARNATION_A))
        assert [type(action) for action in actions] == [Wait]


def test_rule_5_ready_counts_only_from_the_journal_it_was_begun_with() -> None:
    """Another incarnation, or another digest, does not make the source give up its right."""
    assert decide(Sealed(MINE, DIGEST), heard(AttemptState.PREPARED, incarnation=INCARNATION_A)) == []
    assert decide(Sealed(MINE, DIGEST), heard(AttemptState.PREPARED, digest=OTHER_DIGEST)) == []


def test_rule_8_what_moves_the_right_is_on_disk_before_anything_follows() -> None:
    """In every cell of the table only SEALED is lazy, and resume, Go and release stand behind a durable record."""
    for state in STATES.values():
        for event in EVENTS.values():
            try:
                actions = decide(state, event)
            except tuple(REFUSALS.values()):
                continue
            on_disk = False
            for action in actions:
                if isinstance(action, Append):
                    assert action.durable or action.record.kind is RecordKind.SEALED
                    on_disk = action.durable
                elif isinstance(action, (Resume, Release)) or action == Tell("Go"):
                    assert on_disk or isinstance(state, HandedOff)
                    assert not isinstance(action, (Resume, Release)) or on_disk


def test_rule_9_silence_moves_nothing() -> None:
    """No answer, whatever the state, leads to a record, a resume or a release."""
    for state in STATES.values():
        actions = decide(state, Unheard())
        assert not [action for action in actions if isinstance(action, (Append, Resume, Release))]


def test_rule_9_once_handed_off_only_a_refusal_or_an_operator_resumes() -> None:
    """Two events alone let the guest run here again: REFUSED, from the journal that said ready, and FORCED."""
    resuming = set()
    for name, event in EVENTS.items():
        try:
            actions = decide(HandedOff(MINE, DIGEST), event)
        except tuple(REFUSALS.values()):
            continue
        if any(isinstance(action, Resume) for action in actions):
            resuming.add(name)
    assert resuming == {"heard REFUSED", "heard REFUSED, torn end", "forced"}


def test_what_was_forced_names_who_and_why_and_is_newer_than_what_the_destination_may_have() -> None:
    """FORCED carries the operator and the evidence, and grants e + 2."""
    forced = decide(HandedOff(MINE, DIGEST), force())[0]
    assert isinstance(forced, Append)
    assert (forced.record.operator, forced.record.note) == (ADMIN, "power is off")
    assert forced.record.epoch == MINE.epoch_to + 1


def test_a_returned_right_is_newer_than_the_one_that_was_offered() -> None:
    """RECLAIMED grants e + 2, so that the destination's e + 1 can never be the higher one."""
    reclaimed = decide(HandedOff(MINE, DIGEST), heard(AttemptState.REFUSED))[0]
    assert isinstance(reclaimed, Append)
    assert reclaimed.record.epoch == MINE.epoch_to + 1


RECORDS: Final = st.builds(
    record,
    st.sampled_from(RecordKind),
    st.builds(attempt, st.integers(1, 3), epoch=st.integers(1, 2), tag=st.integers(0, 1)),
)


@given(st.lists(RECORDS, max_size=12))
def test_any_sequence_of_records_is_legal_or_refused(written: list[Record]) -> None:
    """Folding never fails in another way, ends in a state that is known, and numbers only grow."""
    state: SourceState = Quiet()
    highest = 0
    for entry in written:
        try:
            state = evolve(state, entry)
        except InvalidTransitionError:
            continue
        number = state.last_number if isinstance(state, Quiet) else state.attempt.number
        assert number >= highest
        highest = number
    assert isinstance(state, SourceState)


def test_a_record_without_an_attempt_is_refused() -> None:
    """Every record of a source is about an attempt."""
    with pytest.raises(InvalidTransitionError):
        evolve(Quiet(), Record(RecordKind.BEGUN, MINE.machine_id))


def test_a_source_that_never_sealed_closes_alone_without_memory() -> None:
    """Nobody can hold a complete copy of what was never sealed; after SEALED, or after a restart, it asks."""
    lost = AbortWanted("the machine died", memory_intact=False, tail_certain=True, never_sealed=True)
    assert did(decide(STATES["begun"], lost)) == "ABORTED* ->Abort"
    assert did(decide(STATES["sealed"], lost)) == "wait ->GetAttempt"


def test_an_attempt_that_was_closed_here_is_remembered() -> None:
    """Its destination may not have heard; one that the destination decided about needs no telling."""
    begun: SourceState = Quiet()
    for kind in (RecordKind.BEGUN, RecordKind.ABORTED):
        begun = evolve(begun, record(kind, MINE))
    assert isinstance(begun, Quiet)
    assert begun.closed == MINE
    ended: SourceState = Quiet()
    for kind in (RecordKind.BEGUN, RecordKind.SEALED, RecordKind.HANDED_OFF, RecordKind.DONE):
        ended = evolve(ended, record(kind, MINE))
    assert isinstance(ended, Quiet)
    assert ended.closed is None


def test_an_attempt_is_known_before_its_destination_is() -> None:
    """Told by somebody who does not know the destination's incarnation yet it is the same attempt."""
    unknown = replace(MINE, destination_incarnation="")
    assert unknown.matches(MINE)
    assert MINE.matches(unknown)
    assert not MINE.matches(replace(MINE, destination_incarnation=INCARNATION_A))
