"""The events document as bytes, and its ETag.

Promise: the members, their order, types and spelling are Azure's; equal events give equal bytes, and equal ETags mean
equal documents.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import json
from collections.abc import Iterable
from typing import Final

from vmferry.events.states import Event, EventStatus

_DAYS: Final = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_MONTHS: Final = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
RESOURCE_TYPE: Final = "VirtualMachine"


def content(events: Iterable[Event]) -> bytes:
    """The array ``Events``, as it stands in the document."""
    return _json([_members(event) for event in events])


def document(incarnation: int, array: bytes) -> bytes:
    """The whole document around an array of events."""
    return b'{"DocumentIncarnation":%d,"Events":%s}' % (incarnation, array)


def etag(text: bytes) -> str:
    """The ETag of a document, quotes and all."""
    return f'"{hashlib.sha256(text).hexdigest()[:32]}"'


def http_date(unix_s: float) -> str:
    """An instant as RFC 1123 writes it, whatever the process's language is; fractions of a second are cut off."""
    when = dt.datetime.fromtimestamp(int(unix_s), dt.UTC)
    day, month = _DAYS[when.weekday()], _MONTHS[when.month - 1]
    return f"{day}, {when.day:02} {month} {when.year:04} {when:%H:%M:%S} GMT"


def _members(event: Event) -> dict[str, object]:
    scheduled = event.status is EventStatus.SCHEDULED
    return {
        "EventId": event.id,
        "EventStatus": event.status.value,
        "EventType": event.type.value,
        "ResourceType": RESOURCE_TYPE,
        "Resources": list(event.resources),
        "NotBefore": http_date(event.not_before_s) if scheduled else "",
        "Description": event.description,
        "EventSource": event.source.value,
        "DurationInSeconds": event.duration_s,
    }


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode("ascii")
