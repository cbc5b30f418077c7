"""Spans begin, end and hang together as the calls and phases they stand for."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from tests.unit.rpc.probe_service import (
    ABORT,
    DRAIN,
    METHODS,
    OK,
    REFUSE,
    SERVICE,
    WAIT,
    Probe,
    happened,
    responses_of,
    serving,
    start_call,
)
from tests.unit.telemetry.recorded import named, span_memory
from vmferry.errors import MachineDeadError
from vmferry.rpc.interceptors import ErrorInterceptor
from vmferry.rpc.tracing import ClientTracingInterceptors, ServerTracingInterceptor
from vmferry.telemetry.tracing import (
    current_trace_id,
    phase,
    span_attributes,
    span_event,
)


@pytest.fixture
async def probe() -> Probe:
    return Probe()


@pytest.fixture
async def spans() -> AsyncIterator[InMemorySpanExporter]:
    memory = span_memory()
    memory.clear()
    yield memory
    memory.clear()


@pytest.fixture
async def channel(probe: Probe, spans: InMemorySpanExporter) -> AsyncIterator[grpc.aio.Channel]:
    interceptors = [ServerTracingInterceptor(), ErrorInterceptor()]
    async with (
        serving(probe, interceptors) as address,
        grpc.aio.insecure_channel(address, interceptors=ClientTracingInterceptors()) as opened,
    ):
        yield opened


async def _pair(spans: InMemorySpanExporter) -> tuple[ReadableSpan, ReadableSpan]:
    """The client's and the server's span of the one call made, as soon as both have ended."""
    async with asyncio.timeout(60):
        while len(found := spans.get_finished_spans()) < 2:  # noqa: ASYNC110 - spans announce their end to nobody
            await asyncio.sleep(0.005)
    assert len(found) == 2
    client, server = sorted(found, key=lambda span: span.kind is SpanKind.SERVER)
    return client, server


@pytest.mark.parametrize("method", METHODS)
async def test_call_is_one_span_on_each_side(
    channel: grpc.aio.Channel, spans: InMemorySpanExporter, method: str
) -> None:
    """Whatever a call's shape, there is one client span and one server span under it, and no span per message."""
    await responses_of(start_call(channel, method, OK))
    client, server = await _pair(spans)
    assert client.name == server.name == f"{SERVICE}/{method}"
    assert (client.kind, server.kind) == (SpanKind.CLIENT, SpanKind.SERVER)
    assert server.parent is not None
    assert server.parent.span_id == client.context.span_id
    assert server.context.trace_id == client.context.trace_id
    assert server.attributes["network.peer.address"] == "127.0.0.1"
    for span in (client, server):
        assert span.attributes["rpc.system.name"] == "grpc"
        assert span.attributes["rpc.method"] == f"{SERVICE}/{method}"
        assert span.attributes["rpc.response.status_code"] == "OK"
        assert span.status.status_code is StatusCode.UNSET


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("request_", "code"), [(REFUSE, "ABORTED"), (ABORT, "OUT_OF_RANGE")])
async def test_refused_call(
    channel: grpc.aio.Channel, spans: InMemorySpanExporter, method: str, request_: bytes, code: str
) -> None:
    """A refusal is an error to the client and a normal answer of the server; both name the code."""
    with pytest.raises(grpc.aio.AioRpcError):
        await responses_of(start_call(channel, method, request_))
    client, server = await _pair(spans)
    assert (
        client.attributes["rpc.response.status_code"] == server.attributes["rpc.response.status_code"] == code
    )
    assert client.attributes["error.type"] == code
    assert client.status.status_code is StatusCode.ERROR
    assert server.status.status_code is StatusCode.UNSET
    assert server.attributes.get("vmferry.reason") == ("MACHINE_BUSY" if request_ == REFUSE else None)


