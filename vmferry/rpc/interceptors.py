"""What stands between the network and a service's methods: authorisation, and errors as statuses.

Promise: no method, known or unknown, runs or even says that it does not exist before its caller has been
authenticated and allowed; and no call ends with anything but OK, cancellation, or an error of the catalogue. What is
unexpected goes into the log with its traceback, and none of it to the caller.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Final

import grpc
import grpc.aio

from vmferry.errors import InternalError, VmferryError
from vmferry.rpc.handlers import (
    Context,
    Continuation,
    Handler,
    find_handler,
    wrap_handler,
)
from vmferry.rpc.status import to_grpc_status
from vmferry.security.authorization import (
    authorize,
    caller_from_auth_context,
    caller_key_sha256,
    tls_version_from_auth_context,
)
from vmferry.security.identity import Identity
from vmferry.security.override import note_denied
from vmferry.telemetry.logs import get_logger
from vmferry.telemetry.tracing import current_trace_id, span_attributes

_LOG: Final = get_logger(__name__)
_MISUSE: Final = "grpc_call_start_batch"
"""What gRPC names when a handler does two things with its context at a time, such as writing from two tasks."""


@dataclass(frozen=True)
class _Caller:
    identity: Identity
    key_sha256: bytes


_CALLER: ContextVar[_Caller] = ContextVar("vmferry_caller")


def current_caller() -> Identity:
    """Who makes the call that runs now.

    Raises:
        InternalError: no authorised call runs here.
    """
    return _authorised().identity


def current_caller_key() -> bytes:
    """SHA-256 of the public key (SubjectPublicKeyInfo) in the certificate of the call that runs now.

    Raises:
        InternalError: no authorised call runs here.
    """
    return _authorised().key_sha256


@contextmanager
def acting_as(identity: Identity) -> Iterator[None]:
    """Make calls of one's own methods as somebody, who stands behind them as if the call had come from there."""
    token = _CALLER.set(_Caller(identity, b""))
    try:
        yield
    finally:
        _CALLER.reset(token)


def _authorised() -> _Caller:
    try:
        return _CALLER.get()
    except LookupError:
        raise InternalError("the caller was asked for outside of an authorised call") from None


class AuthorizationInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg] # generic only in its stubs
    """Lets a call pass only if its certificate's identity may make it; tells the handler who calls."""

    def __init__(self, own: Identity) -> None:
        self._own = own

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Handler:
        """Put the check before the method's handler, or before the answer that there is none."""
        handler = await find_handler(continuation, handler_call_details)
        return wrap_handler(handler, handler_call_details.method, self._around)

    @asynccontextmanager
    async def _around(self, method: str, context: Context) -> AsyncIterator[None]:
        properties = context.auth_context()
        identity = caller_from_auth_context(properties)
        tls_version = tls_version_from_auth_context(properties)
        try:
            authorize(method, caller=identity, own=self._own, tls_version=tls_version)
        except VmferryError as error:
            note_denied(method, identity, error)
            raise
        # Each call has a context of its own, so this ends with the call; the log of its errors needs it until then.
        _CALLER.set(_Caller(identity, caller_key_sha256(properties)))
        yield


class ErrorInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg] # generic only in its stubs
    """Ends calls that met an error with the error's status."""

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Handler:
        """Put the translation around the method's handler."""
        handler = await find_handler(continuation, handler_call_details)
        return wrap_handler(handler, handler_call_details.method, self._around)

    @asynccontextmanager
    async def _around(self, method: str, context: Context) -> AsyncIterator[None]:
        try:
            yield
        except VmferryError as error:
            _LOG.info(
                "call refused", method=method, reason=error.reason, detail=error.message, **_peer(context)
            )
            await _abort(context, error)
        except grpc.aio.InternalError as error:
            if _MISUSE in str(error):
                await _abort_unexpected(method, context, error)
            # A response could not be written because the client is gone; gRPC cancels such a call a moment later.
            raise asyncio.CancelledError from error
        except grpc.aio.UsageError as error:
            await _abort_unexpected(method, context, error)
        except grpc.aio.BaseError:  # already aborted, or the server is stopping
            raise
        except Exception as error:  # noqa: BLE001 - the outermost edge: nothing of it may reach the caller
            await _abort_unexpected(method, context, error)


async def _abort_unexpected(method: str, context: Context, error: Exception) -> None:
    _LOG.error("call failed unexpectedly", method=method, exc_info=error, **_peer(context))
    trace_id = current_trace_id()
    where = f", trace {trace_id}" if trace_id else ""
    message = f"internal error in {method}; the service's log has the details{where}"
    await _abort(context, InternalError(message, **({"trace_id": trace_id} if trace_id else {})))


async def _abort(context: Context, error: VmferryError) -> None:
    span_attributes(reason=error.reason)
    if context.done():  # the handler aborted the call itself and failed afterwards; the first status stands
        raise error
    status = to_grpc_status(error)
    await context.abort(status.code, status.details, status.trailing_metadata)


def _peer(context: Context) -> dict[str, str]:
    caller = _CALLER.get(None)
    return {"peer": context.peer()} | ({"caller": str(caller.identity)} if caller else {})
