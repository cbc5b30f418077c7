"""What is recorded about predictions reaches whoever reads the meters of this process."""

from __future__ import annotations

import importlib
from unittest.mock import patch

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import HistogramDataPoint, InMemoryMetricReader, MetricsData

from vmferry.telemetry import metrics


def test_prediction_errors_are_two_histograms_by_kind() -> None:
    """Each migration adds its two ratios to the histograms of its kind, in buckets on both sides of one."""
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader], shutdown_on_exit=False)
    try:
        # OpenTelemetry takes a provider only once for each process, and the module asks for its meter once.
        with patch("opentelemetry.metrics.get_meter", provider.get_meter):
            importlib.reload(metrics)
        metrics.record_prediction_error(kind="qemu", total=1.3, downtime=0.7)
        metrics.record_prediction_error(kind="qemu", total=0.9, downtime=2.5)
        metrics.record_prediction_error(kind="microvm", total=1.0, downtime=1.0)
        data = reader.get_metrics_data()
    finally:
        importlib.reload(metrics)
        provider.shutdown()
    assert data is not None
    found = {
        (metric.name, dict(point.attributes or {})["vmferry.kind"]): point
        for resource in data.resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
        for point in metric.data.data_points
    }
    assert set(found) == {
        (f"vmferry.prediction.{name}_error", kind)
        for name in ("total", "downtime")
        for kind in ("qemu", "microvm")
    }
    point = found["vmferry.prediction.downtime_error", "qemu"]
    assert isinstance(point, HistogramDataPoint)
    assert point.count == 2
    assert point.sum == pytest.approx(3.2)
    assert min(point.explicit_bounds) < 1 < max(point.explicit_bounds)


def test_blocked_machines_are_measured_when_somebody_exports() -> None:
    """Each reader's turn asks everybody who counts; who cannot say now says nothing, who has ended is not asked."""
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader], shutdown_on_exit=False)
    try:
        with patch("opentelemetry.metrics.get_meter", provider.get_meter):
            importlib.reload(metrics)
        end = metrics.observe_blocked(lambda: {"OUTCOME_UNKNOWN": 2, "NOT_RESUMED": 0})
        metrics.observe_blocked(lambda: None)
        first = reader.get_metrics_data()
        end()
        end()
        second = reader.get_metrics_data()
    finally:
        importlib.reload(metrics)
        provider.shutdown()
    assert blocked(first) == {"OUTCOME_UNKNOWN": 2, "NOT_RESUMED": 0}
    assert blocked(second) == {}


def blocked(data: MetricsData | None) -> dict[object, object]:
    """The counts by reason."""
    return {
        dict(point.attributes or {})["vmferry.reason"]: getattr(point, "value", None)
        for resource in (data.resource_metrics if data else ())
        for scope in resource.scope_metrics
        for metric in scope.metrics
        if metric.name == "vmferry.machines.blocked"
        for point in metric.data.data_points
    }
