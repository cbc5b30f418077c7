"""One way for a server interceptor to run code around a call, whatever the call looks like.

Promise: ``around(method, context)`` is entered in the task that runs the handler, before it, and left after it has
ended, for all four arities and for both ways of writing a streaming handler (a generator that yields responses, or a
coroutine that uses ``context.read()`` and ``context.write()``). Cancellation, aborts and errors reach ``around`` as
the exceptions they are.

Generators are driven here and their responses written with ``context.write``, instead of handing gRPC another
generator: gRPC leaves a generator suspended when a call is cancelled while a response is being written, and whatever
is around the handler would be left whenever the garbage collector comes by, in another task.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, aclosing
from typing import Any, Final, TypeAlias

import grpc
import grpc.aio

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Continuation: TypeAlias = Callable[[grpc.HandlerCallDetails], Awaitable["Handler | None"]]
Around: TypeAlias = Callable[[str, Context], AbstractAsyncContextManager[None]]
"""Given the method as ``/package.Service/Method`` and the call's context, what to run around the call."""

_Behaviour: TypeAlias = Callable[[Any, Context], Awaitable[Any]]

_CONSTRUCTORS: Final[dict[str, Callable[..., Handler]]] = {
    "unary_unary": grpc.unary_unary_rpc_method_handler,
    "unary_stream": grpc.unary_stream_rpc_method_handler,
    "stream_unary": grpc.stream_unary_rpc_method_handler,
    "stream_stream": grpc.stream_stream_rpc_method_handler,
}


def read_requests_with(
    server: grpc.aio.Server, service: str, behaviour: Callable[..., Any], read: Callable[[bytes], Any]
) -> None:
    """Have a method that takes a stream read its requests with ``read``, instead of the generated code.

    It was added to the server before, with the generated code; what it answers is written as before.
    """
    method: str = behaviour.__name__
    answers_stream = inspect.isasyncgenfunction(behaviour)
    construct = _CONSTRUCTORS["stream_stream" if answers_stream else "stream_unary"]
    handler = construct(
        behaviour, request_deserializer=read, response_serializer=lambda answer: answer.SerializeToString()
    )
    # Of two handlers of a method the later one counts. The stubs do not know this method yet.
    server.add_registered_method_handlers(service, {method: handler})  # type: ignore[attr-defined]


def wrap_handler(handler: Handler, method: str, around: Around) -> Handler:
    """The same handler with ``around`` around each of its calls.

    Raises:
        TypeError: the handler is not asynchronous; vmferry has no other.
    """
    arity = "_".join(
        "stream" if side else "unary" for side in (handler.request_streaming, handler.response_streaming)
    )
    behaviour = _as_coroutine(getattr(handler, arity), method)

    async def call(request: Any, context: Context) -> Any:
        async with around(method, context):
            return await behaviour(request, context)

    return _CONSTRUCTORS[arity](
        call,
        request_deserializer=handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )


async def find_handler(continuation: Continuation, details: grpc.HandlerCallDetails) -> Handler:
    """The method's handler; for a method nobody serves, one that says so, which can be wrapped like any other."""
    found = await continuation(details)
    return grpc.stream_stream_rpc_method_handler(_unimplemented) if found is None else found


async def _unimplemented(_requests: Any, context: Context) -> None:
    await context.abort(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")


def _as_coroutine(behaviour: Callable[..., Any], method: str) -> _Behaviour:
    if inspect.iscoroutinefunction(behaviour):
        return behaviour
    if not inspect.isasyncgenfunction(behaviour):
        raise TypeError(f"the handler of {method} is neither a coroutine function nor an async generator")
    generate: Callable[[Any, Context], AsyncGenerator[Any, None]] = behaviour

    async def drive(request: Any, context: Context) -> None:
        async with aclosing(generate(request, context)) as responses:
            async for response in responses:
                await context.write(response)

    return drive
