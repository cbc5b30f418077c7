"""How a migration would go, from what was measured beforehand. Pure: no I/O, no clock.

Promise: the rounds are played through with the very policy that will decide in earnest
(:func:`vmferry.transfer.convergence.decide`), three times: with what was measured, and with its favourable and its
unfavourable ends. Thus a prediction fails to converge exactly when the policy would give up, and its bounds say what
the measurements leave open, not more: load that comes later is in none of them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import fmean, median, stdev

from vmferry.transfer.convergence import NO_EFFORT, NOT_READY_S, Limits, RoundReport, Verdict, decide

_LEAST_ERROR = 0.15
"""Relative error of anything that was looked at for a fraction of a second, however little it varied in it."""
_ALONE_ERROR = 0.4
"""The same when there was a single look."""
_STANDARD_ERRORS = 2.0
_ALIKE_BYTES = 4096


@dataclass(frozen=True)
class Figure:
    """A number as it is expected, and its bounds."""

    expected: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Figure:
        """The mean of what was measured several times, with bounds by how much it varied."""
        mean = fmean(values)
        error = max(_LEAST_ERROR, _STANDARD_ERRORS * relative_error(values))
        return cls(mean, mean * max(1 - error, 0.1), mean * (1 + error))

    @classmethod
    def around(cls, values: Sequence[float]) -> Figure:
        """The median of what happened several times, with the extremes, and a little beyond, as bounds."""
        return cls(median(values), 0.8 * min(values), 1.25 * max(values))


def relative_error(values: Sequence[float]) -> float:
    """The standard error of the mean of ``values``, as a part of it."""
    mean = fmean(values)
    if not mean:
        return 0.0
    if len(values) == 1:
        return _ALONE_ERROR / _STANDARD_ERRORS
    return stdev(values) / float(len(values) ** 0.5) / mean


@dataclass(frozen=True)
class DirtyCurve:
    """How many distinct bytes the guest has written so long after it was last looked at.

    Not a rate: a guest that writes to the same memory again and again makes no more of it dirty, and the curve
    becomes flat. Between the points it is straight. Beyond the last one it goes on with the slope it ended with,
    which assumes that a guest whose writes had not begun to repeat themselves by then never will; so a working set
    that takes longer than the sample to be written to once looks as large as the machine.
    """

    points: Sequence[tuple[float, float]]
    """Seconds and bytes, both growing; at least one."""
    error: float
    """Standard error of the bytes, as a part of them."""

    def __post_init__(self) -> None:
        """Refuse what is no curve."""
        growing = all(
            early[0] < late[0] and early[1] <= late[1] for early, late in pairwise(((0.0, 0.0), *self.points))
        )
        if not self.points or not growing:
            raise ValueError(f"{self.points} do not grow")

    def bytes_after(self, seconds: float) -> float:
        """Distinct bytes written after ``seconds``."""
        points = ((0.0, 0.0), *self.points)
        index = min(bisect_left(points, seconds, key=lambda point: point[0]), len(points) - 1)
        (earlier, less), (later, more) = points[index - 1 if index else 0], points[index or 1]
        return less + (more - less) * (seconds - earlier) / (later - earlier)

    def scaled(self, factor: float) -> DirtyCurve:
        """The same guest if it wrote so many times as much."""
        return replace(self, points=[(seconds, written * factor) for seconds, written in self.points])

    @property
    def rate(self) -> float:
        """Bytes per second over the whole sample."""
        seconds, written = self.points[-1]
        return written / seconds


def dirty_curve(windows: Sequence[Sequence[tuple[float, int]]]) -> DirtyCurve | None:
    """The curve that several looks at a guest show; ``None`` if there was none.

    Args:
        windows: seconds and distinct bytes of each look, taken at the same times, though some looks were longer.
    """
    longest = max((len(window) for window in windows), default=0)
    points: list[tuple[float, float]] = []
    for index in range(longest):
        taken = [window[index] for window in windows if len(window) > index]
        seconds, written = fmean(at for at, _ in taken), fmean(count for _, count in taken)
        # Looks of different lengths are of different moments, so their means may fall where no guest's writes can.
        last_at, last_written = points[-1] if points else (0.0, 0.0)
        if seconds > last_at:
            points.append((seconds, max(written, last_written)))
    if not points:
        return None
    common = min(len(window) for window in windows if window) - 1
    rates = [window[common][1] / window[common][0] for window in windows if window]
    return DirtyCurve(points, relative_error(rates))


@dataclass(frozen=True)
class FixedCosts:
    """Times that do not depend on memory, in seconds."""

    start: Figure
    """From acceptance to the first page: negotiation, ticket, start of the waiting copy, lanes."""
    round: float
    """Of every round, for counting and the last acknowledgement."""
    pause: Figure
    """Of the pause, without pages: device state, seal, journals, resume."""
    finish: Figure
    """From the resume to the end: releasing what the source held."""


@dataclass(frozen=True)
class Observed:
    """The fixed costs of a migration that has ended."""

    start_s: float
    pause_s: float
    finish_s: float


# For micro-VMs measured with both services on two cores that they share with the guests: starts of 0.16 to 0.35 s,
# pauses of 15 to 45 ms, ends of 0.04 to 0.4 s by the size of the machine. For QEMU estimated from these and not
# measured: a process that takes longer to start, and more state to save and load. Only the first migrations after the
# start of a service rest on them; see learn().
DEFAULT_COSTS = {
    "microvm": FixedCosts(
        Figure(0.25, 0.15, 0.5), 0.004, Figure(0.028, 0.015, 0.05), Figure(0.10, 0.03, 0.4)
    ),
    "qemu": FixedCosts(Figure(0.5, 0.2, 1.2), 0.004, Figure(0.050, 0.025, 0.1), Figure(0.15, 0.04, 0.5)),
}


def learn(defaults: FixedCosts, seen: Sequence[Observed]) -> FixedCosts:
    """The fixed costs, by what the last migrations took where there were any."""
    if not seen:
        return defaults
    return FixedCosts(
        Figure.around([one.start_s for one in seen]),
        defaults.round,
        Figure.around([one.pause_s for one in seen]),
        Figure.around([one.finish_s for one in seen]),
    )


@dataclass(frozen=True)
class Circumstances:
    """All that was measured before a migration."""

    memory_bytes: int
    resident_bytes: int
    """Memory that holds data and will be sent."""
    blank_bytes: int
    """Memory that is occupied and all zero: it is read and not sent."""
    dirty: DirtyCurve
    send: Figure
    """Bytes per second that the destination takes in."""
    read: float
    """Bytes per second at which memory is read and found to be zero."""
    reserve: Figure
    """Bytes per second at which the destination takes memory for a newcomer."""
    send_error: float
    """Standard error of the rate of sending."""
    sampled_s: float
    """How long the guest was looked at."""
    link_bytes_per_s: float = 0.0
    """What the link carries; pages arrive faster where they are compressed."""


@dataclass(frozen=True)
class Prediction:
    """How it would go; times in seconds."""

    total: Figure
    downtime: Figure
    converges: bool
    rounds: int


def predict(
    found: Circumstances, costs: FixedCosts, limits: Limits, *, compare_all: bool = False
) -> Prediction:
    """Play the migration through.

    Args:
        found: what was measured.
        costs: what does not depend on memory.
        limits: what the caller allows.
        compare_all: whether all memory is sent again in the pause, to be compared.
    """
    error = max(_LEAST_ERROR, _STANDARD_ERRORS * found.dirty.error)
    compared = found.memory_bytes if compare_all else 0
    start, pause, finish = costs.start, costs.pause, costs.finish
    expected = _Play(
        found,
        compared,
        found.dirty,
        found.send.expected,
        found.reserve.expected,
        _Costs(start.expected, costs.round, pause.expected, finish.expected),
    ).run(limits)
    good = _Play(
        found,
        compared,
        found.dirty.scaled(max(1 - error, 0)),
        found.send.high,
        found.reserve.high,
        _Costs(start.low, costs.round, pause.low, finish.low),
    ).run(limits)
    bad = _Play(
        found,
        compared,
        found.dirty.scaled(1 + error),
        found.send.low,
        found.reserve.low,
        _Costs(start.high, costs.round, pause.high, finish.high),
    ).run(limits)
    # A guest that writes more may be given up on, or switched, earlier: the bounds are the extremes, whichever play
    # they come from.
    totals = [course.total_s for course in (expected, good, bad)]
    pauses = [course.downtime_s for course in (expected, good, bad)]
    return Prediction(
        Figure(expected.total_s, min(totals), max(totals)),
        Figure(expected.downtime_s, min(pauses), max(pauses)),
        expected.converges,
        expected.rounds,
    )


@dataclass(frozen=True)
class _Course:
    total_s: float
    downtime_s: float
    converges: bool
    rounds: int


@dataclass(frozen=True)
class _Costs:
    start_s: float
    round_s: float
    pause_s: float
    finish_s: float


@dataclass(frozen=True)
class _Play:
    """One way it could go: a single value of everything."""

    found: Circumstances
    compared_bytes: int
    dirty: DirtyCurve
    send: float
    reserve: float
    costs: _Costs

    def run(self, limits: Limits) -> _Course:
        found, round_s = self.found, self.costs.round_s
        clock, rounds, waited = self.costs.start_s, 0, 0.0
        reserved_at = clock + found.memory_bytes / self.reserve
        sent = float(found.resident_bytes)
        precopy = min(self.send, limits.precopy_bytes_per_s or self.send)
        effort = NO_EFFORT
        seconds = sent / precopy + found.blank_bytes / found.read + round_s
        history: list[RoundReport] = []
        while True:
            rounds, clock = rounds + 1, clock + seconds
            history.append(RoundReport(rounds, seconds, round(sent), round(self._written(seconds))))
            decision = decide(history, limits, effort)
            verdict, effort = decision.verdict, decision.effort
            if verdict is Verdict.GIVE_UP or (verdict is Verdict.SWITCH and clock >= reserved_at):
                break
            waited = 0.0
            if verdict is Verdict.SWITCH:  # everything is there but the destination's memory
                history.pop()
                waited = NOT_READY_S
                clock += waited
            before, sent = sent, self._written(seconds + waited)
            seconds = sent / precopy + round_s
            if waited and abs(sent - before) < _ALIKE_BYTES:
                skipped = max(0, int((reserved_at - clock) / (seconds + waited)))
                rounds, clock = rounds + skipped, clock + skipped * (seconds + waited)
        # Between the decision and the pause both ends are asked whether they are ready; the guest writes on.
        send = min(self.send, limits.pause_bytes_per_s or self.send)
        downtime = self.costs.pause_s + self._written(seconds + round_s) / send + self._comparison_s(send)
        converges = verdict is Verdict.SWITCH
        total = clock + (downtime + self.costs.finish_s if converges else 0.0)
        return _Course(total, downtime, converges, rounds)

    def _written(self, seconds: float) -> float:
        return min(self.dirty.bytes_after(seconds), float(self.found.memory_bytes))

    def _comparison_s(self, send: float) -> float:
        holds = min(self.found.resident_bytes, self.compared_bytes)
        return holds / send + (self.compared_bytes - holds) / self.found.read