@pytest.mark.parametrize("method", METHODS)
async def test_cancelled_call(
    channel: grpc.aio.Channel, probe: Probe, spans: InMemorySpanExporter, method: str
) -> None:
    """A cancelled call ends both spans as errors."""
    call = start_call(channel, method, WAIT)
    await happened(probe.entered)
    call.cancel()
    for span in await _pair(spans):
        assert span.status.status_code is StatusCode.ERROR
        assert span.attributes["rpc.response.status_code"] == "CANCELLED"


async def test_stream_cancelled_while_the_server_waits_for_a_message(
    channel: grpc.aio.Channel, probe: Probe, spans: InMemorySpanExporter
) -> None:
    """A vanished client looks like the end of its stream to the handler; the server's span still tells the truth."""
    call = channel.stream_stream(f"/{SERVICE}/stream_stream_write")(timeout=20)
    await call.write(DRAIN)
    await happened(probe.entered)
    call.cancel()
    _, server = await _pair(spans)
    assert server.attributes["rpc.response.status_code"] == "CANCELLED"
    assert server.status.status_code is StatusCode.ERROR


async def test_deadline(channel: grpc.aio.Channel, spans: InMemorySpanExporter) -> None:
    """A call that ran out of time says so on both sides."""
    with pytest.raises(grpc.aio.AioRpcError):
        await channel.unary_unary(f"/{SERVICE}/unary_unary")(WAIT, timeout=0.2)
    client, server = await _pair(spans)
    assert client.attributes["rpc.response.status_code"] == "DEADLINE_EXCEEDED"
    assert server.attributes["rpc.response.status_code"] == "DEADLINE_EXCEEDED"


async def test_stream_read_and_written_by_hand(
    channel: grpc.aio.Channel, spans: InMemorySpanExporter
) -> None:
    """A client that uses write() and read() gets its messages, and its span ends with the call."""
    call = channel.stream_stream(f"/{SERVICE}/stream_stream_write")(timeout=20)
    assert await call.read() == b"first"
    for _ in range(3):
        await call.write(OK)
        assert await call.read() == b"did ok"
    assert not spans.get_finished_spans()
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF
    client, _ = await _pair(spans)
    assert client.attributes["rpc.response.status_code"] == "OK"


async def test_refused_stream_read_by_hand(channel: grpc.aio.Channel, spans: InMemorySpanExporter) -> None:
    """The span of a stream that fails under write() and read() ends as an error, once."""
    call = channel.stream_stream(f"/{SERVICE}/stream_stream_write")(timeout=20)
    await call.write(REFUSE)
    assert await call.read() == b"first"
    with pytest.raises(grpc.aio.AioRpcError):
        await call.read()
    client, _ = await _pair(spans)
    assert client.attributes["rpc.response.status_code"] == "ABORTED"


async def test_stream_that_the_server_ends_leaves_no_task(
    channel: grpc.aio.Channel, spans: InMemorySpanExporter
) -> None:
    """When the server ends a stream whose client still writes by hand, nothing waits for more messages for ever."""
    before = asyncio.all_tasks()
    call = channel.stream_stream(f"/{SERVICE}/stream_stream_write")(timeout=20)
    await call.write(REFUSE)
    await call.read()
    with pytest.raises(grpc.aio.AioRpcError):
        await call.read()
    await _pair(spans)
    async with asyncio.timeout(60):
        while waiting := [
            task for task in asyncio.all_tasks() - before if "request" in repr(task.get_coro())
        ]:
            await asyncio.wait(waiting)


async def test_unreachable_server(spans: InMemorySpanExporter) -> None:
    """A call to nobody ends its span as an error."""
    async with grpc.aio.insecure_channel("127.0.0.1:1", interceptors=ClientTracingInterceptors()) as channel:
        with pytest.raises(grpc.aio.AioRpcError):
            await channel.unary_unary(f"/{SERVICE}/unary_unary")(OK, timeout=10)
    assert named(f"{SERVICE}/unary_unary").attributes["rpc.response.status_code"] == "UNAVAILABLE"


