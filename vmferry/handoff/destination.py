"""The destination's half of the hand-off, as a pure function of its journal (diagram in ``states``).

Promise: ``decide`` makes this host the owner only by a Go for exactly the attempt that is prepared here (or by an
operator's word), never drops a prepared copy on a timer, and never accepts an attempt older than one it has seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import assert_never

from vmferry.errors import (
    InvalidArgumentError,
    MachineBusyError,
    MachineExistsError,
    StaleAttemptError,
    TicketUsedError,
    WrongPhaseError,
)
from vmferry.handoff.arriving import (
    Current,
    DestinationState,
    Empty,
    Owned,
    Prepared,
    Receiving,
    Refused,
    Superseded,
)
from vmferry.handoff.states import (
    Action,
    Answer,
    Append,
    Attempt,
    AttemptState,
    Halt,
    InvalidTransitionError,
    Record,
    RecordKind,
    Release,
    Resume,
    Wait,
)

__all__ = [
    "Current",
    "DestinationState",
    "Empty",
    "Owned",
    "Prepared",
    "Receiving",
    "Refused",
    "Superseded",
    "answer",
    "decide",
    "evolve",
]


@dataclass(frozen=True)
class BeginAsked:
    """A source wants to begin."""

    attempt: Attempt
    ticket_nonce: bytes
    ticket_expire_unix: int
    host_holds_machine: bool
    """This host owns the machine, has an attempt open that takes it away, or still has a hypervisor of it."""
    stale_copy: bool = field(default=False, kw_only=True)
    """The hypervisor it still has is of a right that this attempt proves to be spent; it makes room."""


@dataclass(frozen=True)
class Verified:
    """The copy is complete: this host's own memory gives the sealed digest, device state is loaded."""

    attempt: Attempt
    digest: bytes


@dataclass(frozen=True)
class GoAsked:
    """The source has given up the right to run."""

    attempt: Attempt
    digest: bytes
    copy_intact: bool = field(kw_only=True)
    """The prepared copy is alive and paused. If it is not, :class:`CopyLost` is due, never the right to run."""


@dataclass(frozen=True)
class GuestRan:
    """The guest executes here, or has: the hypervisor says so, or the machine was sent on from here since."""


@dataclass(frozen=True)
class CloseAsked:
    """The source asked to close the attempt."""

    attempt: Attempt
    reason: str
    superseded_by: int = 0
    """The later right that the source says it was granted, if any."""
    epoch: int = 0
    """The right that this host was granted and has not given up; 0 if there is none."""
    leaving: bool = False
    """This host is sending the machine on."""


@dataclass(frozen=True)
class CopyLost:
    """The copy is gone or unusable: its process died, or what arrived was wrong."""

    reason: str
    tail_certain: bool = field(kw_only=True)
    """The journal's end is whole; a torn end may hide OWNED."""


@dataclass(frozen=True)
class Stalled:
    """Nothing arrived for too long."""


@dataclass(frozen=True)
class StatusAsked:
    """The source asks how an attempt stands; one that was never begun here is closed, so that it gets an answer.

    Anybody else, and a source whose Begin may be on its way, is served by :func:`answer`, which changes nothing.
    """

    attempt: Attempt


@dataclass(frozen=True)
class ForceAccept:
    """An operator has seen to it that the source cannot run the guest, and wants it to run here."""

    operator: str
    evidence: str
    copy_intact: bool = field(kw_only=True)
    with_memory: bool = field(kw_only=True)
    """Whether the copy is resumed. It may be older than the disks if the source gave up and went on; else it is
    dropped, and the guest has to be started anew."""


DestinationEvent = (
    BeginAsked | Verified | GoAsked | GuestRan | CloseAsked | CopyLost | Stalled | StatusAsked | ForceAccept
)


