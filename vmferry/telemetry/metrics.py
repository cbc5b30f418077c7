"""Metrics: figures over many migrations, which no single trace shows.

Promise: only OpenTelemetry's API is needed here; without :func:`vmferry.telemetry.tracing.configure`, which sets up
the SDK, recording costs nothing and goes nowhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Final, TypeAlias

from opentelemetry import metrics
from opentelemetry.metrics import CallbackOptions, Observation

from vmferry.telemetry import semconv

_BOUNDARIES: Final = [0.25, 0.5, 0.67, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 4.0]
"""Of a ratio: as far below one as above it."""
_METER: Final = metrics.get_meter("vmferry")
_TOTAL_ERROR: Final = _METER.create_histogram(
    semconv.PREDICTION_TOTAL_ERROR,
    unit="1",
    description="Length of a completed migration, divided by what was predicted.",
    explicit_bucket_boundaries_advisory=_BOUNDARIES,
)
_DOWNTIME_ERROR: Final = _METER.create_histogram(
    semconv.PREDICTION_DOWNTIME_ERROR,
    unit="1",
    description="Pause of the guest in a completed migration, divided by what was predicted.",
    explicit_bucket_boundaries_advisory=_BOUNDARIES,
)

Measure: TypeAlias = Callable[[], Mapping[str, int] | None]
"""Counts by reason; ``None`` where that cannot be said now. Called by the thread that exports."""
_BLOCKED: Final[list[Measure]] = []


def _observe_blocked(_options: CallbackOptions) -> Iterable[Observation]:
    for measure in tuple(_BLOCKED):
        for reason, count in (measure() or {}).items():
            yield Observation(count, {semconv.BLOCKED_REASON: reason})


_METER.create_observable_gauge(
    semconv.MACHINES_BLOCKED,
    callbacks=[_observe_blocked],
    unit="{machine}",
    description="Machines that nobody may run, or that nobody runs, until something is done about it.",
)


def observe_blocked(measure: Measure) -> Callable[[], None]:
    """Have blocked machines counted whenever metrics are exported; returns what ends that, callable twice."""
    _BLOCKED.append(measure)

    def end() -> None:
        if measure in _BLOCKED:
            _BLOCKED.remove(measure)

    return end


def record_prediction_error(*, kind: str, total: float, downtime: float) -> None:
    """Note how a migration compares with its prediction.

    Args:
        kind: kind of the machine.
        total: its length, divided by what was predicted.
        downtime: the guest's pause, divided by what was predicted.
    """
    attributes = {semconv.MACHINE_KIND: kind}
    _TOTAL_ERROR.record(total, attributes)
    _DOWNTIME_ERROR.record(downtime, attributes)
