"""From the model's states and events to the real ones, and back: what the suite of conformance compares by.

The model tells a journal by what it says; here the real states that say the same are made, the real functions are
asked, the records that they append are folded in by the real ``evolve``, and the result is told by the model again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from types import MappingProxyType
from typing import Any, Final

from models import rules
from models import state as model
from models.rules import Do
from models.state import NAMES, NOBODY, Phase, Stands
from vmferry.errors import VmferryError
from vmferry.handoff import destination, source, updating
from vmferry.handoff.rights import Epochs, Rights
from vmferry.handoff.states import (
    Action,
    Answer,
    Append,
    Attempt,
    AttemptState,
    Halt,
    Release,
    Resume,
    Tell,
    Wait,
)

MACHINE: Final = "6f1c7f5e-3b0e-4c57-9d53-2f6a6a1d8a01"
ADMIN: Final = "spiffe://example.org/admin/night"
Attempts = tuple[model.Attempt, ...]


@dataclass(frozen=True)
class Core:
    """The real functions, or variants of them."""

    source: Callable[[source.SourceState, Any], list[Action]] = source.decide
    destination: Callable[[destination.DestinationState, Any], list[Action]] = destination.decide


# From the model


def attempt_of(attempts: Attempts, number: int) -> Attempt:
    """The real attempt of a number; it names its number by its migration id."""
    told = attempts[number]
    return Attempt(
        MACHINE,
        number.to_bytes(16, "big"),
        told.number,
        told.epoch,
        f"spiffe://example.org/vmhost/{NAMES[told.source]}",
        f"spiffe://example.org/vmhost/{NAMES[told.destination]}",
        "the-source's-journal",
        f"{NAMES[told.destination]}-{told.journal}",
    )


def digest_of(number: int) -> bytes:
    """What an attempt seals."""
    return (number + 1).to_bytes(32, "big")


def source_of(out: model.Out, attempts: Attempts) -> source.SourceState:
    """The real state of a source's journal that says this."""
    if out.phase is Phase.QUIET:
        return source.Quiet(out.used)
    attempt = attempt_of(attempts, out.attempt)
    match out.phase:
        case Phase.BEGUN:
            return source.Begun(attempt)
        case Phase.SEALED:
            return source.Sealed(attempt, digest_of(out.attempt))
    return source.HandedOff(attempt, digest_of(out.attempt))


def destination_of(inn: model.In, attempts: Attempts) -> destination.DestinationState:
    """The real state of a destination's journal that says this."""
    past = {
        attempt_of(attempts, number).migration_id: Answer(AttemptState[stands.name])
        for number, stands in enumerate(inn.stands)
        if stands is not Stands.UNSEEN and number != inn.newest
    }
    current: destination.Current = destination.Empty()
    if inn.newest != NOBODY:
        attempt, digest = attempt_of(attempts, inn.newest), digest_of(inn.newest)
        current = {
            Stands.RECEIVING: destination.Receiving(attempt),
            Stands.PREPARED: destination.Prepared(attempt, digest),
            Stands.OWNED: destination.Owned(attempt, digest),
            Stands.RUNNING: destination.Owned(attempt, digest, ran=True),
            Stands.REFUSED: destination.Refused(attempt),
            Stands.SUPERSEDED: destination.Superseded(attempt),
        }[inn.now]
    return destination.DestinationState(current, MappingProxyType(past))


def rights_of(host: model.Host, attempts: Attempts, update: updating.UpdateState | None = None) -> Rights:
    """What the real journals of a host say together."""
    epochs = Epochs(host.rights.granted, host.rights.left)
    now = update or updating.Still()
    return Rights(epochs, source_of(host.out, attempts), destination_of(host.inn, attempts), update=now)


