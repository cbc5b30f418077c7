"""The network between the services: unary calls that may be lost, repeated, late or overtaken.

A call is two messages. The caller waits until its time limit, at which the callee's handler is cancelled, as gRPC
does; neither learns what became of the other. A host without a running service refuses.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Awaitable, Callable
from typing import Any, Final, Protocol

from tests.simulation.cluster.clock import Loop, Process
from vmferry.errors import InternalError, PeerUnreachableError, VmferryError
from vmferry.rpc import interceptors
from vmferry.security.identity import Identity

MESSAGE_S: Final = 0.001
OVERTAKEN_S: Final = 0.05
LATE_S: Final = 5.0

Handler = Callable[[Any, Any], Awaitable[Any]]


class World(Protocol):
    """What the network needs of the world around it."""

    loop: Loop

    def step(self, kind: str, host: str, detail: str) -> str:
        """Come to a boundary; the answer names what happens to the message, or is empty."""

    def jitter(self) -> float:
        """By how much a message takes longer than others."""

    def unexpected(self, what: str) -> None:
        """Something happened that no fault explains."""

    def serving(self, host: str) -> tuple[Process, Any] | None:
        """The destination service of a host that answers now."""


class Network:
    """All connections between all hosts."""

    def __init__(self, world: World) -> None:
        self.cuts: set[tuple[str, str]] = set()
        self._world = world
        self._context = contextvars.Context()

    def post(self, sender: str, receiver: str, name: str, arrive: Callable[[], None]) -> None:
        """Send one message."""
        fate = self._world.step("message", sender, f"{name}>{receiver}")
        if fate == "drop" or (sender, receiver) in self.cuts:
            return
        delay = {"late": LATE_S, "overtaken": OVERTAKEN_S}.get(fate, MESSAGE_S) * self._world.jitter()
        for _ in range(2 if fate == "twice" else 1):
            self._later(delay, self._delivery(sender, receiver, arrive))
            delay += OVERTAKEN_S

    def _delivery(self, sender: str, receiver: str, arrive: Callable[[], None]) -> Callable[[], None]:
        return lambda: None if (sender, receiver) in self.cuts else arrive()

    def _later(self, seconds: float, act: Callable[[], None]) -> None:
        self._world.loop.call_later(seconds, act, context=self._context)

    async def call(self, caller: Process, callee: str, method: str, request: Any, timeout_s: float) -> Any:
        """Call a method of a host's destination service."""
        caller.check()
        loop = self._world.loop
        answered: asyncio.Future[Any] = loop.create_future()
        deadline = loop.time() + timeout_s
        handlers: list[asyncio.Task[None]] = []

        def returned(result: Any, error: BaseException | None) -> None:
            if answered.done():
                return
            if error is None:
                answered.set_result(result)
            else:
                answered.set_exception(error)

        def arrived() -> None:
            found = self._world.serving(callee)
            if found is None:
                refused = PeerUnreachableError("connection refused")
                self.post(callee, caller.host, f"{method}:refused", lambda: returned(None, refused))
                return
            process, service = found
            work = self._handle(process, getattr(service, method), request, caller.host, method, returned)
            context = process.context.copy()
            context.run(interceptors._CALLER.set, interceptors._Caller(identity_of(caller.host), b""))
            handler = loop.create_task(work, context=context)
            handlers.append(handler)
            if loop.time() < deadline:
                self._later(deadline - loop.time(), lambda: _cancel(handler))

        self.post(caller.host, callee, method, arrived)
        try:
            async with asyncio.timeout(timeout_s):
                return await answered
        except TimeoutError:
            raise PeerUnreachableError(f"{method} was not answered in {timeout_s:g} s") from None
        except asyncio.CancelledError:
            for handler in handlers:
                handler.cancel()
            raise

    async def _handle(
        self,
        process: Process,
        handle: Handler,
        request: Any,
        caller: str,
        method: str,
        returned: Callable[[Any, BaseException | None], None],
    ) -> None:
        result: Any = None
        error: VmferryError | None = None
        try:
            result = await handle(request, None)
        except VmferryError as raised:
            error = raised
        except Exception as raised:  # noqa: BLE001 - the world says that it must not be
            self._world.unexpected(f"{method} failed with {raised!r}")
            error = InternalError(repr(raised))
        if process.alive:
            self.post(process.host, caller, f"{method}:answer", lambda: returned(result, error))


def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()


def identity_of(host: str) -> Identity:
    """Who a host is."""
    return Identity.parse(f"spiffe://example.org/vmhost/{host}")