def evolve(state: DestinationState, record: Record) -> DestinationState:
    """The state after ``record``; raises :class:`InvalidTransitionError` if it cannot follow."""
    attempt, now = record.attempt, state.current
    if attempt is None:
        raise InvalidTransitionError(f"{record.kind.name} without an attempt in a destination's journal")
    match now, record.kind:
        case ((Empty() | Owned() | Refused() | Superseded()), RecordKind.ACCEPTED) if _may_begin(
            state, attempt
        ):
            burnt = state.burnt | {record.ticket_nonce}
            return DestinationState(Receiving(attempt), _with_past(state), burnt)
        case Receiving(attempt=open_), RecordKind.PREPARED if open_.matches(attempt):
            return replace(state, current=Prepared(open_, record.digest))
        case Prepared(attempt=open_, digest=digest), (RecordKind.OWNED | RecordKind.FORCED) if open_.matches(
            attempt
        ):
            return replace(state, current=Owned(open_, digest))
        case Refused(attempt=open_), RecordKind.FORCED if open_.matches(attempt):
            return replace(state, current=Owned(open_, record.digest))
        case Owned(attempt=open_, digest=digest, ran=False), RecordKind.RAN if open_.matches(attempt):
            return replace(state, current=Owned(open_, digest, ran=True))
        case Owned(attempt=open_), RecordKind.SUPERSEDED if open_.matches(attempt):
            return replace(state, current=Superseded(open_))
        case ((Receiving(attempt=open_) | Prepared(attempt=open_)), RecordKind.REFUSED) if open_.matches(
            attempt
        ):
            return replace(state, current=Refused(open_, record.note))
    if record.kind is RecordKind.REFUSED and _may_begin(state, attempt):
        # Closed before it began: remembered by its own name, and no measure of what may begin.
        tombstone = {attempt.migration_id: Answer(AttemptState.REFUSED, record.note)}
        return replace(state, past=MappingProxyType({**state.past, **tombstone}))
    raise InvalidTransitionError(f"{record.kind.name} cannot follow {type(now).__name__}")


def answer(state: DestinationState, attempt: Attempt) -> Answer:
    """How ``attempt`` stands, from the journal."""
    now = state.current
    if isinstance(now, Empty) or not now.attempt.matches(attempt):
        return state.past.get(attempt.migration_id, Answer(AttemptState.UNSEEN))
    return _final(now)


def decide(state: DestinationState, event: DestinationEvent) -> list[Action]:
    """What to do about ``event``, in order; raises a domain error when it must be turned down.

    An ``Answer`` among the actions is the reply; without one the reply is :func:`answer` after the actions.
    """
    match event:
        case BeginAsked():
            return _begin(state, event)
        case Verified():
            return _verified(state, event)
        case GoAsked():
            return _go(state, event)
        case GuestRan():
            if isinstance(state.current, Owned) and not state.current.ran:
                return [Append(_record(RecordKind.RAN, state.current.attempt), durable=False)]
            return []
        case CloseAsked():
            return _close(state, event)
        case CopyLost():
            return _copy_lost(state, event)
        case Stalled():
            if isinstance(state.current, Receiving):
                return _refuse(state.current.attempt, "nothing arrived for too long")
            return []  # a prepared copy may be the last one: no timer drops it
        case StatusAsked(attempt=attempt):
            known = answer(state, attempt)
            return (
                _close_unseen(state, attempt, "never begun")
                if known.state is AttemptState.UNSEEN
                else [known]
            )
        case ForceAccept():
            return _force_accept(state, event)
    assert_never(event)


def _begin(state: DestinationState, event: BeginAsked) -> list[Action]:
    now, attempt = state.current, event.attempt
    if not isinstance(now, Empty) and now.attempt.matches(attempt):
        if isinstance(now, Receiving):
            return [_final(now)]  # the answer was lost, the ticket is already burnt by this very attempt
        raise WrongPhaseError(f"the attempt is already {_final(now).state.name.lower()} here")
    if event.host_holds_machine:
        raise MachineExistsError(
            "this host owns the machine, or is sending it away", field="attempt.machine_id"
        )
    if not _may_begin(state, attempt):
        raise StaleAttemptError(
            "the attempt was closed, or a newer one has been seen", field="attempt.attempt"
        )
    if event.ticket_nonce in state.burnt:
        raise TicketUsedError("the ticket was used before", field="ticket")
    accept = Append(
        replace(
            _record(RecordKind.ACCEPTED, attempt),
            ticket_nonce=event.ticket_nonce,
            ticket_expire_unix=event.ticket_expire_unix,
        )
    )
    if isinstance(now, (Receiving, Prepared)):
        if not _supersedes(attempt, now.attempt):
            raise MachineBusyError("another source has an attempt open for this machine")
        return [*_close_older(now.attempt), accept, Answer(AttemptState.RECEIVING)]
    room: list[Action] = [Release()] if event.stale_copy else []
    return [accept, *room, Answer(AttemptState.RECEIVING)]


