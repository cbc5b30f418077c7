"""Code around a call runs around it, whatever the call looks like."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from tests.unit.rpc.probe_service import (
    ABORT,
    CRASH,
    FLOOD,
    METHODS,
    OK,
    SERVICE,
    WAIT,
    Probe,
    happened,
    responses_of,
    serving,
    start_call,
)
from vmferry.rpc.handlers import Context, Continuation, Handler, find_handler, wrap_handler


class Recorder(grpc.aio.ServerInterceptor):
    """Writes down how each call was entered and left, and in which task."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []
        self.tasks: list[asyncio.Task[Any] | None] = []
        self.left = asyncio.Event()

    async def intercept_service(
        self, continuation: Continuation, details: grpc.HandlerCallDetails
    ) -> Handler:
        """Wrap every handler."""
        handler = await find_handler(continuation, details)
        return wrap_handler(handler, details.method, self._around)

    @asynccontextmanager
    async def _around(self, method: str, _context: Context) -> AsyncIterator[None]:
        self.tasks.append(asyncio.current_task())
        outcome = "returned"
        try:
            yield
        except BaseException as error:
            outcome = type(error).__name__
            raise
        finally:
            self.tasks.append(asyncio.current_task())
            self.calls.append((method, outcome))
            self.left.set()


@pytest.fixture
async def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
async def probe() -> Probe:
    return Probe()


@pytest.fixture
async def channel(probe: Probe, recorder: Recorder) -> AsyncIterator[grpc.aio.Channel]:
    outer = Recorder()
    async with serving(probe, [outer, recorder]) as address, grpc.aio.insecure_channel(address) as opened:
        yield opened
    assert outer.calls == recorder.calls, "nested interceptors must see the same"


@pytest.mark.parametrize("method", METHODS)
async def test_responses_pass_unchanged(channel: grpc.aio.Channel, recorder: Recorder, method: str) -> None:
    """A wrapped handler answers what the bare one answers, and its call is left as returned."""
    stream = method.startswith(("unary_stream", "stream_stream"))
    assert await responses_of(start_call(channel, method, OK)) == ([b"first"] if stream else []) + [b"did ok"]
    await happened(recorder.left)
    assert recorder.calls == [(f"/{SERVICE}/{method}", "returned")]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("request_", "outcome"), [(CRASH, "RuntimeError"), (ABORT, "AbortError")])
async def test_errors_reach_the_outside(
    channel: grpc.aio.Channel, recorder: Recorder, method: str, request_: bytes, outcome: str
) -> None:
    """What a handler raises, and an abort, pass through what is around it as themselves."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await responses_of(start_call(channel, method, request_))
    await happened(recorder.left)
    assert recorder.calls == [(f"/{SERVICE}/{method}", outcome)]
    assert caught.value.code() is (
        grpc.StatusCode.OUT_OF_RANGE if request_ == ABORT else grpc.StatusCode.UNKNOWN
    )


@pytest.mark.parametrize("method", METHODS)
async def test_cancellation_reaches_the_outside_in_the_same_task(
    channel: grpc.aio.Channel, probe: Probe, recorder: Recorder, method: str
) -> None:
    """A client that cancels cancels the handler, and what is around it is left in the task that entered it."""
    call = start_call(channel, method, WAIT)
    await happened(probe.entered)
    call.cancel()
    await happened(recorder.left)
    assert recorder.calls == [(f"/{SERVICE}/{method}", "CancelledError")]
    assert probe.cancelled
    assert len(set(recorder.tasks)) == 1


async def test_generator_is_closed_when_cancelled_while_writing(
    channel: grpc.aio.Channel, probe: Probe, recorder: Recorder
) -> None:
    """A generator suspended at its yield, with a client that reads nothing, is closed at once on cancellation."""
    call = start_call(channel, "unary_stream_yield", FLOOD)
    await happened(probe.entered)
    call.cancel()
    await happened(recorder.left)
    assert probe.left.is_set(), "the generator must have ended before what is around it is left"
    assert len(set(recorder.tasks)) == 1


async def test_unknown_method_can_be_wrapped(channel: grpc.aio.Channel, recorder: Recorder) -> None:
    """A method nobody serves passes the interceptors too, and then answers UNIMPLEMENTED, for any arity."""
    for arity in (channel.unary_unary, channel.stream_unary):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await arity("/vmferry.test.Probe/Nothing")(
                iter([]) if arity is channel.stream_unary else b"", timeout=10
            )
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert recorder.calls == [("/vmferry.test.Probe/Nothing", "AbortError")] * 2


async def test_official_health_watch(recorder: Recorder) -> None:
    """The official health service's Watch, a coroutine that writes, works and is left when its client goes."""
    server = grpc.aio.server(interceptors=[recorder])
    servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(
            health_pb2.HealthCheckRequest(service="x"), timeout=20
        )
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        await servicer.set("x", health_pb2.HealthCheckResponse.SERVING)
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        watch.cancel()
        await happened(recorder.left)
    await server.stop(None)
    assert recorder.calls == [("/grpc.health.v1.Health/Watch", "CancelledError")]


async def test_synchronous_handler_is_refused() -> None:
    """A handler that would run on another thread is refused instead of being run without what is around it."""
    handler = grpc.unary_unary_rpc_method_handler(lambda request, _context: request)
    with pytest.raises(TypeError, match="/x/Y"):
        wrap_handler(handler, "/x/Y", Recorder()._around)
