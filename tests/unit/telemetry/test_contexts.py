"""Spans that hang under another one than the code that makes them runs in, however much later."""

from __future__ import annotations

import asyncio
import contextvars

from opentelemetry import trace
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags

from vmferry.telemetry.tracing import context_of, current_trace_id, current_traceparent

FIRST, SECOND = 0x0AF7651916CD43DD8448EB211C80319C, 0x1BF7651916CD43DD8448EB211C80319C
_OWN: contextvars.ContextVar[str] = contextvars.ContextVar("own", default="")


def span(trace_id: int) -> NonRecordingSpan:
    """A span of a trace, as one that came from another process."""
    return NonRecordingSpan(SpanContext(trace_id, 7, is_remote=True, trace_flags=TraceFlags(1)))


async def test_a_task_goes_on_with_the_trace_of_whoever_asked() -> None:
    """Not with that of whoever happened to start it; everything else of the starter's context is there."""
    with trace.use_span(span(FIRST)):
        traceparent = current_traceparent()
    assert f"{FIRST:032x}" in traceparent

    async def work() -> tuple[str, str]:
        return current_trace_id(), _OWN.get()

    _OWN.set("kept")
    with trace.use_span(span(SECOND)):
        seen = await asyncio.create_task(work(), context=context_of(traceparent))
        assert current_trace_id() == f"{SECOND:032x}"
    assert seen == (f"{FIRST:032x}", "kept")


def test_without_a_trace_there_is_none() -> None:
    """Outside of any span there is nothing to remember, and nothing is made up from that."""
    assert current_traceparent() == ""
    with trace.use_span(span(FIRST)):
        assert context_of("").run(current_trace_id) == ""
        assert context_of("garbage").run(current_trace_id) == ""
