"""Metrics in Prometheus's text format, and the names that they have there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.resources import Resource

from vmferry.telemetry.exposition import exposition
from vmferry.telemetry.instruments import INSTRUMENTS, Kind, label_name, prometheus_name

ROOT = Path(__file__).resolve().parents[3]
ROW = re.compile(r"^\| `(vmferry_\w+)` \| (\w+) \| ([^|]*) \| ([^|]*) \| ([^|]*) \|$", re.MULTILINE)


@pytest.mark.parametrize(
    ("name", "unit", "kind", "expected"),
    [
        ("vmferry.migrations", "{migration}", Kind.COUNTER, "vmferry_migrations_total"),
        ("vmferry.wire", "By", Kind.COUNTER, "vmferry_wire_bytes_total"),
        ("vmferry.dirty_rate", "By/s", Kind.GAUGE, "vmferry_dirty_rate_bytes_per_second"),
        ("vmferry.lag", "s", Kind.HISTOGRAM, "vmferry_lag_seconds"),
        ("vmferry.lag_seconds", "s", Kind.HISTOGRAM, "vmferry_lag_seconds"),
        ("vmferry.share", "1", Kind.GAUGE, "vmferry_share_ratio"),
        ("vmferry.total_error", "1", Kind.HISTOGRAM, "vmferry_total_error"),
        ("odd-name.of", "", Kind.GAUGE, "odd_name_of"),
    ],
)
def test_names(name: str, unit: str, kind: Kind, expected: str) -> None:
    """Names follow from OpenTelemetry's by the rules of its specification."""
    assert prometheus_name(name, unit, kind) == expected


def test_everything_comes_out_whole() -> None:
    """Counters, gauges and histograms, with cumulative buckets, sorted labels and whatever may stand in a label."""
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader], Resource({"host.name": "a"}), shutdown_on_exit=False)
    meter = provider.get_meter("test")
    counter = meter.create_counter("c", "By", 'What "it" is.\nAnd \\ more')
    counter.add(3, {"b.c": 'x"y\\z\n', "a": "1"})
    meter.create_gauge("g", "s").set(0.25)
    histogram = meter.create_histogram("h", "s", explicit_bucket_boundaries_advisory=[0.5, 1.0])
    for value in (0.1, 0.7, 0.7, 9.0):
        histogram.record(value)
    text = exposition(reader.get_metrics_data())
    provider.shutdown()
    lines = text.splitlines()
    assert text.endswith("\n")
    assert 'target_info{host_name="a"} 1' in lines
    assert '# HELP c_bytes_total What "it" is.\\nAnd \\\\ more' in lines
    assert "# TYPE c_bytes_total counter" in lines
    assert 'c_bytes_total{a="1",b_c="x\\"y\\\\z\\n"} 3' in lines
    assert "g_seconds 0.25" in lines
    assert [line for line in lines if line.startswith("h_seconds")] == [
        'h_seconds_bucket{le="0.5"} 1',
        'h_seconds_bucket{le="1.0"} 3',
        'h_seconds_bucket{le="+Inf"} 4',
        "h_seconds_sum 10.5",
        "h_seconds_count 4",
    ]


def test_nothing_measured_is_nothing_said() -> None:
    """A process without a provider has an empty scrape."""
    assert exposition(None) == ""


def test_the_handbook_lists_every_metric() -> None:
    """docs/observability.md has a row for each metric, with kind, unit, labels and meaning as in the code."""
    text = (ROOT / "docs/observability.md").read_text(encoding="utf-8")
    documented = {row[0]: row[1:] for row in ROW.findall(text)}
    assert documented == {
        one.prometheus: (
            one.kind.value,
            one.unit,
            ", ".join(f"`{label_name(name)}`" for name in one.attributes),
            one.description,
        )
        for one in INSTRUMENTS
    }


def test_names_are_unique_and_ours() -> None:
    """No two metrics share a name, and all begin as ours do."""
    names = [one.prometheus for one in INSTRUMENTS]
    assert len(set(names)) == len(names)
    assert all(name.startswith("vmferry_") for name in names)
