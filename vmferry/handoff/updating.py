"""An update in place as a pure function of its journal: a hand-off between two hypervisor processes of one host.

Both have the guest's memory from the same file, so nothing is copied and neither may ever run beside the other::

  Still --BEGUN*--> Begun --SWITCHED*--> Switched --RAN--> Ran --DONE*--> Still   (the new process is the machine)
    ^                 |                      |               |
    +----UNDONE*------+-------UNDONE*--------+----UNDONE*----+                    (the old process is the machine)
    whatever fails: the old one goes on      only where the new one cannot have run

  begun      the guest runs in the old process; a new one is started beside it, paused, and loads the guest's state
             once that is saved
  switched   the commit point: from now on the new one is preferred, whichever process dies. Neither may run
  ran        the new one may have executed the guest: the old one's state is old, and it is never resumed again

Promise: at most one of the two is ever let run: the old one only by the permit of a host with no update open
(``Rights.permitted``), the new one only by the permit that RAN allows (``Rights.may_let_run``). An update is begun
only where a migration could be, and while it is open none can begin: an attempt needs the same right.

A crash of the host takes both processes, so no right depends on whether a record was on disk then; RAN is written
and not waited for, because the guest stands still meanwhile. All others are on disk before anything follows.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import assert_never

from vmferry.handoff.states import (
    Append,
    InvalidTransitionError,
    Record,
    RecordKind,
    Resume,
    Update,
    Wait,
)


@dataclass(frozen=True)
class Still:
    """No update is open."""

    last_number: int = 0


@dataclass(frozen=True)
class Begun:
    """The old process has the guest."""

    update: Update


@dataclass(frozen=True)
class Switched:
    """The new process has loaded the guest's latest state, and none of the two may run."""

    update: Update


@dataclass(frozen=True)
class Ran:
    """The new process may have executed the guest."""

    update: Update


class New(enum.Enum):
    """How the new process stands, as far as it could be found out."""

    GONE = "gone"
    EMPTY = "empty"
    """It answers, and waits for the state."""
    SILENT = "silent"
    """It is there and does not answer: it may have loaded the state, and may have run."""
    READY = "ready"
    """It has loaded the guest's latest state, or runs it."""


UpdateState = Still | Begun | Switched | Ran


@dataclass(frozen=True)
class UpdateWanted:
    """An update shall begin."""

    update: Update


@dataclass(frozen=True)
class Loaded:
    """The new process says that it has loaded what the paused old one saved."""

    in_time: bool
    """The guest has not been paused for longer than its caller allows."""
    old_intact: bool
    """The old process has the guest, paused."""


@dataclass(frozen=True)
class Answered:
    """The new process, asked once more after the switch, is there and waits to be let run."""


@dataclass(frozen=True)
class LetGo:
    """The guest runs in the new process."""


@dataclass(frozen=True)
class GiveUp:
    """Something failed, took too long, or the service was restarted: what goes on, goes on from here."""

    reason: str
    old_intact: bool
    """The old process has the guest, paused or running: it has not ended, whether it answers or not."""
    new: New
    never_ran: bool = False
    """The new process was not let run by anybody: it said so, or had ended before it was to be told."""


UpdateEvent = UpdateWanted | Loaded | Answered | LetGo | GiveUp


@dataclass(frozen=True)
class EndNew:
    """End the new process, if there is one, and remove what it has of its own; the memory stays."""


@dataclass(frozen=True)
class LetRun:
    """Let the guest run in the new process, with the permit that RAN allows; one that runs already is left alone."""


@dataclass(frozen=True)
class Adopt:
    """End the old process; what the new one has takes its place."""


UpdateAction = Append | Resume | Wait | EndNew | LetRun | Adopt


def evolve(state: UpdateState, record: Record) -> UpdateState:
    """The state after ``record``; raises :class:`InvalidTransitionError` if it cannot follow."""
    kind, update = record.kind, record.update
    if update is None:
        raise InvalidTransitionError(f"{kind.name} without an update in a journal of updates")
    match state, kind:
        case Still(last_number=last), RecordKind.UPDATE_BEGUN if update.number > last:
            return Begun(update)
        case Begun(update=now), RecordKind.UPDATE_SWITCHED if now == update:
            return Switched(update)
        case Switched(update=now), RecordKind.UPDATE_RAN if now == update:
            return Ran(update)
        case ((Begun(update=now) | Switched(update=now) | Ran(update=now)), RecordKind.UPDATE_UNDONE) if (
            now == update
        ):
            return Still(update.number)
        case Ran(update=now), RecordKind.UPDATE_DONE if now == update:
            return Still(update.number)
    raise InvalidTransitionError(f"{kind.name} cannot follow {type(state).__name__}")


def decide(state: UpdateState, event: UpdateEvent) -> list[UpdateAction]:
    """What to do about ``event``, in order."""
    match event:
        case UpdateWanted(update=update):
            if not isinstance(state, Still) or update.number <= state.last_number:
                raise InvalidTransitionError("an update is open or the number was used")
            # What an undone one left behind has an older state loaded: it must not be taken for the new one.
            return [EndNew(), _append(RecordKind.UPDATE_BEGUN, update)]
        case Loaded(in_time=in_time, old_intact=old_intact):
            if not isinstance(state, Begun):
                raise InvalidTransitionError(f"loaded in {type(state).__name__}")
            if not in_time and old_intact:  # without the old one, late is better than never
                return _undone(state.update, "the pause would have become too long", resume=True)
            return [_append(RecordKind.UPDATE_SWITCHED, state.update)]
        case Answered():
            if not isinstance(state, Switched):
                raise InvalidTransitionError(f"answered in {type(state).__name__}")
            ran = Record(RecordKind.UPDATE_RAN, state.update.machine_id, update=state.update)
            return [Append(ran, durable=False), LetRun()]
        case LetGo():
            return [Adopt(), _append(RecordKind.UPDATE_DONE, state.update)] if isinstance(state, Ran) else []
        case GiveUp():
            return _given_up(state, event)
    assert_never(event)


def _given_up(state: UpdateState, event: GiveUp) -> list[UpdateAction]:
    match state:
        case Still():
            return [EndNew()]
        case Begun(update=update) | Switched(update=update):
            if event.new is New.SILENT and not event.old_intact:
                return [Wait("the old process is gone and the new one does not answer; asking again")]
            if isinstance(state, Switched) and event.new is New.READY:
                return []  # it is let run as soon as it answers
            if event.new is New.READY and not event.old_intact:
                # What it loaded is the latest: the old one has not run since that was saved, or UNDONE would be here.
                return [_append(RecordKind.UPDATE_SWITCHED, update)]
            return _undone(update, event.reason, resume=event.old_intact)
        case Ran(update=update):
            if event.never_ran and event.old_intact:
                return _undone(update, event.reason, resume=True)
            if event.new is New.SILENT:
                return [Wait("the new process may run the guest and does not answer; asking again")]
            if event.new is New.READY:
                return [LetRun()]
            # It may have run and is gone: that is a hypervisor that crashed, like any other.
            return [Adopt(), _append(RecordKind.UPDATE_DONE, update, note=event.reason)]
    assert_never(state)


def _undone(update: Update, reason: str, *, resume: bool) -> list[UpdateAction]:
    undone = _append(RecordKind.UPDATE_UNDONE, update, note=reason)
    return [undone, EndNew(), *([Resume()] if resume else [])]


def _append(kind: RecordKind, update: Update, *, note: str = "") -> Append:
    return Append(Record(kind, update.machine_id, update=update, note=note))
