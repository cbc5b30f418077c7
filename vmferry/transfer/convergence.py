"""When to stop copying and switch: the convergence policy, from measured rates. Pure: no I/O, no clock.

What is tried, in this order, each step only when the one before did not help::

    copy in rounds --> accept a longer pause, --> slow the guest down, --> the caller's choice:
                       up to the longest allowed  up to what is allowed    abort, wait, or switch all the same

Promise: the guest is paused only when the pause is predicted to fit what is accepted at that moment, and as soon as
another round is not predicted to make it much shorter; the only exceptions are a caller who chose to switch whatever
it costs when nothing is left to try, and one who wants it now, and the cost is in the decision. Nothing that the
caller did not allow is tried.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

MAX_THROTTLE_PERCENT: Final = 95
"""The guest must still be able to answer."""
THROTTLE_STEPS: Final = (20, 40, 60, 80, MAX_THROTTLE_PERCENT)


class OnNoConvergence(enum.StrEnum):
    """What to do when nothing else is left to try."""

    ABORT = "abort"
    WAIT = "wait"
    SWITCH = "switch"


@dataclass(frozen=True)
class Limits:
    """What the caller allows."""

    downtime_s: float
    """The pause that is aimed at."""
    max_rounds: int
    """After so many rounds at the latest, the next thing is tried."""
    max_downtime_s: float = 0.0
    """The longest pause that is acceptable, if that is longer."""
    max_throttle_percent: int = 0
    on_no_convergence: OnNoConvergence = OnNoConvergence.ABORT
    no_progress_s: float | None = None
    """How long rounds may leave no less to send before the next thing is tried, however few they are."""
    precopy_bytes_per_s: float | None = None
    """What may be sent per second while the guest runs."""
    pause_bytes_per_s: float | None = None
    """What may be sent per second while it is paused."""
    switch_now: bool = False
    """A caller wants no more rounds, whatever the pause."""

    @property
    def longest_downtime_s(self) -> float:
        """The longest pause that is acceptable in the end."""
        return max(self.downtime_s, self.max_downtime_s)


@dataclass(frozen=True)
class RoundReport:
    """What one finished round has shown."""

    number: int
    seconds: float
    sent_bytes: int
    """Page contents that went over the lanes."""
    dirty_bytes: int
    """What the guest has written since the round began: the next round's work."""


@dataclass(frozen=True)
class Effort:
    """What is being done for a guest that writes too fast."""

    raises: int = 0
    """How often the accepted pause was raised."""
    throttle_percent: int = 0
    since_round: int = 0
    """The round after which this was last changed: earlier ones say nothing about what it does."""

    def downtime_s(self, limits: Limits) -> float:
        """The pause that is accepted now."""
        share = min(self.raises, _RAISES) / _RAISES
        return limits.downtime_s + (limits.longest_downtime_s - limits.downtime_s) * share


NO_EFFORT: Final = Effort()


class Verdict(enum.Enum):
    """What to do after a round."""

    CONTINUE = enum.auto()
    SWITCH = enum.auto()
    GIVE_UP = enum.auto()


@dataclass(frozen=True)
class Decision:
    """The verdict and the figures it rests on; recorded in the trace."""

    verdict: Verdict
    bytes_per_second: float
    dirty_bytes_per_second: float
    expected_downtime_s: float
    eta_s: float | None
    """Predicted time to the switch; ``None`` while it does not converge."""
    allowed_downtime_s: float = 0.0
    """The pause that was accepted when this was decided."""
    effort: Effort = NO_EFFORT
    """What is to be done for the next round."""
    why: str = ""
    """In a few words."""
    waiting: bool = False
    """Nothing is left to try, and the caller wants to wait."""
    forced: bool = False
    """Whatever the pause: nothing is left to try and the caller chose that, or a caller wants it now."""


# Pausing, device state, seal, two synced records and the resume: measured at 5 to 15 ms, allowed for generously.
FIXED_DOWNTIME_S = 0.020
NOT_READY_S = 0.05
"""What the source waits after a round when only the destination is not ready yet."""
WAITING_S: Final = 0.5
"""What it waits after a round when a caller wants to wait, so that it does not copy the same again and again."""
_LITTLE_BYTES = 1024 * 1024
"""What is sent in a few milliseconds anyway."""
_MUCH_LESS = 0.5
_STALLED_ROUNDS = 5
_SHRINKING = 0.95
_RAISES: Final = 4
_TRIED_ROUNDS: Final = 3
"""After so many rounds it shows whether something that was tried has helped."""
_AT_THE_CAP: Final = 0.85
"""A rate that comes so close to the cap is the cap's, and says nothing about the link."""


