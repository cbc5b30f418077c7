"""Spans of calls: they carry one trace from host to host.

Promise: a call's span is its caller's child, by W3C ``traceparent`` in the call's metadata; every span ends when
its call ends, also when that is cancelled, fails, or is a stream its caller reads and writes by hand; there is no
span per message, and none for health checks, reflection or the bursts that a link is measured with.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Final, Self, TypeVar
from urllib.parse import unquote

import grpc
import grpc.aio
from opentelemetry import trace
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from vmferry.rpc.handlers import Context, Continuation, Handler, find_handler, wrap_handler
from vmferry.telemetry import semconv
from vmferry.telemetry.tracing import Attribute, record_failure

_Answer = TypeVar("_Answer")

_TRACER: Final = trace.get_tracer("vmferry")
_PROPAGATOR: Final = TraceContextTextMapPropagator()
_TRACED: Final = "/vmferry."
"""Only calls of our own services are traced; a method's name is otherwise whatever a peer chose to send."""
_MEASURE: Final = "/vmferry.v1.DestinationService/Measure"
"""A measurement is many calls, most of them cut short on purpose."""

# As the conventions say, an answer such as INVALID_ARGUMENT is no error of the server. CANCELLED is none either by
# them; it is one here, because a lane that was cut off has to stand out in the timeline.
_SERVER_ERRORS: Final = frozenset(
    {"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS", "CANCELLED"}
)


class ServerTracingInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg] # generic only in its stubs
    """A span around every call of our services that arrives here; the outermost interceptor."""

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Handler:
        """Put the span around the method's handler."""
        handler = await find_handler(continuation, handler_call_details)
        if not _is_traced(handler_call_details.method):
            return handler
        return wrap_handler(handler, handler_call_details.method, _server_span)


@asynccontextmanager
async def _server_span(method: str, context: Context) -> AsyncIterator[None]:
    headers = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
    parent = _PROPAGATOR.extract(headers)
    attributes = _rpc_attributes(method) | _peer_attributes(context.peer())
    with _TRACER.start_as_current_span(
        _span_name(method),
        context=parent,
        kind=SpanKind.SERVER,
        attributes=attributes,
        record_exception=False,
        set_status_on_exception=False,
    ) as span:
        try:
            yield
            # A client that vanished looks like one that ended its stream, until the next time the task is suspended.
            await asyncio.sleep(0)
        except BaseException as error:
            _set_status(span, _failure_code(context, error), context.details(), _SERVER_ERRORS.__contains__)
            raise
        _set_status(span, _code_name(context.code()), context.details(), _SERVER_ERRORS.__contains__)


def start_client_span(method: str) -> tuple[tuple[tuple[str, str], ...], Callable[[Any], None]]:
    """A span for a call over a channel that is not asyncio's: what its metadata say, and what to call at its end."""
    span, headers = _client_span(method)

    def end(call: Any) -> None:
        _end_client_span(span, call.code(), call.details())

    return headers, end


def _client_span(method: str) -> tuple[Span, tuple[tuple[str, str], ...]]:
    """A span of a call that begins, and the metadata by which the other host continues its trace."""
    span = _TRACER.start_span(_span_name(method), kind=SpanKind.CLIENT, attributes=_rpc_attributes(method))
    headers: dict[str, str] = {}
    _PROPAGATOR.inject(headers, context=trace.set_span_in_context(span))
    return span, tuple(headers.items())


def ClientTracingInterceptors() -> list[Any]:  # noqa: N802 - it stands where a class would, one for each arity
    """Interceptors for ``grpc.aio`` channels: a span for every call of our services that leaves here."""
    return [_UnaryUnary(), _UnaryStream(), _StreamUnary(), _StreamStream()]


class _UnaryUnary(grpc.aio.UnaryUnaryClientInterceptor):  # type: ignore[type-arg] # generic only in its stubs
    async def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return await _traced_call(continuation, client_call_details, request)


class _UnaryStream(grpc.aio.UnaryStreamClientInterceptor):  # type: ignore[type-arg] # generic only in its stubs
    async def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return await _traced_call(continuation, client_call_details, request)


class _StreamUnary(grpc.aio.StreamUnaryClientInterceptor):  # type: ignore[type-arg] # generic only in its stubs
    async def intercept_stream_unary(
        self, continuation: Any, client_call_details: Any, request_iterator: Any
    ) -> Any:
        return await _traced_stream(continuation, client_call_details, request_iterator)


