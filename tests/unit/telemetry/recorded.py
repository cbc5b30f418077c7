"""Spans that the code under test ends, kept in memory."""

from __future__ import annotations

import functools

from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter


@functools.cache
def span_memory() -> InMemorySpanExporter:
    """The one memory of this process: OpenTelemetry takes a provider only once."""
    exporter = InMemorySpanExporter()
    provider = trace.get_tracer_provider()
    if not isinstance(provider, TracerProvider):
        provider = TracerProvider(shutdown_on_exit=False)
        trace.set_tracer_provider(provider)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return exporter


def named(name: str) -> ReadableSpan:
    """The one ended span of this name."""
    (span,) = [span for span in span_memory().get_finished_spans() if span.name == name]
    return span
