"""A prediction as a person reads it, before a migration and beside what then happened."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from google.protobuf.duration_pb2 import Duration

from vmferry.cli.output import milliseconds, size
from vmferry.v1.compatibility_pb2 import PredictedTime, Prediction
from vmferry.v1.migration_pb2 import Migration

_Show: TypeAlias = Callable[[Duration], str]


def prediction_lines(prediction: Prediction) -> list[str]:
    """What is predicted, and what it rests on."""
    verdict = f"in {prediction.rounds} rounds" if prediction.converges else "it would not converge"
    dirty = _rate(prediction.dirty_bytes_per_second, prediction.dirty_error_bytes_per_second)
    looked = f"over {milliseconds(prediction.sampled):.0f} ms"
    link = _rate(prediction.link_bytes_per_second, prediction.link_error_bytes_per_second)
    reserve = prediction.reserve_bytes_per_second
    memory = f"; memory is made at {size(reserve)}/s" if reserve else ""
    return [
        f"total      {_span(prediction.total, _seconds)}, {verdict}",
        f"downtime   {_span(prediction.downtime, _millis)}",
        f"guest      writes {dirty} ({looked}), holds {size(prediction.resident_bytes)}",
        f"link       takes {link}{memory}",
    ]


def outcome_lines(migration: Migration) -> list[str]:
    """What was predicted for a migration, and what came of it; nothing if there was no prediction."""
    if not migration.HasField("prediction"):
        return []
    prediction = migration.prediction
    total = f"predicted   total {_span(prediction.total, _seconds)}"
    downtime = f"            downtime {_span(prediction.downtime, _millis)}"
    if migration.HasField("end_time"):
        total += f"; it took {_seconds(migration.total)}"
    if migration.HasField("downtime"):
        downtime += f"; it was {_millis(migration.downtime)}"
    return [total, downtime] if prediction.converges else [f"{total}, not converging", downtime]


def _span(time: PredictedTime, show: _Show) -> str:
    return f"{show(time.expected)} ({show(time.low)} to {show(time.high)})"


def _seconds(duration: Duration) -> str:
    return f"{milliseconds(duration) / 1e3:.2f} s"


def _millis(duration: Duration) -> str:
    return f"{milliseconds(duration):.0f} ms"


def _rate(rate: float, error: float) -> str:
    return f"{size(rate)}/s \N{PLUS-MINUS SIGN} {size(error)}/s"
