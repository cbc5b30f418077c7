"""The source's half of the hand-off, as a pure function of its journal (diagram in ``states``).

Promise: ``decide`` never lets a guest resume here once HANDED_OFF is written, except after a refusal by the very
incarnation of the destination's journal that said ready, or by an operator's word; and never aborts alone without
the guest's memory, unless it has waited for the destination as long as it was told to.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import assert_never

from vmferry.errors import InvalidArgumentError, WrongPhaseError
from vmferry.handoff.states import (
    Action,
    Append,
    Attempt,
    AttemptState,
    Halt,
    InvalidTransitionError,
    Record,
    RecordKind,
    Release,
    Resume,
    Tell,
    Wait,
)


@dataclass(frozen=True)
class Quiet:
    """No attempt is open."""

    last_number: int = 0
    closed: Attempt | None = field(default=None, compare=False)
    """The last attempt, if this host closed it; its destination may not have heard."""


@dataclass(frozen=True)
class Begun:
    """Memory is being copied; the guest runs."""

    attempt: Attempt


@dataclass(frozen=True)
class Sealed:
    """The guest is paused and its state has a digest; it may still be resumed here."""

    attempt: Attempt
    digest: bytes


@dataclass(frozen=True)
class HandedOff:
    """The right to run was given up; only the destination can say what became of it."""

    attempt: Attempt
    digest: bytes


SourceState = Quiet | Begun | Sealed | HandedOff


@dataclass(frozen=True)
class BeginWanted:
    """A migration shall start."""

    attempt: Attempt


@dataclass(frozen=True)
class Paused:
    """The guest is paused and its state has this digest."""

    digest: bytes


@dataclass(frozen=True)
class AbortWanted:
    """Something failed, or somebody cancelled, or the service was restarted."""

    reason: str
    memory_intact: bool = field(kw_only=True)
    """The hypervisor still has the guest's memory, and it has not run elsewhere."""
    tail_certain: bool = field(kw_only=True)
    """The journal's end is whole; a torn end may hide HANDED_OFF."""
    never_sealed: bool = field(default=False, kw_only=True)
    """This very process began the attempt and has not sealed it, so nobody can hold a complete copy."""


@dataclass(frozen=True)
class Heard:
    """The destination said how the attempt stands."""

    attempt: Attempt
    state: AttemptState
    incarnation: str
    digest: bytes = b""
    """What it has verified, where it says PREPARED."""
    memory_intact: bool = field(kw_only=True)
    """The hypervisor still has the guest's memory, and it has not run elsewhere."""
    tail_certain: bool = field(kw_only=True)
    """The journal's end is whole; a torn end may hide HANDED_OFF, or ABORTED and all that the guest did since."""


@dataclass(frozen=True)
class Unheard:
    """The destination could not be asked, or its answer was lost."""


@dataclass(frozen=True)
class OwnerBegan:
    """An attempt was accepted on this host that brings the machine back."""

    attempt: Attempt


@dataclass(frozen=True)
class WaitedEnough:
    """The destination could not be asked for as long as a source without the guest's memory is told to wait."""

    memory_intact: bool = field(kw_only=True)
    tail_certain: bool = field(kw_only=True)


@dataclass(frozen=True)
class ForceReclaim:
    """An operator has seen to it that the destination cannot run the guest, and wants it back here."""

    operator: str
    evidence: str
    memory_intact: bool = field(kw_only=True)
    with_memory: bool = field(kw_only=True)
    """Whether the guest goes on from the memory here. That is older than the disks if the guest has run over there;
    else the hypervisor has to be ended first, and the guest started anew."""
    moved_on: bool = field(kw_only=True)
    """The journals prove that the guest has run elsewhere since (``Rights.moved_on``)."""


@dataclass(frozen=True)
class TakenThere:
    """The goodbye about an attempt that was closed here has the answer that its destination took the right."""

    attempt: Attempt
    epoch: int
    """The right that this host may use now; 0 if it has none, has an attempt open, or got it back by a later one."""


SourceEvent = (
    BeginWanted
    | Paused
    | AbortWanted
    | Heard
    | Unheard
    | OwnerBegan
    | WaitedEnough
    | ForceReclaim
    | TakenThere
)