def _verified(state: DestinationState, event: Verified) -> list[Action]:
    now = state.current
    if isinstance(now, Receiving) and now.attempt.matches(event.attempt):
        # Lazy: a crash of this host loses the copy together with the record.
        record = replace(_record(RecordKind.PREPARED, now.attempt), digest=event.digest)
        return [Append(record, durable=False)]
    known = answer(state, event.attempt)
    if known.state in {AttemptState.UNSEEN, AttemptState.RECEIVING}:
        raise WrongPhaseError("there is no such attempt to seal", field="attempt")
    return [known]


def _go(state: DestinationState, event: GoAsked) -> list[Action]:
    now = state.current
    if isinstance(now, Prepared) and now.attempt.matches(event.attempt):
        if now.digest != event.digest:
            raise StaleAttemptError("the digest is not the one that was sealed", field="digest")
        if not event.copy_intact:
            return [Wait("the prepared copy is gone, so the right to run is not taken"), _final(now)]
        owned = replace(_record(RecordKind.OWNED, now.attempt), digest=now.digest, epoch=now.attempt.epoch_to)
        return [Append(owned), Resume()]
    if isinstance(now, Owned) and now.attempt.matches(event.attempt) and not now.ran and event.copy_intact:
        return [Resume()]  # the guest has executed nothing yet, or its confirmation was lost
    return [answer(state, event.attempt)]


def _force_accept(state: DestinationState, event: ForceAccept) -> list[Action]:
    now = state.current
    if not event.operator or not event.evidence:
        raise InvalidArgumentError("an operator and evidence are required", field="evidence")
    if not isinstance(now, (Prepared, Refused)) or (event.with_memory and isinstance(now, Refused)):
        raise WrongPhaseError("no complete copy waits here")
    if event.with_memory and not event.copy_intact:
        raise WrongPhaseError("the prepared copy is gone")
    forced = replace(
        _record(RecordKind.FORCED, now.attempt),
        digest=now.digest if isinstance(now, Prepared) else b"",
        epoch=now.attempt.epoch_to,
        operator=event.operator,
        note=event.evidence,
        with_memory=event.with_memory,
    )
    # An owner's paused copy is resumed at the next start, so one that shall not run is gone before the record.
    return [Append(forced), Resume()] if event.with_memory else [Release(), Append(forced)]


def _close(state: DestinationState, event: CloseAsked) -> list[Action]:
    attempt, reason = event.attempt, event.reason
    known = answer(state, attempt)
    match known.state:
        case AttemptState.RECEIVING | AttemptState.PREPARED:
            return _refuse(attempt, reason)
        case AttemptState.UNSEEN:
            return _close_unseen(state, attempt, reason)
        case AttemptState.OWNED | AttemptState.RUNNING | AttemptState.SUPERSEDED:
            return _overruled(state, event, known)
        case AttemptState.REFUSED:
            return [known]
    assert_never(known.state)


def _overruled(state: DestinationState, event: CloseAsked, known: Answer) -> list[Action]:
    """Told by the source of the very attempt by which the right was taken that this was wrong."""
    now = state.current
    if isinstance(now, Empty) or not now.attempt.matches(event.attempt):
        return [known]
    if isinstance(now, Superseded):
        return [Halt(), known]  # it is not known whether the guest could be stopped the first time
    if not 0 < event.epoch < event.superseded_by:
        return [known]  # not ours any more, or ours is the later one
    if event.leaving:
        raise MachineBusyError("the machine is being sent on from here; ask again")
    superseded = replace(_record(RecordKind.SUPERSEDED, now.attempt), epoch=event.epoch, note=event.reason)
    return [Append(superseded), Halt(), Answer(AttemptState.SUPERSEDED)]