def event_of(event: Any, out: model.Out, attempts: Attempts) -> Any:
    """The real event."""
    about = getattr(event, "attempt", out.attempt)
    attempt, digest = (attempt_of(attempts, about), digest_of(about)) if about != NOBODY else (None, b"")
    make: dict[type, Callable[[], Any]] = {
        rules.Begin: lambda: source.BeginWanted(attempt),
        rules.Paused: lambda: source.Paused(digest),
        rules.AbortWanted: lambda: source.AbortWanted(
            "reason", memory_intact=event.memory, tail_certain=event.certain, never_sealed=event.fresh
        ),
        rules.Heard: lambda: source.Heard(
            attempt,
            AttemptState[event.answer.name],
            attempt.destination_incarnation if event.same_journal else "another",
            digest if event.answer is Stands.PREPARED else b"",
            memory_intact=event.memory,
            tail_certain=event.certain,
        ),
        rules.Unheard: source.Unheard,
        rules.OwnerBegan: lambda: source.OwnerBegan(attempt),
        rules.WaitedEnough: lambda: source.WaitedEnough(
            memory_intact=event.memory, tail_certain=event.certain
        ),
        rules.ForceReclaim: lambda: source.ForceReclaim(
            ADMIN,
            "power is off",
            memory_intact=event.memory,
            with_memory=event.with_memory,
            moved_on=event.moved_on,
        ),
        rules.TakenThere: lambda: source.TakenThere(attempt, event.epoch),
        rules.BeginAsked: lambda: destination.BeginAsked(
            attempt,
            attempt.migration_id,
            1,
            host_holds_machine=event.held,
            stale_copy=event.stale_copy,
        ),
        rules.Verified: lambda: destination.Verified(attempt, digest),
        rules.GoAsked: lambda: destination.GoAsked(attempt, digest, copy_intact=event.intact),
        rules.GuestRan: destination.GuestRan,
        rules.CloseAsked: lambda: destination.CloseAsked(
            attempt,
            "reason",
            superseded_by=attempt.epoch_to + 1 if event.later else 0,
            epoch=attempt.epoch_to,
            leaving=event.leaving,
        ),
        rules.CopyLost: lambda: destination.CopyLost("reason", tail_certain=event.certain),
        rules.Stalled: destination.Stalled,
        rules.StatusAsked: lambda: destination.StatusAsked(attempt),
        rules.ForceAccept: lambda: destination.ForceAccept(
            ADMIN, "power is off", copy_intact=event.intact, with_memory=event.memory
        ),
    }
    return make[type(event)]()


# Back to the model


def number_of(attempt: Attempt) -> int:
    """Its number in the model."""
    return int.from_bytes(attempt.migration_id, "big")


def out_of(state: source.SourceState) -> model.Out:
    """What a real source's journal says."""
    if isinstance(state, source.Quiet):
        return model.Out(used=state.last_number)
    phase = {source.Begun: Phase.BEGUN, source.Sealed: Phase.SEALED, source.HandedOff: Phase.HANDED_OFF}
    return model.Out(phase[type(state)], number_of(state.attempt), state.attempt.number)


def inn_of(state: destination.DestinationState) -> model.In:
    """What a real destination's journal says."""
    found = {
        int.from_bytes(migration_id, "big"): Stands[said.state.name]
        for migration_id, said in state.past.items()
    }
    newest = NOBODY
    if not isinstance(state.current, destination.Empty):
        newest = number_of(state.current.attempt)
        found[newest] = Stands[destination.answer(state, state.current.attempt).state.name]
    stands = tuple(found.get(number, Stands.UNSEEN) for number in range(max(found, default=-1) + 1))
    return model.In(stands, newest)


def word_of(action: Action) -> Do:
    """A real action as the model tells it; of a record also which attempt it is about."""
    match action:
        case Append(record=record, durable=durable):
            assert record.attempt is not None
            return Do(record.kind.name + ("*" if durable else ""), number_of(record.attempt))
        case Answer(state=state):
            return Do(f"({state.name})")
        case Tell(method=method):
            return Do({"GetAttempt": "ask"}.get(method, method))
        case Resume():
            return Do("resume")
        case Release():
            return Do("release")
        case Halt():
            return Do("halt")
        case Wait():
            return Do("wait")


def told(does: Sequence[Do]) -> tuple[Do, ...]:
    """What the model does, told like :func:`word_of`."""
    return tuple(do if do.word.rstrip("*") in _RECORDS else Do(do.word) for do in does)


_RECORDS: Final = frozenset(kind.name for kind in source.RecordKind)


def asked(core: Core, host: model.Host, event: Any, attempts: Attempts) -> list[Action] | None:
    """What the real core does about an event, or None if it turns it down."""
    real = event_of(event, host.out, attempts)
    try:
        if isinstance(event, rules.SourceEvent):
            return core.source(source_of(host.out, attempts), real)
        return core.destination(destination_of(host.inn, attempts), real)
    except VmferryError:
        return None


def answered(actions: list[Action] | None) -> tuple[Do, ...]:
    """The same, told by the model."""
    return rules.NO if actions is None else tuple(map(word_of, actions))


def folded(
    host: model.Host, actions: Sequence[Action], event: Any, attempts: Attempts
) -> tuple[model.Out, model.In, int, int]:
    """What the host's journals say once the records among these actions are in them, and the rights they give."""
    records = [action.record for action in actions if isinstance(action, Append)]
    epochs = reduce(Epochs.after, records, Epochs(host.rights.granted, host.rights.left))
    out, inn = host.out, host.inn
    if isinstance(event, rules.SourceEvent):
        out = out_of(reduce(source.evolve, records, source_of(out, attempts)))
    else:
        inn = inn_of(reduce(destination.evolve, records, destination_of(inn, attempts)))
    return out, inn, epochs.granted, epochs.left
