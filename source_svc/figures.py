"""What the migrations of this host add to its metrics.

Promise: whatever a migration sends is counted once, while it is sent; how it came out is counted when it ends, also
if this process only found it open.
"""

from __future__ import annotations

from vmferry.errors import CancelledByCallerError, catalogue
from vmferry.telemetry import metrics
from vmferry.v1 import migration_pb2 as pb


def outcome_name(outcome: pb.MigrationOutcome.ValueType) -> str:
    """An outcome as metrics name it."""
    return pb.MigrationOutcome.Name(outcome).removeprefix("MIGRATION_OUTCOME_").lower()


def phase_name(phase: pb.MigrationPhase.ValueType) -> str:
    """A phase as metrics name it."""
    return pb.MigrationPhase.Name(phase).removeprefix("MIGRATION_PHASE_").lower()


def begin_at_zero() -> None:
    """Let every series exist before its first event, so that the first one is seen as an increase."""
    metrics.start_migrations("completed", [""])
    metrics.start_migrations("cancelled", [CancelledByCallerError.reason])
    metrics.start_migrations("failed", sorted(catalogue()))
    metrics.add_traffic((0, 0, 0, 0))
    for call in ("Begin", "Seal", "Go"):
        metrics.count_retry(call, times=0)


class Figures:
    """Those of one migration."""

    def __init__(self, message: pb.Migration) -> None:
        self._message = message
        self._counted = (0, 0, 0, 0)

    def changed(self) -> None:
        """Count what was sent since the last time."""
        progress = self._message.progress
        now = (progress.sent_bytes, progress.wire_bytes, progress.repeated_bytes, progress.reconnects)
        if now != self._counted:
            metrics.add_traffic([max(0, new - old) for new, old in zip(now, self._counted, strict=True)])
            self._counted = now

    def left(self, phase: pb.MigrationPhase.ValueType, seconds: float) -> None:
        """Count a phase that is over."""
        metrics.record_phase(phase_name(phase), seconds)

    def ended(self) -> None:
        """Count the end."""
        message = self._message
        metrics.record_migration(
            outcome=outcome_name(message.outcome),
            reason=message.reason.reason,
            seconds=message.total.ToNanoseconds() / 1e9,
        )
        if message.outcome == pb.MIGRATION_OUTCOME_COMPLETED:
            metrics.record_completion(
                path=message.path,
                downtime_s=message.downtime.ToNanoseconds() / 1e9,
                rounds=message.progress.round,
            )
