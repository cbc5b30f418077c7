"""Calls end with OK, cancellation, or an error of the catalogue, and nothing of the inside leaves."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest

from tests.unit.rpc.probe_service import (
    ABORT,
    CRASH,
    FLOOD,
    METHODS,
    MISUSE,
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
from vmferry.errors import InternalError, MachineBusyError
from vmferry.rpc.interceptors import ErrorInterceptor, current_caller, current_caller_key
from vmferry.rpc.status import from_rpc_error


@pytest.fixture
async def probe() -> Probe:
    return Probe()


@pytest.fixture
async def channel(probe: Probe) -> AsyncIterator[grpc.aio.Channel]:
    async with serving(probe, [ErrorInterceptor()]) as address, grpc.aio.insecure_channel(address) as opened:
        yield opened


def _events(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [record.msg for record in caplog.records if isinstance(record.msg, dict)]


@pytest.mark.parametrize("method", METHODS)
async def test_success_passes(channel: grpc.aio.Channel, method: str) -> None:
    """A call without an error is untouched."""
    assert (await responses_of(start_call(channel, method, OK)))[-1] == b"did ok"


@pytest.mark.parametrize("method", METHODS)
async def test_error_of_the_catalogue_becomes_its_status(
    channel: grpc.aio.Channel, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The client can raise the very error that the handler raised; the log notes it without a traceback."""
    caplog.set_level(logging.INFO)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await responses_of(start_call(channel, method, REFUSE))
    error = from_rpc_error(caught.value)
    assert type(error) is MachineBusyError
    assert (error.message, error.field, error.metadata) == (
        "the machine is busy",
        "machine",
        {"machine": "m1"},
    )
    (event,) = _events(caplog)
    assert (event["method"], event["reason"]) == (f"/{SERVICE}/{method}", "MACHINE_BUSY")
    assert "exc_info" not in event


@pytest.mark.parametrize("method", METHODS)
async def test_unexpected_error_tells_the_log_and_not_the_caller(
    channel: grpc.aio.Channel, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    """An unexpected exception is INTERNAL to the caller, without its text; the log has the exception itself."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await responses_of(start_call(channel, method, CRASH))
    assert type(from_rpc_error(caught.value)) is InternalError
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert "swordfish" not in repr(caught.value)
    (event,) = _events(caplog)
    assert event["exc_info"].__traceback__ is not None
    assert "swordfish" in str(event["exc_info"])


@pytest.mark.parametrize("method", METHODS)
async def test_cancelled_call_passes(
    channel: grpc.aio.Channel, probe: Probe, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A client that cancels cancels the handler, and that is no event for the log."""
    call = start_call(channel, method, WAIT)
    await happened(probe.entered)
    call.cancel()
    await happened(probe.left)
    assert probe.cancelled
    assert await call.code() is grpc.StatusCode.CANCELLED
    assert not caplog.records


async def test_client_that_leaves_while_being_written_to(
    channel: grpc.aio.Channel, probe: Probe, caplog: pytest.LogCaptureFixture
) -> None:
    """A response that can no longer be written is no unexpected error."""
    call = start_call(channel, "unary_stream_yield", FLOOD)
    await happened(probe.entered)
    call.cancel()
    await happened(probe.left)
    assert (await responses_of(start_call(channel, "unary_unary", OK))) == [b"did ok"]
    assert not caplog.records


async def test_misused_context_is_unexpected(
    channel: grpc.aio.Channel, caplog: pytest.LogCaptureFixture
) -> None:
    """A handler that writes from two tasks at a time is a bug that is logged, not a client that has gone."""
    call = start_call(channel, "unary_stream_write", MISUSE)
    # Nothing is read, so that flow control lets no write end before the next begins.
    async with asyncio.timeout(60):
        while not _events(caplog):  # noqa: ASYNC110 - a log announces its events to nobody
            await asyncio.sleep(0.005)
    call.cancel()
    assert [event["event"] for event in _events(caplog)] == ["call failed unexpectedly"]


@pytest.mark.parametrize("method", METHODS)
async def test_aborted_call_keeps_its_status(
    channel: grpc.aio.Channel, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A handler that aborts by hand has the last word."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await responses_of(start_call(channel, method, ABORT))
    assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.OUT_OF_RANGE, "by hand")
    assert not caplog.records


def test_caller_is_unknown_outside_of_a_call() -> None:
    """Code that asks for the caller where there is none is wrong, and is told so."""
    with pytest.raises(InternalError, match="outside"):
        current_caller()
    with pytest.raises(InternalError, match="outside"):
        current_caller_key()
