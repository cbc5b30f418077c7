"""An event, the time at which it is announced, and ids, for tests of the board and of what is said of it."""

from __future__ import annotations

from vmferry.events import policy
from vmferry.events.states import Event, EventSource, EventType

NOW = 1_780_000_000.0
ID = "C7061BAC-AFDC-4513-B24B-AA5F13A16123"
OTHER = "602D9444-D2CD-49C7-8624-8643E7171297"
EVENT = Event(
    id=ID,
    type=EventType.FREEZE,
    resources=("WestNO_0",),
    description=policy.MIGRATION,
    source=EventSource.PLATFORM,
    duration_s=5,
    announced_s=NOW,
    not_before_s=NOW + 900,
)
