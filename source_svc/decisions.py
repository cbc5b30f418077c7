"""What is told of a decision about convergence, however memory is copied."""

from __future__ import annotations

from source_svc.migrations import Migration
from vmferry.errors import NotConvergingError
from vmferry.telemetry.tracing import span_event
from vmferry.transfer.convergence import Decision, Limits, RoundReport


def show_decision(
    migration: Migration, decision: Decision, limits: Limits, last: RoundReport, throttle_percent: int
) -> None:
    """Put a decision, with all that it rests on, into the resource and into the trace."""
    progress = migration.message.progress
    progress.bytes_per_second = decision.bytes_per_second
    progress.dirty_bytes_per_second = decision.dirty_bytes_per_second
    progress.expected_downtime.FromNanoseconds(int(decision.expected_downtime_s * 1e9))
    progress.allowed_downtime.FromNanoseconds(int(decision.allowed_downtime_s * 1e9))
    progress.ClearField("eta")
    if decision.eta_s is not None:
        progress.eta.FromNanoseconds(int(decision.eta_s * 1e9))
    span_event(
        "decision",
        verdict=decision.verdict.name.lower(),
        why=decision.why,
        round=last.number,
        round_ms=round(last.seconds * 1e3, 3),
        sent_bytes=last.sent_bytes,
        left_bytes=last.dirty_bytes,
        bytes_per_second=round(decision.bytes_per_second),
        dirty_bytes_per_second=round(decision.dirty_bytes_per_second),
        expected_downtime_ms=round(decision.expected_downtime_s * 1e3, 3),
        allowed_downtime_ms=round(decision.allowed_downtime_s * 1e3, 3),
        longest_downtime_ms=round(limits.longest_downtime_s * 1e3, 3),
        throttle_percent=throttle_percent,
        next_throttle_percent=decision.effort.throttle_percent,
        max_throttle_percent=limits.max_throttle_percent,
        max_rounds=limits.max_rounds,
        no_progress_s=limits.no_progress_s or 0.0,
        precopy_bytes_per_s=limits.precopy_bytes_per_s or 0.0,
        pause_bytes_per_s=limits.pause_bytes_per_s or 0.0,
        on_no_convergence=limits.on_no_convergence.value,
    )


def hopeless(rounds: int, decision: Decision) -> NotConvergingError:
    """The error of a migration whose rest will never fit the downtime limit."""
    return NotConvergingError(
        f"after {rounds} rounds the guest writes {decision.dirty_bytes_per_second / 1e6:.0f} MB/s and "
        f"{decision.bytes_per_second / 1e6:.0f} MB/s can be sent; the pause would be "
        f"{decision.expected_downtime_s * 1e3:.0f} ms, the limit is "
        f"{decision.allowed_downtime_s * 1e3:.0f} ms",
        rounds=rounds,
    )
