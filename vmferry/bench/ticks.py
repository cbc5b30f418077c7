"""What a guest's serial port said, with the time at which each piece arrived.

Promise: pure. A tick is a sign of life of the guest, timed by a clock that does not stop with it; the longest pause
between two of them is what somebody who talks to the guest sees.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

TICK: Final = "."
_LINE: Final = re.compile(r"T n=(\d+) w=(\d+) b=(\d+) a=(\d+) d=(\d+)\n")


@dataclass(frozen=True)
class Piece:
    """What arrived at one moment."""

    port: int
    """Which of the observed serial ports."""
    at_ns: int
    text: str


@dataclass(frozen=True)
class Line:
    """What the guest told of itself, at one moment."""

    at_ns: int
    ticks: int
    pages_written: int
    bad: int
    asked: int
    """How often it was asked for its sums."""
    done: int
    """How often it has answered that."""


@dataclass(frozen=True)
class Signs:
    """All ticks and lines, in the order of time, and the ports that each tick came from."""

    ticks: tuple[tuple[int, int], ...]
    """Time and port."""
    lines: tuple[Line, ...]

    def longest_gap_ms(self, start_ns: int, end_ns: int) -> float | None:
        """The longest time between two ticks, of those that reach into a span of time."""
        gaps = [
            after - before
            for (before, _), (after, _) in pairwise(self.ticks)
            if after > start_ns and before < end_ns
        ]
        return round(max(gaps) / 1e6, 2) if gaps else None

    def switch_gap_ms(self) -> float | None:
        """The time between the last tick here and the first there."""
        for (before, here), (after, there) in pairwise(self.ticks):
            if here != there:
                return round((after - before) / 1e6, 2)
        return None

    def tick_rate(self, start_ns: int, end_ns: int) -> float | None:
        """Ticks a second in a span of time."""
        if end_ns <= start_ns:
            return None
        times = [at for at, _ in self.ticks]
        count = bisect.bisect_left(times, end_ns) - bisect.bisect_left(times, start_ns)
        return count / (end_ns - start_ns) * 1e9

    def write_rate(self, start_ns: int, end_ns: int) -> float | None:
        """Pages written a second in a span of time, if there are lines around both of its ends."""
        start, end = self._written(start_ns), self._written(end_ns)
        if start is None or end is None or end_ns <= start_ns:
            return None
        return (end - start) / (end_ns - start_ns) * 1e9

    def _written(self, at_ns: int) -> float | None:
        """How many pages were written up to a moment, between the lines before and after it."""
        place = bisect.bisect_left([line.at_ns for line in self.lines], at_ns)
        if not 0 < place < len(self.lines):
            return None
        before, after = self.lines[place - 1], self.lines[place]
        share = (at_ns - before.at_ns) / max(1, after.at_ns - before.at_ns)
        return before.pages_written + share * (after.pages_written - before.pages_written)


def read(pieces: Sequence[Piece]) -> Signs:
    """Tell ticks and lines apart; a line counts when its end has arrived."""
    ticks = [(piece.at_ns, piece.port) for piece in pieces for char in piece.text if char == TICK]
    lines: list[Line] = []
    for port in {piece.port for piece in pieces}:
        lines += _lines([piece for piece in pieces if piece.port == port])
    return Signs(tuple(sorted(ticks)), tuple(sorted(lines, key=lambda line: (line.at_ns, line.ticks))))


def last_line(text: str) -> Line | None:
    """The last whole line of a port; its time is not known, and 0."""
    found = _lines([Piece(0, 0, text)])
    return found[-1] if found else None


def _lines(pieces: Sequence[Piece]) -> list[Line]:
    text, ends = "", []
    for piece in pieces:
        text += piece.text
        ends.append(len(text))
    return [
        Line(pieces[bisect.bisect_left(ends, match.end())].at_ns, *map(int, match.groups()))
        for match in _LINE.finditer(text)
    ]
