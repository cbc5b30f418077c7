"""How long guests are told beforehand, and how often they may ask.

Promise: pure arithmetic; whoever calls says what time it is.
"""

from __future__ import annotations

import math
from collections import deque
from types import MappingProxyType
from typing import Final

from vmferry.events.states import EventType

AZURE_NOTICE_S: Final = MappingProxyType(
    {
        EventType.FREEZE: 900.0,
        EventType.REBOOT: 900.0,
        EventType.REDEPLOY: 600.0,
        EventType.PREEMPT: 30.0,
        EventType.TERMINATE: 300.0,
    }
)
"""Least notice that Azure documents; a host that is to be taken for it sets ``event_minimum_notice``."""

MIGRATION: Final = "Virtual machine is being paused because of a memory-preserving Live Migration operation."
MAINTENANCE: Final = "Host server is undergoing maintenance."
EMERGENCY: Final = "Host server is undergoing an emergency repair."
_WINDOW_S: Final = 1.0


def expected_seconds(pause_s: float) -> int:
    """A pause as the document tells it: whole seconds, and not 0, which would mean that nothing is interrupted."""
    return max(1, math.ceil(pause_s))


def granted_s(event_type: EventType, wanted_s: float, *, minimum: bool, listening: bool) -> float:
    """How much notice is given.

    Args:
        event_type: what is to come.
        wanted_s: how much was asked for.
        minimum: whether nobody gets less than Azure's guests do.
        listening: whether there is anybody to be told.
    """
    if not listening:
        return 0.0
    return max(wanted_s, AZURE_NOTICE_S[event_type]) if minimum else wanted_s


class RateLimit:
    """So many requests within any one second."""

    def __init__(self, requests_per_s: int) -> None:
        self._limit = requests_per_s
        self._lately: deque[float] = deque()

    def admits(self, now_s: float) -> bool:
        """Whether one more request may be answered at this instant; one that may not does not count."""
        while self._lately and now_s - self._lately[0] >= _WINDOW_S:
            self._lately.popleft()
        if len(self._lately) >= self._limit:
            return False
        self._lately.append(now_s)
        return True
