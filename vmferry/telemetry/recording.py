"""Where the spans of a process go: into a file of its own and, if the environment names one, to a collector.

Promise: the file holds one line per batch of ended spans, each line a whole document of the OTLP JSON format
(``TracesData``), as OpenTelemetry's file exporter writes it, so a collector can read it as well as ``vmferry
trace``. A batch is written a fraction of a second after its spans ended: a killed process loses no more than that,
and an unfinished line never spoils the next. OpenTelemetry's standard environment variables are honoured.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from google.protobuf.json_format import MessageToDict
from opentelemetry import metrics, trace
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import (
    InMemoryMetricReader,
    MetricReader,
    PeriodicExportingMetricReader,
)
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

from vmferry import __version__
from vmferry.errors import ConfigError
from vmferry.telemetry import semconv
from vmferry.telemetry.exposition import exposition

_FLUSH_MS: Final = 200
"""Longest time an ended span waits before it is written to the file."""
_ENDPOINTS: Final = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_METRIC_ENDPOINTS: Final = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT")
_SCRAPED: Final = list[InMemoryMetricReader]()
"""What :func:`scrape` reads; OpenTelemetry takes a provider of metrics only once for each process."""
_FILES: Final = list[BatchSpanProcessor]()
"""What :func:`write_spans` writes out."""
_ID_FIELDS: Final = ("traceId", "spanId", "parentSpanId")


def record_spans(service_name: str, trace_dir: Path | None, *, host: str) -> Callable[[], None]:
    """Set up OpenTelemetry's SDK for this process; see :func:`vmferry.telemetry.tracing.configure`."""
    if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return lambda: None
    resource = Resource.create(
        {
            semconv.SERVICE_NAME: service_name,
            semconv.SERVICE_VERSION: __version__,
            semconv.HOST_NAME: host,
            semconv.PROCESS_PID: os.getpid(),
        }
    ).merge(OTELResourceDetector().detect())  # the environment has the last word
    provider = TracerProvider(resource=resource)
    if trace_dir is not None and trace_dir != Path():
        exporter = SpanFileExporter(trace_dir / f"{service_name}-{os.getpid()}.jsonl")
        file = BatchSpanProcessor(exporter, schedule_delay_millis=_FLUSH_MS)
        _FILES[:] = [file]
        provider.add_span_processor(file)
    if any(os.environ.get(name) for name in _ENDPOINTS):
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    end_metrics = _record_metrics(resource)

    def finish() -> None:
        _FILES.clear()
        provider.shutdown()
        end_metrics()

    return finish


def write_spans() -> None:
    """Write the spans that have ended into the file now, for whoever reads it next; collectors get theirs in time."""
    for file in _FILES[:]:
        file.force_flush()


def _record_metrics(resource: Resource) -> Callable[[], None]:
    """Keep metrics for whoever asks, and send them to a collector, if the environment names one."""
    asked = InMemoryMetricReader()
    readers: list[MetricReader] = [asked]
    if any(os.environ.get(name) for name in _METRIC_ENDPOINTS):
        readers.append(PeriodicExportingMetricReader(OTLPMetricExporter()))
    provider = MeterProvider(readers, resource)
    metrics.set_meter_provider(provider)
    _SCRAPED[:] = [asked]

    def finish() -> None:
        _SCRAPED.clear()
        provider.shutdown()

    return finish


def scrape() -> str:
    """All metrics of this process as Prometheus reads them; nothing if the SDK is disabled."""
    return exposition(_SCRAPED[0].get_metrics_data()) if _SCRAPED else ""


class SpanFileExporter(SpanExporter):
    """Appends batches of spans to a file that only its owner may read.

    Raises:
        ConfigError: the file or its folder cannot be made.
    """

    def __init__(self, path: Path) -> None:
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._file = os.open(
                path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
            )
        except OSError as error:
            message = f"cannot write spans to {path}: {error.strerror}"
            raise ConfigError(message, field="trace_dir") from error
        self._torn = _ends_torn(self._file)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Write one line; a line that could not be finished is closed before the next one."""
        document = _with_hexadecimal_ids(MessageToDict(encode_spans(spans), use_integers_for_enums=True))
        line = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode() + b"\n"
        left = memoryview(b"\n" + line if self._torn else line)
        self._torn = True
        while left:
            left = left[os.write(self._file, left) :]
        self._torn = False
        return SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        """Close the file."""
        os.close(self._file)


def _ends_torn(descriptor: int) -> bool:
    """Whether the file ends in the middle of a line; in a container, process numbers and so files are used again."""
    size = os.fstat(descriptor).st_size
    return size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"


def _with_hexadecimal_ids(document: dict[str, Any]) -> dict[str, Any]:
    """OTLP's JSON has ids in hexadecimal, where protobuf's own mapping has base64."""
    for item in _items_with_ids(document):
        for field in _ID_FIELDS:
            if field in item:
                item[field] = base64.b64decode(item[field]).hex()
    return document


def _items_with_ids(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for resource in document.get("resourceSpans", ()):
        for scope in resource.get("scopeSpans", ()):
            for span in scope.get("spans", ()):
                yield span
                yield from span.get("links", ())