class _StreamStream(grpc.aio.StreamStreamClientInterceptor):  # type: ignore[type-arg] # generic only in its stubs
    async def intercept_stream_stream(
        self, continuation: Any, client_call_details: Any, request_iterator: Any
    ) -> Any:
        return await _traced_stream(continuation, client_call_details, request_iterator)


async def _traced_call(continuation: Any, details: Any, request: Any) -> Any:
    method = details.method.decode() if isinstance(details.method, bytes) else details.method
    if not _is_traced(method):
        return await continuation(details, request)
    span, headers = _client_span(method)
    metadata = grpc.aio.Metadata(*(details.metadata or ()), *headers)
    try:
        call = await continuation(details._replace(metadata=metadata), request)
    except BaseException as error:
        record_failure(span, error)
        span.end()
        raise
    # The call itself goes back as it is: whoever reads and writes it by hand needs the real one. It reports its end
    # by itself, also when nobody reads it to the end.
    call.add_done_callback(partial(_end_settled, span))
    return call


async def _traced_stream(continuation: Any, details: Any, requests: Any) -> Any:
    if not isinstance(requests, AsyncIterable):
        return await _traced_call(continuation, details, requests)
    own = _Requests(requests)
    call = await _traced_call(continuation, details, own)
    call.add_done_callback(own.stop)
    return call


class _Requests:
    """The messages of a call, until it ends.

    With any interceptor gRPC turns messages written by hand into an iterator and waits for the next of them for ever
    when the server ends the call first: a task for each such call, and a complaint of asyncio when it goes.
    """

    def __init__(self, requests: AsyncIterable[Any]) -> None:
        self._requests = aiter(requests)
        self._reader: asyncio.Task[Any] | None = None
        self._stopped = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        if self._stopped:
            raise StopAsyncIteration
        self._reader = asyncio.current_task()
        return await anext(self._requests)

    def stop(self, _call: object) -> None:
        """Wake whoever waits for a message that nobody will send."""
        self._stopped = True
        if self._reader is not None:
            self._reader.cancel()


def _end_settled(span: Span, call: Any) -> None:
    _end_client_span(span, _settled(call.code()), _settled(call.details()))


def _end_client_span(span: Span, code: object, details: str | None) -> None:
    _set_status(span, _code_name(code), details, lambda name: name != "OK")
    span.end()


def _settled(answer: Coroutine[Any, Any, _Answer]) -> _Answer | None:
    """What a call that is done says of itself; its methods are coroutines, but have nothing left to wait for."""
    try:
        answer.send(None)
    except StopIteration as stop:
        found: _Answer = stop.value
        return found
    answer.close()
    return None


def _failure_code(context: Context, error: BaseException) -> str:
    if isinstance(error, asyncio.CancelledError):
        remaining = context.time_remaining()
        return "DEADLINE_EXCEEDED" if remaining is not None and remaining <= 0 else "CANCELLED"
    if isinstance(error, grpc.aio.InternalError):  # the answer could not be written: the client is gone
        return "CANCELLED"
    return _code_name(context.code(), default="UNKNOWN")


def _code_name(code: object, *, default: str = "OK") -> str:
    """Name of a status code, which gRPC hands out as its enum, as a number, or not at all."""
    if isinstance(code, grpc.StatusCode):
        return code.name
    names = [known.name for known in grpc.StatusCode if known.value[0] == code]
    return names[0] if names else default


def _set_status(span: Span, code: str, details: str | None, is_error: Callable[[str], bool]) -> None:
    span.set_attribute(semconv.RPC_STATUS_CODE, code)
    if is_error(code):
        span.set_attribute(semconv.ERROR_TYPE, code)
        span.set_status(Status(StatusCode.ERROR, details or code))


def _is_traced(method: str) -> bool:
    return method.startswith(_TRACED) and method != _MEASURE


def _span_name(method: str) -> str:
    return method.removeprefix("/")


def _rpc_attributes(method: str) -> dict[str, Attribute]:
    return {semconv.RPC_SYSTEM_NAME: semconv.GRPC, semconv.RPC_METHOD: _span_name(method)}


def _peer_attributes(peer: str) -> dict[str, Attribute]:
    """Read ``ipv4:192.0.2.1:4711`` or ``ipv6:%5B2001:db8::1%5D:4711``; other peers have no address."""
    family, _, rest = unquote(peer).partition(":")
    address, _, port = rest.rpartition(":")
    if family not in {"ipv4", "ipv6"} or not port.isdigit():
        return {}
    return {semconv.NETWORK_PEER_ADDRESS: address.strip("[]"), semconv.NETWORK_PEER_PORT: int(port)}