async def test_one_trace_across_nested_services(probe: Probe, spans: InMemorySpanExporter) -> None:
    """A server that calls the next one continues the trace; a phase in a handler hangs under its call."""
    async with serving(probe, [ServerTracingInterceptor()]) as inner_address:

        async def relay(request: bytes, _context: Any) -> bytes:
            async with (
                phase("relay"),
                grpc.aio.insecure_channel(inner_address, interceptors=ClientTracingInterceptors()) as inner,
            ):
                return b"".join(await responses_of(start_call(inner, "stream_stream_yield", request)))

        server = grpc.aio.server(interceptors=[ServerTracingInterceptor()])
        handlers = {"Relay": grpc.unary_unary_rpc_method_handler(relay)}
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("vmferry.test.Relay", handlers),)
        )
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}", interceptors=ClientTracingInterceptors())
        async with channel, phase("migrate"):
            trace_id = current_trace_id()
            await channel.unary_unary("/vmferry.test.Relay/Relay")(OK, timeout=10)
        await server.stop(None)
    found = sorted(spans.get_finished_spans(), key=lambda span: span.start_time)
    chain = ["migrate", *["vmferry.test.Relay/Relay"] * 2, "relay", *[f"{SERVICE}/stream_stream_yield"] * 2]
    assert [span.name for span in found] == chain
    for parent, child in itertools.pairwise(found):
        assert child.parent is not None
        assert child.parent.span_id == parent.context.span_id
    assert {format(span.context.trace_id, "032x") for span in found} == {trace_id}


async def test_server_span_ignores_the_span_its_server_was_started_in(
    probe: Probe, spans: InMemorySpanExporter
) -> None:
    """Only the caller's traceparent makes a parent: a server started inside of a phase does not hang calls there."""
    async with (
        phase("start"),
        serving(probe, [ServerTracingInterceptor()]) as address,
        grpc.aio.insecure_channel(address) as channel,
    ):
        await responses_of(start_call(channel, "unary_unary", OK))
    assert named(f"{SERVICE}/unary_unary").parent is None


async def test_health_is_not_traced(spans: InMemorySpanExporter) -> None:
    """Health checks leave no spans, on either side."""
    server = grpc.aio.server(interceptors=[ServerTracingInterceptor()])
    health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    interceptors = ClientTracingInterceptors()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", interceptors=interceptors) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        await stub.Check(health_pb2.HealthCheckRequest(), timeout=10)
        watch = stub.Watch(health_pb2.HealthCheckRequest(), timeout=10)
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        watch.cancel()
    await server.stop(None)
    assert not spans.get_finished_spans()


async def test_phase_is_a_span_with_our_attributes(spans: InMemorySpanExporter) -> None:
    """A phase's attributes are named vmferry.*; short bytes are hexadecimal and long ones are not written out."""
    async with phase("reserve", memory_bytes=7, migration_id=b"\x01\xff", page=bytes(4096)):
        span_attributes(tracker="hash")
        span_event("reconnected", lane=2)
    span = named("reserve")
    assert dict(span.attributes) == {
        "vmferry.memory_bytes": 7,
        "vmferry.migration_id": "01ff",
        "vmferry.page": "[4096 bytes]",
        "vmferry.tracker": "hash",
    }
    (event,) = span.events
    assert (event.name, dict(event.attributes)) == ("reconnected", {"vmferry.lane": 2})
    assert span.status.status_code is StatusCode.UNSET


@pytest.mark.parametrize("error", [MachineDeadError("it is gone"), asyncio.CancelledError()])
async def test_failed_phase(spans: InMemorySpanExporter, error: BaseException) -> None:
    """An exception that leaves a phase is its status and an event on it, cancellation included; it goes on."""
    with pytest.raises(type(error)):
        async with phase("load"):
            raise error
    span = named("load")
    assert span.status.status_code is StatusCode.ERROR
    assert [event.name for event in span.events] == ["exception"]
    assert span.attributes.get("vmferry.reason") == getattr(error, "reason", None)


def test_no_trace_outside_of_spans() -> None:
    """Outside of any span there is no trace id, and notes go nowhere without harm."""
    assert current_trace_id() == ""
    span_event("nothing")
    span_attributes(x=1)
