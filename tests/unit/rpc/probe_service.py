"""A service with every shape of handler, whose behaviour each request chooses, and real servers to run it on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

import grpc
import grpc.aio

from vmferry.errors import MachineBusyError

SERVICE: Final = "vmferry.test.Probe"
METHODS: Final = (
    "unary_unary",
    "unary_stream_yield",
    "unary_stream_write",
    "stream_unary_iterate",
    "stream_unary_read",
    "stream_stream_yield",
    "stream_stream_write",
)
OK: Final = b"ok"
REFUSE: Final = b"refuse"
CRASH: Final = b"crash"
ABORT: Final = b"abort"
WAIT: Final = b"wait"
FLOOD: Final = b"flood"
DRAIN: Final = b"drain"
MISUSE: Final = b"misuse"


class Probe:
    """Handlers of all arities and styles; remembers what happened to the last call."""

    def __init__(self) -> None:
        self.entered = asyncio.Event()
        self.left = asyncio.Event()
        self.cancelled = False

    def add_to(self, server: grpc.aio.Server) -> Sequence[str]:
        """Add the handlers to a server; returns the service's name."""
        handlers = {
            name: getattr(grpc, f"{_arity(name)}_rpc_method_handler")(getattr(self, f"_{name}"))
            for name in METHODS
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        return [SERVICE]

    async def _act(self, request: bytes, context: Any) -> bytes:
        self.entered.set()
        try:
            if request == REFUSE:
                raise MachineBusyError("the machine is busy", field="machine", machine="m1")
            if request == CRASH:
                raise RuntimeError("the password is swordfish")
            if request == ABORT:
                await context.abort(grpc.StatusCode.OUT_OF_RANGE, "by hand")
            if request == MISUSE:
                await asyncio.gather(*(context.write(bytes(1 << 20)) for _ in range(32)))
            if request == WAIT:
                await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        finally:
            self.left.set()
        return b"did " + request

    async def _unary_unary(self, request: bytes, context: Any) -> bytes:
        return await self._act(request, context)

    async def _unary_stream_yield(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        if request == FLOOD:
            self.entered.set()
            try:
                while True:
                    yield bytes(1 << 20)
            finally:
                self.left.set()
        yield b"first"
        yield await self._act(request, context)

    async def _unary_stream_write(self, request: bytes, context: Any) -> None:
        await context.write(b"first")
        await context.write(await self._act(request, context))

    async def _stream_unary_iterate(self, requests: AsyncIterator[bytes], context: Any) -> bytes:
        answer = b""
        async for request in requests:
            answer = await self._act(request, context)
        return answer

    async def _stream_unary_read(self, _requests: Any, context: Any) -> bytes:
        answer = b""
        while (request := await context.read()) is not grpc.aio.EOF:
            answer = await self._act(request, context)
        return answer

    async def _stream_stream_yield(
        self, requests: AsyncIterator[bytes], context: Any
    ) -> AsyncIterator[bytes]:
        yield b"first"
        async for request in requests:
            yield await self._act(request, context)

    async def _stream_stream_write(self, _requests: Any, context: Any) -> None:
        await context.write(b"first")
        while (request := await context.read()) is not grpc.aio.EOF:
            if request == DRAIN:
                self.entered.set()
            else:
                await context.write(await self._act(request, context))


def _arity(method: str) -> str:
    return "_".join(method.split("_")[:2])


def start_call(channel: grpc.aio.Channel, method: str, request: bytes) -> Any:
    """Start a call of the probe that sends ``request`` once."""

    async def requests() -> AsyncIterator[bytes]:
        yield request

    kind = getattr(channel, _arity(method))
    return kind(f"/{SERVICE}/{method}")(requests() if method.startswith("stream") else request, timeout=20)


async def responses_of(call: Any) -> list[bytes]:
    """Everything a call answers, whatever its arity; raises what the call raises."""
    if hasattr(call, "__aiter__"):
        return [response async for response in call]
    return [await call]


@asynccontextmanager
async def serving(probe: Probe, interceptors: Sequence[Any]) -> AsyncIterator[str]:
    """Run the probe on a loopback port without TLS; gives its address."""
    server = grpc.aio.server(interceptors=list(interceptors))
    probe.add_to(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


async def happened(event: asyncio.Event) -> None:
    """Wait for an event of the probe, not for ever."""
    async with asyncio.timeout(60):
        await event.wait()