def decide(
    history: Sequence[RoundReport],
    limits: Limits,
    effort: Effort = NO_EFFORT,
    *,
    fallback_bytes_per_second: float = 200e6,
) -> Decision:
    """What to do now that the last round of ``history`` is over."""
    last = history[-1]
    # What was allowed when it was begun may not be any more.
    effort = replace(effort, throttle_percent=min(effort.throttle_percent, limits.max_throttle_percent))
    rate = _send_rate(history) or fallback_bytes_per_second
    dirty_rate = last.dirty_bytes / last.seconds if last.seconds > 0 else 0.0
    downtime = FIXED_DOWNTIME_S + last.dirty_bytes / _pause_rate(rate, limits)
    allowed = effort.downtime_s(limits)
    fits = last.dirty_bytes == 0 or downtime <= allowed
    eta = last.dirty_bytes / (rate - dirty_rate) if dirty_rate < rate else None
    found = Decision(Verdict.CONTINUE, rate, dirty_rate, downtime, eta, allowed, effort)
    if limits.switch_now:
        return replace(found, verdict=Verdict.SWITCH, eta_s=0.0, forced=True, why="a caller wants it now")
    last_chance = last.number >= limits.max_rounds
    if fits:
        if last_chance or effort != NO_EFFORT or not _worth_another_round(last, rate, dirty_rate):
            return replace(found, verdict=Verdict.SWITCH, eta_s=0.0, why="the rest fits the pause")
        return replace(found, why="another round makes the pause much shorter")
    if not _struggles(history, limits, effort, converges=dirty_rate < rate):
        return replace(found, why="the rest does not fit the pause yet")
    return _try_harder(found, limits, last.number)


def _try_harder(found: Decision, limits: Limits, number: int) -> Decision:
    """The next thing to try for a guest whose rest does not get smaller, or the caller's choice."""
    effort = found.effort
    raises = effort.raises
    while raises < _RAISES and effort.downtime_s(limits) < limits.longest_downtime_s:
        # A step that does not help now is not worth waiting for.
        raises += 1
        effort = replace(effort, raises=raises, since_round=number)
        allowed = effort.downtime_s(limits)
        if found.expected_downtime_s <= allowed:
            return replace(
                found,
                verdict=Verdict.SWITCH,
                eta_s=0.0,
                effort=effort,
                allowed_downtime_s=allowed,
                why="rounds leave no less to send, and the rest fits a longer pause that is acceptable",
            )
    further = next((step for step in _steps(limits) if step > effort.throttle_percent), None)
    if further is not None:
        slower = replace(effort, throttle_percent=further, since_round=number)
        why = "rounds leave no less to send, and the guest may be slowed down"
        return replace(found, effort=slower, allowed_downtime_s=slower.downtime_s(limits), why=why)
    found = replace(
        found, effort=effort, allowed_downtime_s=effort.downtime_s(limits), why="nothing is left to try"
    )
    match limits.on_no_convergence:
        case OnNoConvergence.WAIT:
            return replace(found, waiting=True)
        case OnNoConvergence.SWITCH:
            return replace(found, verdict=Verdict.SWITCH, eta_s=0.0, forced=True)
    return replace(found, verdict=Verdict.GIVE_UP)


def _steps(limits: Limits) -> list[int]:
    """How far the guest is slowed down, one after the other."""
    most = limits.max_throttle_percent
    return [*(step for step in THROTTLE_STEPS if step < most), *([most] if most else [])]


def _struggles(history: Sequence[RoundReport], limits: Limits, effort: Effort, *, converges: bool) -> bool:
    """Whether rounds go on without leaving less to send."""
    since = [report for report in history if report.number > effort.since_round]
    if effort == NO_EFFORT and history[-1].number >= limits.max_rounds:
        return True
    if limits.no_progress_s is not None and _without_progress_s(since) > limits.no_progress_s:
        return True
    if effort != NO_EFFORT:
        return _stalled(since, _TRIED_ROUNDS) or len(since) >= limits.max_rounds
    return not converges and _stalled(since, _STALLED_ROUNDS)


def _worth_another_round(last: RoundReport, rate: float, dirty_rate: float) -> bool:
    """Whether one more round would leave much less to send in the pause."""
    left_afterwards = dirty_rate * last.dirty_bytes / rate
    return last.dirty_bytes > _LITTLE_BYTES and left_afterwards <= last.dirty_bytes * _MUCH_LESS


def _pause_rate(rate: float, limits: Limits) -> float:
    """Bytes per second in the pause: those of the rounds, unless it was their cap that was measured."""
    allowed = limits.pause_bytes_per_s
    capped = limits.precopy_bytes_per_s is not None and rate >= limits.precopy_bytes_per_s * _AT_THE_CAP
    if capped and allowed is not None:
        return allowed
    return rate if allowed is None else min(rate, allowed)


def _send_rate(history: Sequence[RoundReport]) -> float:
    """Bytes per second over the recent rounds that sent enough to tell."""
    recent = [report for report in history[-3:] if report.sent_bytes > 0 and report.seconds > 0]
    seconds = sum(report.seconds for report in recent)
    return sum(report.sent_bytes for report in recent) / seconds if seconds else 0.0


def _without_progress_s(history: Sequence[RoundReport]) -> float:
    """How long ago there was least left to send, in rounds that are over."""
    if not history:
        return 0.0
    best = min(range(len(history)), key=lambda index: history[index].dirty_bytes)
    return sum(report.seconds for report in history[best + 1 :])


def _stalled(history: Sequence[RoundReport], rounds: int) -> bool:
    """Whether the last rounds have not made the remainder smaller."""
    if len(history) < rounds:
        return False
    recent = [report.dirty_bytes for report in history[-rounds:]]
    return min(recent[1:]) >= recent[0] * _SHRINKING
