"""Metrics: figures over many migrations, which no single trace shows.

Promise: only OpenTelemetry's API is needed here; without :func:`vmferry.telemetry.tracing.configure`, which sets up
the SDK, recording costs nothing and goes nowhere. What each figure means stands in ``instruments``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, TypeAlias

from opentelemetry import metrics
from opentelemetry.metrics import CallbackOptions, Counter, Histogram, Observation

from vmferry.telemetry import instruments, semconv
from vmferry.telemetry.instruments import Instrument

Measure: TypeAlias = Callable[[], Mapping[str, float] | None]
"""Values by the metric's one attribute, or by "" if it has none; ``None`` where they cannot be told now. Called by
the thread that exports."""

_METER: Final = metrics.get_meter("vmferry")
_MEASURES: Final[dict[str, list[Measure]]] = {}


def _counter(instrument: Instrument) -> Counter:
    return _METER.create_counter(instrument.name, instrument.unit, instrument.description)


def _histogram(instrument: Instrument) -> Histogram:
    return _METER.create_histogram(
        instrument.name,
        instrument.unit,
        instrument.description,
        explicit_bucket_boundaries_advisory=instrument.boundaries,
    )


def _gauge(instrument: Instrument) -> None:
    measures = _MEASURES.setdefault(instrument.name, [])
    attribute = next(iter(instrument.attributes), "")

    def observe_all(_options: CallbackOptions) -> Iterable[Observation]:
        for measure in tuple(measures):
            for key, value in (measure() or {}).items():
                yield Observation(value, {attribute: key} if attribute else {})

    _METER.create_observable_gauge(instrument.name, [observe_all], instrument.unit, instrument.description)


_MIGRATIONS: Final = _counter(instruments.MIGRATIONS)
_DURATION: Final = _histogram(instruments.DURATION)
_PHASE_DURATION: Final = _histogram(instruments.PHASE_DURATION)
_DOWNTIME: Final = _histogram(instruments.DOWNTIME)
_ROUNDS: Final = _histogram(instruments.ROUNDS)
_TRAFFIC: Final = tuple(
    map(
        _counter,
        (instruments.MEMORY_SENT, instruments.WIRE_SENT, instruments.REPEATED, instruments.RECONNECTS),
    )
)
_RETRIES: Final = _counter(instruments.RETRIES)
_ARRIVALS: Final = _counter(instruments.ARRIVALS)
_DRAIN_MOVES: Final = _counter(instruments.DRAIN_MOVES)
_DRAIN_DURATION: Final = _histogram(instruments.DRAIN_DURATION)
_TOTAL_ERROR: Final = _histogram(instruments.TOTAL_ERROR)
_DOWNTIME_ERROR: Final = _histogram(instruments.DOWNTIME_ERROR)
_CLOCK_BEFORE: Final = _histogram(instruments.CLOCK_BEFORE)
_CLOCK_AFTER: Final = _histogram(instruments.CLOCK_AFTER)
_LOOP_LAG: Final = _histogram(instruments.LOOP_LAG)
_received: list[int] = []
"""Memory that was taken in, if this service takes any: added up here, as a counter would cost more than a frame."""


def _observe_received(_options: CallbackOptions) -> Iterable[Observation]:
    return [Observation(count) for count in _received]


_METER.create_observable_counter(
    instruments.RECEIVED.name,
    [_observe_received],
    instruments.RECEIVED.unit,
    instruments.RECEIVED.description,
)
for _one in instruments.INSTRUMENTS:
    if _one.kind is instruments.Kind.GAUGE:
        _gauge(_one)


def observe(instrument: Instrument, measure: Measure) -> Callable[[], None]:
    """Have a gauge measured whenever metrics are exported; returns what ends that, callable twice."""
    measures = _MEASURES[instrument.name]
    measures.append(measure)

    def end() -> None:
        if measure in measures:
            measures.remove(measure)

    return end


def observe_blocked(measure: Measure) -> Callable[[], None]:
    """Have blocked machines counted by reason whenever metrics are exported; returns what ends that."""
    return observe(instruments.BLOCKED, measure)


def record_migration(*, outcome: str, reason: str, seconds: float) -> None:
    """Note how a migration away from here came out, and how long it took; ``reason`` is empty if it completed."""
    _MIGRATIONS.add(1, {semconv.OUTCOME: outcome, semconv.REASON: reason})
    _DURATION.record(seconds, {semconv.OUTCOME: outcome})


def start_migrations(outcome: str, reasons: Iterable[str]) -> None:
    """Have the counts of migrations with these ends begin at zero."""
    for reason in reasons:
        _MIGRATIONS.add(0, {semconv.OUTCOME: outcome, semconv.REASON: reason})


def record_completion(*, path: str, downtime_s: float, rounds: int) -> None:
    """Note what a completed migration cost its guest; a pause that was not measured is 0."""
    if downtime_s:
        _DOWNTIME.record(downtime_s, {semconv.PATH: path})
    if rounds:
        _ROUNDS.record(rounds)


def record_phase(phase: str, seconds: float) -> None:
    """Note how long a migration was in a phase."""
    _PHASE_DURATION.record(seconds, {semconv.PHASE: phase})


def add_traffic(added: Sequence[int]) -> None:
    """Note what was sent since the last time: page contents, bytes on the wire, bytes repeated, lanes reopened."""
    for counter, amount in zip(_TRAFFIC, added, strict=True):
        counter.add(amount)


def count_retry(call: str, *, times: int = 1) -> None:
    """Note that a control call had to be repeated; with 0 times the count begins to exist."""
    _RETRIES.add(times, {semconv.CALL: call})


def count_arrival(outcome: str, reason: str = "", *, times: int = 1) -> None:
    """Note how an attempt to bring a machine here came out, and why; with 0 times the count begins to exist."""
    _ARRIVALS.add(times, {semconv.OUTCOME: outcome, semconv.REASON: reason})


def count_drain_move(outcome: str, reason: str = "", *, times: int = 1) -> None:
    """Note how a migration during a drain came out, and why; with 0 times the count begins to exist."""
    _DRAIN_MOVES.add(times, {semconv.OUTCOME: outcome, semconv.REASON: reason})


def record_drain(outcome: str, seconds: float) -> None:
    """Note how a drain came out, and how long it took."""
    _DRAIN_DURATION.record(seconds, {semconv.OUTCOME: outcome})


def add_received(count: int) -> None:
    """Note memory that was taken in."""
    _received[:] = [sum(_received) + count]


def record_loop_lag(seconds: float) -> None:
    """Note how late the event loop came to a timer."""
    _LOOP_LAG.record(seconds)


def record_clock(*, method: str, before_s: float, after_s: float) -> None:
    """Note how far a guest's clock was off after a pause, before and after it was put right, and by what."""
    attributes = {semconv.METHOD: method}
    _CLOCK_BEFORE.record(abs(before_s), attributes)
    _CLOCK_AFTER.record(abs(after_s), attributes)


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
