"""How much a migration may have in flight: its own window, or its part of what all of them together may have.

Promise: however many migrations are under way, the windows of those that were opened are together never larger than
their budget (but for one frame on each lane), and equal where nobody wants less; a part grows and shrinks as others
end and begin. Pure: no I/O, no clock.
"""

from __future__ import annotations

from typing import Final

from vmferry.memory.runs import PAGE_SIZE
from vmferry.transfer.numbering import SendingLane

_FRAMES_PER_LANE: Final = 2
"""While one is taken in, the next one is on its way."""


class Budget:
    """What all windows of a service share."""

    def __init__(self, window_bytes: int) -> None:
        self._window_bytes = window_bytes
        self._open: set[Window] = set()

    def window(self, lanes: int, window_bytes: int, frame_bytes: int) -> Window:
        """A window for a migration over so many lanes, not open yet, with the most that it may come to."""
        return Window(lanes, window_bytes, frame_bytes, self)

    def part_bytes(self) -> int:
        """The part of each open window, or of the first one."""
        return self._window_bytes // max(1, len(self._open))

    def opened(self, window: Window) -> None:
        """From now on it has its part."""
        self._open.add(window)

    def closed(self, window: Window) -> None:
        """Leave its part to the others."""
        self._open.discard(window)


class Window:
    """The window of one migration, and what follows from it."""

    def __init__(self, lanes: int, window_bytes: int, frame_bytes: int, budget: Budget | None = None) -> None:
        self.lanes = lanes
        self._most_bytes = window_bytes
        self._most_frame_bytes = frame_bytes
        self._budget = budget

    def open(self) -> None:
        """Take part in the budget; twice is as good as once."""
        if self._budget is not None:
            self._budget.opened(self)

    def close(self) -> None:
        """Be done with it; safe to call twice."""
        if self._budget is not None:
            self._budget.closed(self)

    @property
    def window_bytes(self) -> int:
        """What all lanes together may have in flight now."""
        return min(self._most_bytes, self._budget.part_bytes()) if self._budget else self._most_bytes

    @property
    def lane_bytes(self) -> int:
        """The part of each lane."""
        return self.window_bytes // self.lanes

    @property
    def frame_bytes(self) -> int:
        """The largest frame that should be made now."""
        return frame_for(self.lanes, self.window_bytes, self._most_frame_bytes)

    def has_room(self, lane: SendingLane[bytes]) -> bool:
        """Whether a lane may send a frame now; other migrations may have come or gone since it sent one."""
        lane.window_bytes = self.lane_bytes
        return lane.has_room(self.frame_bytes)


def frame_for(lanes: int, window_bytes: int, most_bytes: int) -> int:
    """Page contents of a frame, in whole pages: a lane's part of the window holds two."""
    part = window_bytes // lanes // _FRAMES_PER_LANE // PAGE_SIZE * PAGE_SIZE
    return max(PAGE_SIZE, min(most_bytes, part))
