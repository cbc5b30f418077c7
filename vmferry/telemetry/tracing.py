"""Spans: one trace per migration, with a span for every phase.

Promise: every span ends when its phase ends, also when that is cancelled or fails. Only OpenTelemetry's API is needed
here: without :func:`configure` spans cost nothing and go nowhere, and a trace that passes through stays one trace.
Spans of calls, which carry the trace from host to host, are made in ``vmferry.rpc.tracing``.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Final, Self, TypeAlias

from opentelemetry import context, trace
from opentelemetry.trace import Span, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from vmferry.errors import VmferryError
from vmferry.telemetry import semconv

Attribute: TypeAlias = str | bool | int | float

_TRACER: Final = trace.get_tracer("vmferry")
_PROPAGATOR: Final = TraceContextTextMapPropagator()
_LONGEST_SHOWN_BYTES: Final = 32


def configure(service_name: str, trace_dir: Path | None, *, host: str) -> Callable[[], None]:
    """Record the spans of this process from now on; called once, by ``__main__``.

    Args:
        service_name: name of the service, unless ``OTEL_SERVICE_NAME`` says otherwise.
        trace_dir: folder for the file of spans; ``None`` or the empty path means no file.
        host: name of the host on every span.

    Returns:
        What to call last: it writes out the spans that have ended.

    Raises:
        ConfigError: the folder cannot be used.
    """
    from vmferry.telemetry.recording import record_spans  # noqa: PLC0415 - only a process that records needs the SDK

    return record_spans(service_name, trace_dir, host=host)


def current_trace_id() -> str:
    """The trace this code runs in, as 32 hexadecimal digits; empty outside of any."""
    context = trace.get_current_span().get_span_context()
    return trace.format_trace_id(context.trace_id) if context.is_valid else ""


def current_traceparent() -> str:
    """The span this code runs in, as text that :func:`context_of` understands; empty outside of any."""
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier)
    return carrier.get("traceparent", "")


def context_of(traceparent: str) -> contextvars.Context:
    """This context, for a task whose spans are children of the span named, whoever starts the task and when."""
    made = contextvars.copy_context()
    made.run(context.attach, _PROPAGATOR.extract({"traceparent": traceparent}, context=context.Context()))
    return made


def past_phase(name: str, /, start_ns: int, *, parent: str, **attributes: object) -> None:
    """A piece of work that began at ``start_ns`` and is over now, as a child of the span that ``parent`` names."""
    _TRACER.start_span(
        name,
        context=_PROPAGATOR.extract({"traceparent": parent}, context=context.Context()),
        start_time=start_ns,
        attributes=_own(attributes),
    ).end()


def span_event(name: str, /, **attributes: object) -> None:
    """Note something that happened, such as a reconnect, on the span this code runs in."""
    trace.get_current_span().add_event(name, _own(attributes))


def span_attributes(**attributes: object) -> None:
    """Set attributes ``vmferry.*`` on the span this code runs in."""
    trace.get_current_span().set_attributes(_own(attributes))


def phase(name: str, /, **attributes: object) -> Phase:
    """A piece of work as a span, for ``async with`` or ``with``.

    Args:
        name: name of the span.
        attributes: attributes of the span, named ``vmferry.*`` there.
    """
    return Phase(name, attributes)


class Phase:
    """One use of :func:`phase`."""

    def __init__(self, name: str, attributes: dict[str, object]) -> None:
        self._name = name
        self._attributes = attributes
        self._current: AbstractContextManager[Span] | None = None

    def __enter__(self) -> Self:
        self._current = _TRACER.start_as_current_span(
            self._name,
            attributes=_own(self._attributes),
            record_exception=False,
            set_status_on_exception=False,
        )
        self._current.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._current is not None, "left without being entered"
        if error is not None:
            record_failure(trace.get_current_span(), error)
        self._current.__exit__(kind, error, traceback)

    async def __aenter__(self) -> Self:
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.__exit__(kind, error, traceback)


def record_failure(span: Span, error: BaseException) -> None:
    """Say on a span that it ended with ``error``."""
    span.record_exception(error)
    span.set_attribute(semconv.ERROR_TYPE, type(error).__qualname__)
    if isinstance(error, VmferryError):
        span.set_attributes(_own({"reason": error.reason}))
    span.set_status(Status(StatusCode.ERROR, str(error) or type(error).__name__))


def _own(attributes: dict[str, object]) -> dict[str, Attribute]:
    return {semconv.PREFIX + key: _plain(value) for key, value in attributes.items()}


def _plain(value: object) -> Attribute:
    if isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, bytes):
        return value.hex() if len(value) <= _LONGEST_SHOWN_BYTES else f"[{len(value)} bytes]"
    return str(value)
