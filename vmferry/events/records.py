"""A board as text: what is kept on disk, and what a machine takes along to another host.

Promise: what was written is read back to an equal board; text that is no board raises ValueError and nothing else.
"""

from __future__ import annotations

import json
from typing import Any, Final

from vmferry.events.states import (
    MAX_REMEMBERED,
    Board,
    Ended,
    Ending,
    Event,
    EventSource,
    EventStatus,
    EventType,
)

FORMAT: Final = 1
MAX_BYTES: Final = 256 * 1024
"""A board of that size holds no event that anybody announced."""
_MAX_EVENTS: Final = 256
_MAX_CHARS: Final = 1024
_LAST_S: Final = 1e11
_MAX_INCARNATION: Final = (1 << 63) - (1 << 32)
"""So that it can still grow within a signed number of 64 bits."""


def to_text(board: Board) -> str:
    """The board as text."""
    return json.dumps(
        {
            "format": FORMAT,
            "incarnation": board.incarnation,
            "shown": board.shown,
            "asked_s": board.asked_s,
            "events": [_event(event) for event in board.events],
            "ended": [
                {
                    "event": _event(one.event),
                    "ending": one.ending.value,
                    "ended_s": one.ended_s,
                    "lasted_s": one.lasted_s,
                    "why": one.why,
                }
                for one in board.ended
            ],
        },
        separators=(
            ",",
            ":",
        ),  # written while guests stand still, and without indentation it is C that writes
    )


def from_text(text: str) -> Board:
    """The board that a text says.

    Raises:
        ValueError: it is none.
    """
    try:
        said = json.loads(text)
        if said["format"] != FORMAT:
            raise ValueError(f"format {said['format']!r} is not known here")
        incarnation = _number(said["incarnation"], int)
        if not 0 <= incarnation <= _MAX_INCARNATION:
            raise ValueError("the incarnation is out of range")
        events = tuple(_read(one) for one in said["events"])
        past = tuple(_read_ended(one) for one in said["ended"])
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"not a board of events: {error!r}") from error
    if len(events) > _MAX_EVENTS or len(past) > MAX_REMEMBERED:
        raise ValueError("too many events")
    asked_s = _number(said.get("asked_s", 0.0), float)  # which earlier releases do not write
    return Board(incarnation, _text(said["shown"]), events, past, asked_s)


def _event(event: Event) -> dict[str, Any]:
    return {
        "id": event.id,
        "type": event.type.value,
        "resources": list(event.resources),
        "description": event.description,
        "source": event.source.value,
        "duration_s": event.duration_s,
        "announced_s": event.announced_s,
        "not_before_s": event.not_before_s,
        "status": event.status.value,
        "approved_by": event.approved_by,
        "started_s": event.started_s,
    }


def _read(said: Any) -> Event:
    resources = said["resources"]
    if not isinstance(resources, list) or len(resources) > _MAX_EVENTS:
        raise ValueError("resources are no list, or too many")
    return Event(
        id=_text(said["id"]),
        type=EventType(said["type"]),
        resources=tuple(_text(name) for name in resources),
        description=_text(said["description"]),
        source=EventSource(said["source"]),
        duration_s=_number(said["duration_s"], int),
        announced_s=_number(said["announced_s"], float),
        not_before_s=_number(said["not_before_s"], float),
        status=EventStatus(said["status"]),
        approved_by=_text(said["approved_by"]),
        started_s=_number(said["started_s"], float),
    )


def _read_ended(said: Any) -> Ended:
    lasted = said["lasted_s"]
    return Ended(
        _read(said["event"]),
        Ending(said["ending"]),
        _number(said["ended_s"], float),
        None if lasted is None else _number(lasted, float),
        _text(said["why"]),
    )


def _text(value: object) -> str:
    if not isinstance(value, str) or len(value) > _MAX_CHARS:
        raise ValueError("a text is missing, or too long")
    return value


def _number(value: object, kind: type) -> Any:
    known = isinstance(value, (int, kind)) and not isinstance(value, bool)
    if not known or (kind is float and not -_LAST_S < value < _LAST_S):  # type: ignore[operator]  # a number
        raise ValueError("a number is missing, of the wrong type or out of range")
    return kind(value)
