"""Metrics as Prometheus reads them: the text format, version 0.0.4.

Promise: what OpenTelemetry's SDK collected comes out whole, under names by the rules of ``instruments``, with every
label and help text escaped; the same metrics give the same text.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Final

from opentelemetry.sdk.metrics.export import (
    Gauge,
    Histogram,
    HistogramDataPoint,
    Metric,
    MetricsData,
    NumberDataPoint,
    Sum,
)

from vmferry.telemetry.instruments import Kind, label_name, prometheus_name

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


def exposition(data: MetricsData | None) -> str:
    """The text of one scrape."""
    lines: list[str] = []
    for resource in data.resource_metrics if data else ():
        lines += ["# HELP target_info What is measured.", "# TYPE target_info gauge"]
        lines.append(f"target_info{_labels(resource.resource.attributes)} 1")
        metrics = [metric for scope in resource.scope_metrics for metric in scope.metrics]
        for metric in sorted(metrics, key=lambda metric: metric.name):
            lines += _metric(metric)
    return "\n".join([*lines, ""])


def _metric(metric: Metric) -> Iterator[str]:
    kind = _kind(metric)
    if kind is None:
        return
    name = prometheus_name(metric.name, metric.unit or "", kind)
    yield f"# HELP {name} {_escaped(metric.description or '', quotes=False)}"
    yield f"# TYPE {name} {kind}"
    for point in metric.data.data_points:
        attributes = point.attributes or {}
        if isinstance(point, HistogramDataPoint):
            yield from _histogram(name, attributes, point)
        elif isinstance(point, NumberDataPoint):
            yield f"{name}{_labels(attributes)} {_number(point.value)}"


def _kind(metric: Metric) -> Kind | None:
    match metric.data:
        case Sum(is_monotonic=True):
            return Kind.COUNTER
        case Sum() | Gauge():
            return Kind.GAUGE
        case Histogram():
            return Kind.HISTOGRAM
    return None


def _histogram(name: str, attributes: Mapping[str, object], point: HistogramDataPoint) -> Iterator[str]:
    below = 0
    for bound, count in zip([*point.explicit_bounds, math.inf], point.bucket_counts, strict=True):
        below += count
        yield f"{name}_bucket{_labels({**attributes, 'le': _number(bound)})} {below}"
    yield f"{name}_sum{_labels(attributes)} {_number(point.sum)}"
    yield f"{name}_count{_labels(attributes)} {point.count}"


def _labels(attributes: Mapping[str, object]) -> str:
    pairs = [f'{label_name(key)}="{_escaped(str(value))}"' for key, value in sorted(attributes.items())]
    return f"{{{','.join(pairs)}}}" if pairs else ""


def _escaped(text: str, *, quotes: bool = True) -> str:
    plain = text.replace("\\", "\\\\").replace("\n", "\\n")
    return plain.replace('"', '\\"') if quotes else plain


def _number(value: float) -> str:
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return "NaN" if math.isnan(value) else repr(value)
