"""The life of an event, and what one machine's board shows of it.

Promise: an event's identity, type and resources never change; an identity is never used again; it goes one way only,
and every other step raises::

    scheduled ──approved, or its time has come──► started ──► ended (completed)
        └──────────────────────────────────────────────────► ended (cancelled)

The number of the document grows exactly when what the guest is shown differs from what it was shown before.
"""

from __future__ import annotations

import enum
import hashlib
from dataclasses import dataclass, replace
from typing import Final

MAX_REMEMBERED: Final = 64
"""Ended events that a board remembers: their identities are still acknowledged, and their durations told."""


class EventType(enum.StrEnum):
    """What happens to the machine, in Azure's words."""

    FREEZE = "Freeze"
    REBOOT = "Reboot"
    REDEPLOY = "Redeploy"
    PREEMPT = "Preempt"
    TERMINATE = "Terminate"


class EventSource(enum.StrEnum):
    """Who wants it."""

    PLATFORM = "Platform"
    USER = "User"


class EventStatus(enum.StrEnum):
    """How far it has come; an ended event is not shown any more."""

    SCHEDULED = "Scheduled"
    STARTED = "Started"


class Ending(enum.StrEnum):
    """How an event ended."""

    COMPLETED = "completed"
    CANCELLED = "cancelled"


class InvalidTransitionError(Exception):
    """An event was asked for a step that it cannot take."""

    def __init__(self, step: str, event_id: str, found: str) -> None:
        super().__init__(f"event {event_id} cannot be {step}: it is {found}")


@dataclass(frozen=True)
class Event:
    """One interruption that is to come, or has come."""

    id: str
    """A GUID in capitals, unique for ever."""
    type: EventType
    resources: tuple[str, ...]
    """The machines it interrupts, by the names that guests know."""
    description: str
    source: EventSource
    duration_s: int
    """Expected length of the interruption: 0 is none, -1 unknown."""
    announced_s: float
    """When it was announced, in seconds of Unix time."""
    not_before_s: float
    """It does not start before this without an approval."""
    status: EventStatus = EventStatus.SCHEDULED
    approved_by: str = ""
    """The machine that approved it; empty while nobody has."""
    started_s: float = 0.0


@dataclass(frozen=True)
class Ended:
    """What became of an event."""

    event: Event
    ending: Ending
    ended_s: float
    lasted_s: float | None = None
    """Measured length of the interruption; None if there was none, or it was not measured."""
    why: str = ""


@dataclass(frozen=True)
class Board:
    """What one machine's events are, and what its guest was last shown."""

    incarnation: int = 0
    """Number of the document that was shown last; 0: none was."""
    shown: str = ""
    """Digest of what it said."""
    events: tuple[Event, ...] = ()
    ended: tuple[Ended, ...] = ()
    """The newest last."""
    asked_s: float = 0.0
    """When the guest asked for its events last, in seconds of Unix time; 0: it never did, or nobody noted it."""

    def find(self, event_id: str) -> Event | None:
        """An event that has not ended."""
        return next((event for event in self.events if event.id == event_id), None)

    def outcome(self, event_id: str) -> Ended | None:
        """What became of an event, if that is remembered."""
        return next((one for one in self.ended if one.event.id == event_id), None)

    def knows(self, event_id: str) -> bool:
        """Whether an identity is, or was lately, that of an event here; the case of its letters does not matter."""
        wanted = event_id.upper()
        return any(wanted == one.id.upper() for one in (*self.events, *(past.event for past in self.ended)))


def scheduled(board: Board, event: Event) -> Board:
    """Announce an event."""
    if board.knows(event.id):
        raise InvalidTransitionError("announced", event.id, "known already")
    return replace(board, events=(*board.events, event))


def approved(board: Board, event_id: str, by: str) -> Board:
    """Somebody lets an event start before its time; the first voice counts, every further one changes nothing.

    It is for the caller to know who is told of the event: the machines that it names, and those of their set.
    """
    wanted = event_id.upper()
    return replace(
        board,
        events=tuple(
            replace(event, approved_by=by)
            if event.id.upper() == wanted and not event.approved_by and event.status is EventStatus.SCHEDULED
            else event
            for event in board.events
        ),
    )


def started(board: Board, event_id: str, now_s: float) -> Board:
    """The interruption begins."""
    event = board.find(event_id)
    if event is None or event.status is not EventStatus.SCHEDULED:
        raise InvalidTransitionError("started", event_id, event.status if event else "over")
    if not may_start(event, now_s):
        raise InvalidTransitionError("started", event_id, "neither approved nor due")
    changed = replace(event, status=EventStatus.STARTED, started_s=now_s)
    return replace(board, events=tuple(changed if one is event else one for one in board.events))


def ended(
    board: Board, event_id: str, now_s: float, *, lasted_s: float | None = None, why: str = ""
) -> Board:
    """The event is over: completed if it had started, cancelled otherwise."""
    event = board.find(event_id)
    if event is None:
        raise InvalidTransitionError("ended", event_id, "over")
    ending = Ending.COMPLETED if event.status is EventStatus.STARTED else Ending.CANCELLED
    past = (*board.ended, Ended(event, ending, now_s, lasted_s, why))[-MAX_REMEMBERED:]
    return replace(board, events=tuple(one for one in board.events if one is not event), ended=past)


def may_start(event: Event, now_s: float) -> bool:
    """Whether somebody approved it, or its time has come."""
    return bool(event.approved_by) or now_s >= event.not_before_s


def listed(board: Board, now_s: float, linger_s: float) -> tuple[Event, ...]:
    """The events that a guest is shown: those that are not over, and for a while those that were started."""
    lingering = tuple(
        one.event
        for one in board.ended
        if one.ending is Ending.COMPLETED and 0 <= now_s - one.ended_s < linger_s
    )
    return (*lingering, *board.events)


def shown(board: Board, content: bytes) -> Board:
    """The guest is about to be shown ``content``: the number grows if it was shown something else before."""
    digest = hashlib.sha256(content).hexdigest()
    if board.incarnation and digest == board.shown:
        return board
    return replace(board, incarnation=board.incarnation + 1, shown=digest)


def listening(board: Board, now_s: float, idle_s: float) -> bool:
    """Whether the guest has asked for its events lately; without a limit every guest counts."""
    return not idle_s or now_s - board.asked_s <= idle_s


def asked(board: Board, now_s: float, idle_s: float) -> Board:
    """The guest asks for its events: after a long silence the numbers of its documents begin anew."""
    if board.asked_s and not listening(board, now_s, idle_s):
        board = replace(board, incarnation=0, shown="")
    return replace(board, asked_s=now_s)


def merged(here: Board, arriving: Board) -> Board:
    """What a machine brings from another host, where something of an earlier stay may lie.

    What it brings is newer, whatever the clocks say; the number of its document never goes back.
    """
    known = {one.event.id for one in arriving.ended} | {event.id for event in arriving.events}
    past = tuple(one for one in here.ended if one.event.id not in known)
    if here.incarnation > arriving.incarnation:
        # Something was shown here that the other host cannot have known of.
        arriving = replace(arriving, incarnation=here.incarnation + 1, shown="")
    return replace(
        arriving,
        ended=(*past, *arriving.ended)[-MAX_REMEMBERED:],
        asked_s=max(here.asked_s, arriving.asked_s),
    )