def evolve(state: SourceState, record: Record) -> SourceState:
    """The state after ``record``; raises :class:`InvalidTransitionError` if it cannot follow."""
    kind, attempt = record.kind, record.attempt
    if attempt is None:
        raise InvalidTransitionError(f"{kind.name} without an attempt in a source's journal")
    match state, kind:
        case Quiet(last_number=last), RecordKind.BEGUN if attempt.number > last:
            return Begun(attempt)
        case Begun(attempt=now), RecordKind.SEALED if now.matches(attempt):
            return Sealed(attempt, record.digest)
        case Sealed(attempt=now, digest=digest), RecordKind.HANDED_OFF if now.matches(attempt):
            return HandedOff(attempt, digest)
        case ((Begun(attempt=now) | Sealed(attempt=now)), RecordKind.ABORTED) if now.matches(attempt):
            return Quiet(now.number, now)
        case HandedOff(attempt=now), (RecordKind.DONE | RecordKind.RECLAIMED) if now.matches(attempt):
            return Quiet(now.number)
        case ((Begun(attempt=now) | Sealed(attempt=now) | HandedOff(attempt=now)), RecordKind.FORCED) if (
            now.matches(attempt)
        ):
            return Quiet(now.number, now)
        case Quiet(), RecordKind.SUPERSEDED:
            return state
    raise InvalidTransitionError(f"{kind.name} cannot follow {type(state).__name__}")


def decide(state: SourceState, event: SourceEvent) -> list[Action]:  # noqa: PLR0912 - one case per event
    """What to do about ``event``, in order."""
    match event:
        case BeginWanted(attempt=attempt):
            if not isinstance(state, Quiet) or attempt.number <= state.last_number:
                raise InvalidTransitionError("an attempt is open or the number was used")
            return [_append(RecordKind.BEGUN, attempt)]
        case Paused(digest=digest):
            if not isinstance(state, Begun):
                raise InvalidTransitionError(f"paused in {type(state).__name__}")
            # Lazy: a killed service finds it in the page cache, a crashed machine has lost the memory anyway.
            return [replace(_append(RecordKind.SEALED, state.attempt, digest=digest), durable=False)]
        case AbortWanted():
            return _abort(state, event)
        case Heard():
            return _heard(state, event)
        case Unheard():
            return [Tell("Go")] if isinstance(state, HandedOff) else []
        case OwnerBegan(attempt=attempt):
            if isinstance(state, HandedOff) and proves_owner(state, attempt):
                return [_append(RecordKind.DONE, state.attempt, note="came back by a later right"), Release()]
            return []
        case WaitedEnough():
            return _waited_enough(state, event)
        case ForceReclaim():
            return _force_reclaim(state, event)
        case TakenThere(attempt=attempt, epoch=epoch):
            # Told of our right, if that is later, it would have stopped. Its own is later still, or was sent on.
            if not epoch or not isinstance(state, Quiet):
                return []
            return [
                _append(RecordKind.SUPERSEDED, attempt, epoch=epoch, note="taken by the destination"),
                Halt(),
            ]
    assert_never(event)


def proves_owner(state: HandedOff, attempt: Attempt) -> bool:
    """Whether nobody could begin ``attempt`` unless the hand-off had been completed: its right is later."""
    return attempt.machine_id == state.attempt.machine_id and attempt.epoch_from >= state.attempt.epoch_to


def _append(
    kind: RecordKind, attempt: Attempt, *, digest: bytes = b"", epoch: int = 0, note: str = ""
) -> Append:
    return Append(Record(kind, attempt.machine_id, attempt, digest=digest, epoch=epoch, note=note))


def _abort(state: SourceState, event: AbortWanted) -> list[Action]:
    match state:
        case Quiet():
            return []
        case HandedOff():
            return [Wait("the right to run was given up; only the destination's answer can bring it back")]
        case Begun(attempt=attempt) | Sealed(attempt=attempt):
            nowhere_complete = isinstance(state, Begun) and event.never_sealed
            if not event.memory_intact and not nowhere_complete:
                # Asked, not told to close: what waits there may be the only copy.
                return [
                    Wait("the guest's memory is gone here; the destination may hold the only copy"),
                    Tell("GetAttempt"),
                ]
            if not event.tail_certain:
                return [
                    Wait("the journal's end is torn, a hand-off may have been written; asking first"),
                    Tell("Abort"),
                ]
            resume: list[Action] = [Resume()] if event.memory_intact else []
            return [_append(RecordKind.ABORTED, attempt, note=event.reason), *resume, Tell("Abort")]
    assert_never(state)


def _waited_enough(state: SourceState, event: WaitedEnough) -> list[Action]:
    if not isinstance(state, (Begun, Sealed)) or event.memory_intact:
        return []  # nothing to wait for, or nothing that time may decide
    if not event.tail_certain:
        return [
            Wait("the journal's end is torn, a hand-off may have been written; time alone decides nothing")
        ]
    # Go was never sent, so nobody can have run the guest. What is given up is the copy that may wait over there.
    aborted = _append(RecordKind.ABORTED, state.attempt, note="without memory, and the destination is silent")
    return [aborted, Tell("Abort")]


