"""What a demonstration found out, and the document that says so.

Promise: the document never looks better than what happened. ``outcome`` is completed only if every crossing was,
``memory_identical`` and ``guest_ok`` are true only if they were proven; docs/cli.md describes every field.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from vmferry.cli.clocks import clock_document
from vmferry.cli.output import milliseconds
from vmferry.cli.progress import outcome_name
from vmferry.cli.watch import exit_code
from vmferry.errors import ExitCode
from vmferry.telemetry.spans import SpanRecord, span_tree
from vmferry.telemetry.timeline import tree_json
from vmferry.v1.clock_pb2 import ClockReport
from vmferry.v1.migration_pb2 import MIGRATION_OUTCOME_COMPLETED, Migration


@dataclass(frozen=True)
class Crossing:
    """One migration of the demonstration, as its source told it at the end."""

    migration: Migration
    direction: str
    """Such as ``a to b``."""
    verified: bool
    """Whether all memory was compared byte for byte."""
    guest_gap_ms: float | None = None
    """The gap that the guest saw in its own clock, if it said so."""
    guest_slowdown_percent: float | None = None
    """How much less it counted per second than before, if it arrived."""

    @property
    def completed(self) -> bool:
        """Whether the guest runs at the destination."""
        return self.migration.outcome == MIGRATION_OUTCOME_COMPLETED

    @property
    def downtime_ms(self) -> float:
        """The guest's whole pause."""
        return milliseconds(self.migration.downtime)

    @property
    def total_ms(self) -> float:
        """From acceptance to the end."""
        return milliseconds(self.migration.total)

    def as_seen(self, guest_gap_ms: float, guest_slowdown_percent: float) -> Crossing:
        """The same with what the guest said."""
        return replace(self, guest_gap_ms=guest_gap_ms, guest_slowdown_percent=guest_slowdown_percent)

    def document(self) -> dict[str, Any]:
        """The crossing's part of the document."""
        return {
            "direction": self.direction,
            "outcome": outcome_name(self.migration),
            "owner": self.migration.owner,
            "downtime_ms": self.downtime_ms,
            "total_ms": self.total_ms,
            "guest_gap_ms": self.guest_gap_ms,
            "guest_slowdown_percent": self.guest_slowdown_percent,
            **clock_document(self.migration.clock),
            "rounds": self.migration.progress.round,
            "wire_bytes": self.migration.progress.wire_bytes,
            "verified": self.verified,
            "path": self.migration.path,
            "trace_id": self.migration.trace_id,
        }


@dataclass
class Report:
    """All that was found out."""

    machine: str
    memory_bytes: int
    crossings: list[Crossing] = field(default_factory=list)
    guest_ok: bool = False
    peak_rss_mib: dict[str, float] = field(default_factory=dict)
    spans: Sequence[SpanRecord] = ()

    @property
    def measured(self) -> list[Crossing]:
        """The crossings without the extra check that completed."""
        return [crossing for crossing in self.crossings if crossing.completed and not crossing.verified]

    @property
    def broken(self) -> Crossing | None:
        """The crossing that did not complete, if there is one; it was the last."""
        return next((crossing for crossing in self.crossings if not crossing.completed), None)

    @property
    def memory_identical(self) -> bool:
        """All memory was compared, and no page differed."""
        return any(
            crossing.verified
            and crossing.completed
            and crossing.migration.verification.compared_bytes == self.memory_bytes
            and crossing.migration.verification.different_pages == 0
            for crossing in self.crossings
        )

    @property
    def exit_code(self) -> ExitCode:
        """How the command ends."""
        if self.broken is not None:
            return exit_code(self.broken.migration)
        return ExitCode.OK if self.guest_ok and self.memory_identical else ExitCode.INTEGRITY

    def document(self) -> dict[str, Any]:
        """The document; there is at least one crossing."""
        first, last = self.crossings[0].migration, self.crossings[-1].migration
        told = (self.broken or self.crossings[-1]).migration
        return {
            "machine": self.machine,
            "outcome": outcome_name(told),
            "reason": told.reason.reason,
            "message": told.reason.message,
            "source": first.source,
            "destination": first.destination.host,
            "owner": first.owner,
            "owner_at_end": last.owner,
            "total_ms": self._typical(lambda crossing: crossing.total_ms),
            "downtime_ms": self._typical(lambda crossing: crossing.downtime_ms),
            "rounds": self._typical(lambda crossing: crossing.migration.progress.round),
            "guest_gap_ms": max((crossing.guest_gap_ms or 0 for crossing in self.measured), default=None),
            "guest_slowdown_percent": max(
                (
                    one.guest_slowdown_percent
                    for one in self.measured
                    if one.guest_slowdown_percent is not None
                ),
                default=None,
            ),
            **clock_document(self._worst_clock(told)),
            "memory_bytes": self.memory_bytes,
            "wire_bytes": self._typical(lambda crossing: crossing.migration.progress.wire_bytes),
            "memory_identical": self.memory_identical,
            "guest_ok": self.guest_ok,
            "tracker": first.tracker,
            "path": first.path,
            "trace_id": first.trace_id,
            "spans": tree_json(span_tree(self.spans)),
            "crossings": [crossing.document() for crossing in self.crossings],
            "peak_rss_mib": self.peak_rss_mib,
        }

    def _worst_clock(self, otherwise: Migration) -> ClockReport:
        """Of the measured crossing after which the guest's clock was off the most."""
        clocks = [crossing.migration.clock for crossing in self.measured]
        return max(clocks, key=lambda clock: abs(clock.offset_after_us), default=otherwise.clock)

    def _typical(self, figure: Callable[[Crossing], float]) -> float | None:
        """A figure that really occurred: of the one measured crossing, or the higher median of several."""
        figures = [figure(crossing) for crossing in self.measured]
        return statistics.median_high(figures) if figures else None
