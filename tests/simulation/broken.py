"""Broken variants of the hand-off's core: one guard removed from each, and the promise that it breaks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Final
from unittest import mock

from vmferry.handoff import destination, source
from vmferry.handoff.states import (
    Action,
    Answer,
    Append,
    AttemptState,
    Record,
    RecordKind,
    Release,
    Resume,
    Tell,
)

Decide = Callable[[Any, Any], list[Action]]


@dataclass(frozen=True)
class Broken:
    """One guard removed."""

    breaks: str
    source: Decide = source.decide
    destination: Decide = destination.decide
    bounds: dict[str, Any] = field(default_factory=dict)
    patch: Callable[[], AbstractContextManager[object]] = nullcontext


def _lazily(kind: RecordKind, decide: Decide) -> Decide:
    def broken(state: Any, event: Any) -> list[Action]:
        return [
            replace(action, durable=False)
            if isinstance(action, Append) and action.record.kind is kind
            else action
            for action in decide(state, event)
        ]

    return broken


def _resume_on_timeout(state: source.SourceState, event: source.SourceEvent) -> list[Action]:
    if isinstance(state, source.HandedOff) and isinstance(event, source.Unheard):
        epoch = state.attempt.epoch_from + 2
        return [
            Append(Record(RecordKind.RECLAIMED, state.attempt.machine_id, state.attempt, epoch=epoch)),
            Resume(),
        ]
    return source.decide(state, event)


def _go_before_the_record(state: source.SourceState, event: source.SourceEvent) -> list[Action]:
    actions = source.decide(state, event)
    return sorted(actions, key=lambda action: action != Tell("Go")) if Tell("Go") in actions else actions


def _memory_not_looked_at(state: source.SourceState, event: source.SourceEvent) -> list[Action]:
    if isinstance(event, source.AbortWanted):
        event = replace(event, memory_intact=True)
    return source.decide(state, event)


def _close_instead_of_ask(state: source.SourceState, event: source.SourceEvent) -> list[Action]:
    return [
        Tell("Abort") if action == Tell("GetAttempt") else action for action in source.decide(state, event)
    ]


def _incarnation_not_looked_at(state: source.SourceState, event: source.SourceEvent) -> list[Action]:
    if isinstance(event, source.Heard) and not isinstance(state, source.Quiet):
        event = replace(event, incarnation=state.attempt.destination_incarnation)
    return source.decide(state, event)


def _free_with_go(state: source.SourceState, event: source.SourceEvent) -> list[Action]:
    actions = source.decide(state, event)
    handed_off = isinstance(state, source.Sealed) and Tell("Go") in actions
    return [*actions, Release()] if handed_off else actions


def _no_rescue(state: source.SourceState, event: source.SourceEvent) -> list[Action]:
    if isinstance(state, source.Begun) and isinstance(event, source.Heard):
        event = replace(event, memory_intact=True) if event.state is AttemptState.PREPARED else event
    return source.decide(state, event)


def _refuse_without_record(
    state: destination.DestinationState, event: destination.DestinationEvent
) -> list[Action]:
    actions = destination.decide(state, event)
    closing = isinstance(event, (destination.CloseAsked, destination.StatusAsked))
    return [action for action in actions if isinstance(action, Answer)] if closing else actions


def _drop_on_timeout(
    state: destination.DestinationState, event: destination.DestinationEvent
) -> list[Action]:
    if isinstance(event, destination.Stalled):
        event = destination.CopyLost("nothing arrived for too long", tail_certain=True)
    return destination.decide(state, event)


def _accept_on_timeout(
    state: destination.DestinationState, event: destination.DestinationEvent
) -> list[Action]:
    if isinstance(event, destination.Stalled) and isinstance(state.current, destination.Prepared):
        event = destination.GoAsked(state.current.attempt, state.current.digest, copy_intact=True)
    return destination.decide(state, event)


def _copy_not_looked_at(
    state: destination.DestinationState, event: destination.DestinationEvent
) -> list[Action]:
    if isinstance(event, destination.GoAsked):
        event = replace(event, copy_intact=True)
    return destination.decide(state, event)


def _question_changes_nothing(
    state: destination.DestinationState, event: destination.DestinationEvent
) -> list[Action]:
    if isinstance(event, destination.StatusAsked):
        return [destination.answer(state, event.attempt)]
    return destination.decide(state, event)


def _no_order() -> AbstractContextManager[object]:
    return mock.patch.object(destination, "_highest", return_value=(-1, -1))


BROKEN: Final = {
    "source resumes on a timeout": Broken("I1:", source=_resume_on_timeout),
    "Go before its record": Broken("I1b", source=_go_before_the_record),
    "abort not durable": Broken("I2", source=_lazily(RecordKind.ABORTED, source.decide)),
    "abort without memory": Broken("I3", source=_memory_not_looked_at),
    "closing instead of asking": Broken("I3", source=_close_instead_of_ask),
    "no rescue of a lost seal": Broken("L1", source=_no_rescue),
    "source frees with Go": Broken("I3", source=_free_with_go),
    "incarnation not looked at": Broken("I2", source=_incarnation_not_looked_at, bounds={"amnesia": True}),
    "taking the right not durable": Broken("I2", destination=_lazily(RecordKind.OWNED, destination.decide)),
    "refusal without a record": Broken("I1b", destination=_refuse_without_record),
    "prepared copy dropped on a timeout": Broken("I3", destination=_drop_on_timeout),
    "prepared copy accepted on a timeout": Broken("I1b", destination=_accept_on_timeout),
    "right taken without a copy": Broken("I2", destination=_copy_not_looked_at),
    "no order of attempts": Broken("I3", patch=_no_order),
    "a question changes nothing": Broken(
        "L1", destination=_question_changes_nothing, bounds={"attempts": 1, "purges": 1}
    ),
}