def _force_reclaim(state: SourceState, event: ForceReclaim) -> list[Action]:
    if not event.operator or not event.evidence:
        raise InvalidArgumentError("an operator and evidence are required", field="evidence")
    if isinstance(state, Quiet):
        raise WrongPhaseError("no attempt is open that could be taken back")
    if event.moved_on:
        raise WrongPhaseError("the guest has run elsewhere since; what is here is an older copy")
    if event.with_memory != event.memory_intact:
        raise WrongPhaseError(
            "the guest's memory is gone here"
            if event.with_memory
            else "the paused guest would be resumed by the next start; end its hypervisor first"
        )
    attempt = state.attempt
    by_hand = _append(RecordKind.FORCED, attempt, epoch=attempt.epoch_from + 2, note=event.evidence)
    forced = Append(replace(by_hand.record, operator=event.operator, with_memory=event.with_memory))
    # Told, so that a copy over there is dropped if that host ever comes back.
    return [forced, *([Resume()] if event.memory_intact else []), Tell("Abort")]


def _heard(state: SourceState, heard: Heard) -> list[Action]:
    if isinstance(state, Quiet) or not state.attempt.matches(heard.attempt):
        return []  # of an attempt that is closed, or was never ours
    if isinstance(state, HandedOff):
        return _heard_after_handoff(state, heard)
    return _heard_before_handoff(state, heard)


def _heard_before_handoff(state: Begun | Sealed, heard: Heard) -> list[Action]:
    attempt = state.attempt
    said_ready = heard.incarnation == attempt.destination_incarnation
    match heard.state:
        case AttemptState.PREPARED if said_ready:
            return _ready(state, heard)
        case AttemptState.REFUSED if said_ready or heard.tail_certain:
            aborted = _append(RecordKind.ABORTED, attempt, note="refused by the destination")
            return [aborted, Resume()] if heard.memory_intact else [aborted]
        case AttemptState.OWNED | AttemptState.RUNNING if said_ready and isinstance(state, Sealed):
            # Only Go makes an owner, and Go is sent behind HANDED_OFF: that record was written and is lost.
            handed_off = HandedOff(attempt, state.digest)
            repaired = _append(RecordKind.HANDED_OFF, attempt, digest=state.digest)
            return [repaired, *_heard_after_handoff(handed_off, heard)]
    if heard.memory_intact:
        return []
    return [
        Wait(f"the guest's memory is gone here and the destination says {heard.state.name}; asking again")
    ]


def _ready(state: Begun | Sealed, heard: Heard) -> list[Action]:
    attempt = state.attempt
    if not heard.tail_certain:
        # ABORTED may be what is torn off, and the guest have run on since: that copy is not handed over.
        if heard.memory_intact:
            return [Tell("Abort")]
        return [Wait("the journal's end is torn, the guest may have run since; an operator must decide")]
    go: list[Action] = [_append(RecordKind.HANDED_OFF, attempt, digest=heard.digest), Tell("Go")]
    if isinstance(state, Sealed):
        return go if heard.digest == state.digest else []
    if heard.memory_intact:
        return []
    if not heard.digest:
        return [Wait("the destination is ready and does not say with what; asking again")]
    # Ready without SEALED: a crash of this machine took that record and the memory with it. The guest has not run
    # since, or ABORTED would be here, so the copy over there is the latest one, and the only one.
    sealed = replace(_append(RecordKind.SEALED, attempt, digest=heard.digest), durable=False)
    return [sealed, *go]


def _heard_after_handoff(state: HandedOff, heard: Heard) -> list[Action]:
    attempt = state.attempt
    if heard.incarnation != attempt.destination_incarnation:
        # An empty journal knows nothing of what the lost one had promised: no answer of it may move the right.
        return [Wait("the destination's journal is not the one that said ready; an operator must decide")]
    match heard.state:
        case AttemptState.RUNNING:
            return [_append(RecordKind.DONE, attempt), Release()]
        case AttemptState.REFUSED:
            reclaimed = _append(RecordKind.RECLAIMED, attempt, epoch=attempt.epoch_from + 2)
            return [reclaimed, Resume()] if heard.memory_intact else [reclaimed]
        case AttemptState.OWNED:
            return [Wait("the destination owns the machine and has not resumed it yet")]
        case AttemptState.PREPARED | AttemptState.RECEIVING:
            return [Tell("Go")]
        case AttemptState.UNSEEN:
            return [Wait("the destination's journal does not know the attempt; an operator must decide")]
        case AttemptState.SUPERSEDED:
            return [
                Wait("the destination was told of a later right than is known here; an operator must decide")
            ]
    assert_never(heard.state)