def _close_unseen(state: DestinationState, attempt: Attempt, reason: str) -> list[Action]:
    """Close an attempt that was never begun here.

    No ticket was shown for it, so this touches nothing but the attempt itself and older ones of the same source: a
    host that makes attempts up cannot keep another one's machine out.
    """
    if attempt.order <= _highest(state):
        return [Answer(AttemptState.REFUSED, "older than an attempt that was seen")]
    older: list[Action] = []
    now = state.current
    if isinstance(now, (Receiving, Prepared)) and now.attempt.source == attempt.source:
        older = _close_older(now.attempt)
    return [*older, Append(_refusal(attempt, reason)), Answer(AttemptState.REFUSED, reason)]


def _copy_lost(state: DestinationState, event: CopyLost) -> list[Action]:
    now = state.current
    if isinstance(now, Prepared) and not event.tail_certain:
        # Had OWNED been written and the guest run, a refusal would bring an older copy back to life.
        return [
            Wait("the journal's end is torn, this host may have owned the machine; an operator must decide")
        ]
    if isinstance(now, (Receiving, Prepared)):
        return _refuse(now.attempt, event.reason)
    return []


def _refuse(attempt: Attempt, reason: str) -> list[Action]:
    return [Append(_refusal(attempt, reason)), Release(), Answer(AttemptState.REFUSED, reason)]


def _supersedes(newer: Attempt, older: Attempt) -> bool:
    """Whether ``newer`` proves that ``older`` was closed by its source before it gave up any right."""
    return newer.source == older.source or newer.epoch_from > older.epoch_from


def _close_older(attempt: Attempt) -> list[Action]:
    return [Append(_refusal(attempt, "closed by a newer attempt")), Release()]


def _refusal(attempt: Attempt, reason: str) -> Record:
    return replace(_record(RecordKind.REFUSED, attempt), note=reason)


def _record(kind: RecordKind, attempt: Attempt) -> Record:
    return Record(kind, attempt.machine_id, attempt)


def _final(current: Receiving | Prepared | Owned | Refused | Superseded) -> Answer:
    match current:
        case Receiving():
            return Answer(AttemptState.RECEIVING)
        case Prepared(digest=digest):
            return Answer(AttemptState.PREPARED, digest=digest)
        case Owned(ran=ran, digest=digest):
            return Answer(AttemptState.RUNNING if ran else AttemptState.OWNED, digest=digest)
        case Refused(note=note):
            return Answer(AttemptState.REFUSED, note)
        case Superseded():
            return Answer(AttemptState.SUPERSEDED)
    assert_never(current)


def _may_begin(state: DestinationState, attempt: Attempt) -> bool:
    """Whether the attempt is newer than all that were begun here, and was not closed before it began."""
    return attempt.order > _highest(state) and attempt.migration_id not in state.past


def _highest(state: DestinationState) -> tuple[int, int]:
    """Every attempt accepted from now on is of a higher order than this."""
    match state.current:
        case Empty():
            return -1, -1
        case Owned(attempt=attempt) | Superseded(attempt=attempt):
            return attempt.epoch_to, -1  # the right of before is spent: no attempt can hand it over again
        case Receiving(attempt=attempt) | Prepared(attempt=attempt) | Refused(attempt=attempt):
            return attempt.order
    assert_never(state.current)


def _with_past(state: DestinationState) -> Mapping[bytes, Answer]:
    now = state.current
    if isinstance(now, Empty):
        return state.past
    # A newer attempt is of a later right to run: the right that was taken here was used here and has moved on.
    last = Answer(AttemptState.RUNNING) if isinstance(now, Owned) else _final(now)
    return MappingProxyType({**state.past, now.attempt.migration_id: last})
