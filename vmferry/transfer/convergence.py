"""When to stop copying and switch: the convergence policy, from measured rates. Pure: no I/O, no clock.

Promise: the guest is paused only when the pause is predicted to fit the downtime limit, and not before further rounds
would make it much shorter; a guest that writes faster than its memory can be sent is never paused for longer than
asked, the migration ends instead.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What the caller allows."""

    downtime_s: float
    max_rounds: int


@dataclass(frozen=True)
class RoundReport:
    """What one finished round has shown."""

    number: int
    seconds: float
    sent_bytes: int
    """Page contents that went over the lanes."""
    dirty_bytes: int
    """What the guest has written since the round began: the next round's work."""


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


# Pausing, device state, seal, two synced records and the resume: measured at 5 to 15 ms, allowed for generously.
FIXED_DOWNTIME_S = 0.020
NOT_READY_S = 0.05
"""What the source waits after a round when only the destination is not ready yet."""
_LITTLE_BYTES = 1024 * 1024
"""What is sent in a few milliseconds anyway."""
_MUCH_LESS = 0.5
_STALLED_ROUNDS = 5
_SHRINKING = 0.95


def decide(
    history: list[RoundReport], limits: Limits, *, fallback_bytes_per_second: float = 200e6
) -> Decision:
    """What to do now that the last round of ``history`` is over."""
    last = history[-1]
    rate = _send_rate(history) or fallback_bytes_per_second
    dirty_rate = last.dirty_bytes / last.seconds if last.seconds > 0 else 0.0
    downtime = FIXED_DOWNTIME_S + last.dirty_bytes / rate
    fits = last.dirty_bytes == 0 or downtime <= limits.downtime_s
    converges = dirty_rate < rate
    last_chance = last.number >= limits.max_rounds
    if fits and (last_chance or not _worth_another_round(last, rate, dirty_rate)):
        return Decision(Verdict.SWITCH, rate, dirty_rate, downtime, 0.0)
    eta = last.dirty_bytes / (rate - dirty_rate) if converges else None
    hopeless = not fits and (last_chance or (not converges and _stalled(history)))
    verdict = Verdict.GIVE_UP if hopeless else Verdict.CONTINUE
    return Decision(verdict, rate, dirty_rate, downtime, eta)


def _worth_another_round(last: RoundReport, rate: float, dirty_rate: float) -> bool:
    """Whether one more round would leave much less to send in the pause."""
    left_afterwards = dirty_rate * last.dirty_bytes / rate
    return last.dirty_bytes > _LITTLE_BYTES and left_afterwards <= last.dirty_bytes * _MUCH_LESS


def _send_rate(history: list[RoundReport]) -> float:
    """Bytes per second over the recent rounds that sent enough to tell."""
    recent = [report for report in history[-3:] if report.sent_bytes > 0 and report.seconds > 0]
    seconds = sum(report.seconds for report in recent)
    return sum(report.sent_bytes for report in recent) / seconds if seconds else 0.0


def _stalled(history: list[RoundReport]) -> bool:
    """Whether the last rounds have not made the remainder smaller."""
    if len(history) < _STALLED_ROUNDS:
        return False
    recent = [report.dirty_bytes for report in history[-_STALLED_ROUNDS:]]
    return min(recent[1:]) >= recent[0] * _SHRINKING
