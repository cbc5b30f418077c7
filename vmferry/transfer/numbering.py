"""Numbering of frames on a lane: what may be sent, what was taken in, and what to send again.

Promise: both ends count the same frames. A frame is taken in exactly once however often it is sent, a gap is
never accepted, and a sender never has more than its window unacknowledged. Pure: no I/O, no clock.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from vmferry.errors import StreamBrokenError

Frame = TypeVar("Frame")


@dataclass(frozen=True)
class Totals:
    """What a lane carried since the attempt began; both ends must agree on it."""

    frames: int = 0
    data_bytes: int = 0


class SendingLane(Generic[Frame]):
    """The sender's half: keeps every frame until it is acknowledged."""

    def __init__(self, window_bytes: int) -> None:
        self.window_bytes = window_bytes
        self.totals = Totals()
        self._unacknowledged: deque[tuple[int, Frame, int, int]] = deque()
        self._acknowledged = 0
        self._in_flight_bytes = 0

    @property
    def next_sequence(self) -> int:
        """The number of the next new frame."""
        return self.totals.frames + 1

    @property
    def idle(self) -> bool:
        """Whether every frame was acknowledged."""
        return not self._unacknowledged

    @property
    def acknowledged(self) -> int:
        """The highest acknowledged number."""
        return self._acknowledged

    @property
    def in_flight_bytes(self) -> int:
        """Bytes of frames that are not acknowledged, as the window counts them."""
        return self._in_flight_bytes

    def has_room(self, frame_bytes: int) -> bool:
        """Whether a frame may be sent now; an empty lane takes any."""
        return self.idle or self._in_flight_bytes + frame_bytes <= self.window_bytes

    def sent(self, frame: Frame, *, frame_bytes: int, data_bytes: int, held_bytes: int = 0) -> None:
        """Note that ``frame``, made with ``next_sequence``, goes out.

        Args:
            frame: what may have to be sent again.
            frame_bytes: its size.
            data_bytes: what it stands for.
            held_bytes: what the window counts it as, if that is more than its size.
        """
        held_bytes = max(held_bytes, frame_bytes)
        self.totals = Totals(self.totals.frames + 1, self.totals.data_bytes + data_bytes)
        self._unacknowledged.append((self.totals.frames, frame, frame_bytes, held_bytes))
        self._in_flight_bytes += held_bytes

    def acknowledge(self, sequence: int) -> int:
        """Forget frames up to ``sequence``; returns how many bytes these had.

        Raises:
            StreamBrokenError: the number was never sent.
        """
        if sequence > self.totals.frames:
            raise StreamBrokenError(f"frame {sequence} was acknowledged, only {self.totals.frames} were sent")
        freed = 0
        while self._unacknowledged and self._unacknowledged[0][0] <= sequence:
            _, _, frame_bytes, held_bytes = self._unacknowledged.popleft()
            freed += frame_bytes
            self._in_flight_bytes -= held_bytes
        self._acknowledged = max(self._acknowledged, sequence)
        return freed

    def unacknowledged(self) -> Iterator[Frame]:
        """The frames to send again on a reopened lane, in order."""
        return (frame for _, frame, *_ in tuple(self._unacknowledged))


class Arrival(enum.Enum):
    """What a frame is to the receiver."""

    NEW = enum.auto()
    REPEATED = enum.auto()
    """Taken in before; to be acknowledged again and otherwise ignored."""


class ReceivingLane:
    """The receiver's half: takes frames in order and only once."""

    def __init__(self) -> None:
        self.totals = Totals()

    def arrival(self, sequence: int) -> Arrival:
        """Judge a frame by its number; it counts only after :meth:`taken`.

        Raises:
            StreamBrokenError: frames are missing before it.
        """
        expected = self.totals.frames + 1
        if sequence == expected:
            return Arrival.NEW
        if 1 <= sequence < expected:
            return Arrival.REPEATED
        raise StreamBrokenError(
            f"frame {sequence} came where {expected} was due", expected=expected, got=sequence
        )

    def taken(self, data_bytes: int) -> None:
        """Note that the next frame has been taken in completely."""
        self.totals = Totals(self.totals.frames + 1, self.totals.data_bytes + data_bytes)

    def check_end(self, sender: Totals) -> None:
        """Agree that the lane was whole.

        Raises:
            StreamBrokenError: the ends count differently.
        """
        if sender != self.totals:
            raise StreamBrokenError(
                f"the source counts {sender.frames} frames and {sender.data_bytes} bytes, "
                f"{self.totals.frames} and {self.totals.data_bytes} arrived"
            )
