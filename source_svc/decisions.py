"""What is told of a decision about convergence, however memory is copied."""

from __future__ import annotations

from source_svc.migrations import Migration
from vmferry.errors import NotConvergingError
from vmferry.telemetry.tracing import span_event
from vmferry.transfer.convergence import Decision, Limits


def show_decision(migration: Migration, decision: Decision) -> None:
    """Put a decision's figures into the resource and into the trace."""
    progress = migration.message.progress
    progress.bytes_per_second = decision.bytes_per_second
    progress.dirty_bytes_per_second = decision.dirty_bytes_per_second
    progress.expected_downtime.FromNanoseconds(int(decision.expected_downtime_s * 1e9))
    progress.ClearField("eta")
    if decision.eta_s is not None:
        progress.eta.FromNanoseconds(int(decision.eta_s * 1e9))
    span_event(
        "decision",
        verdict=decision.verdict.name.lower(),
        bytes_per_second=round(decision.bytes_per_second),
        dirty_bytes_per_second=round(decision.dirty_bytes_per_second),
        expected_downtime_ms=round(decision.expected_downtime_s * 1e3, 3),
    )


def hopeless(rounds: int, decision: Decision, limits: Limits) -> NotConvergingError:
    """The error of a migration whose rest will never fit the downtime limit."""
    return NotConvergingError(
        f"after {rounds} rounds the guest writes {decision.dirty_bytes_per_second / 1e6:.0f} MB/s and "
        f"{decision.bytes_per_second / 1e6:.0f} MB/s can be sent; the pause would be "
        f"{decision.expected_downtime_s * 1e3:.0f} ms, the limit is {limits.downtime_s * 1e3:.0f} ms",
        rounds=rounds,
    )
