"""Watching something to its end over connections that may break.

Promise: what is handed on is what the service said, never a guess; a lost connection is taken up again and changes
nothing about what is watched; whoever goes silent for too long is given up with an error that says so.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

import grpc.aio

from vmferry.errors import PeerUnreachableError, ServiceStoppingError, VmferryError

Seen = TypeVar("Seen")


@dataclass(frozen=True)
class Patience:
    """How long a watcher waits for what may never come."""

    reconnect_s: float = 60.0
    """For a service that went silent to answer again."""
    unknown_s: float = 15.0
    """For an outcome that is unknown to become known."""
    end_s: float = 1.0
    """For the service to close the stream of what has ended; cutting it off would look like a failure."""
    retry_s: float = 0.5
    """Between two attempts to reach the service."""


PATIENCE: Final = Patience()
AWAY: Final = (PeerUnreachableError, ServiceStoppingError)
"""What it may be worth to wait for."""


@dataclass(frozen=True)
class Watched(Generic[Seen]):
    """What is watched, and how it is read."""

    open: Callable[[Seen | None], AsyncGenerator[Seen, None]]
    """Begins a stream; it is told what was seen last."""
    ended: Callable[[Seen], bool]
    unknown: Callable[[Seen], bool]
    """Whether what is to come may never be known."""
    translate: Callable[[grpc.aio.AioRpcError], VmferryError]
    resume: str
    """What to do when the service answers again."""

    def patience_s(self, seen: Seen, patience: Patience) -> float | None:
        """How long to wait for more after this state, which may be the last one; None for as long as it takes."""
        if self.ended(seen):
            return patience.end_s
        return patience.unknown_s if self.unknown(seen) else None


async def watch(
    watched: Watched[Seen],
    *,
    last: Seen | None = None,
    patience: Patience = PATIENCE,
    on_lost: Callable[[], None] = lambda: None,
) -> AsyncGenerator[Seen, None]:
    """What the service says of it, until it has ended or its outcome has stayed unknown for a while.

    Args:
        watched: what is watched.
        last: what is known already; a service that was never reached is not waited for.
        patience: how long to wait.
        on_lost: called when the connection is lost and will be tried again.

    Raises:
        PeerUnreachableError: the service does not answer (any more).
        VmferryError: it refuses.
    """
    now = asyncio.get_running_loop().time
    until: float | None = None
    while True:
        try:
            async with contextlib.aclosing(watched.open(last)) as stream:
                while (seen := await _next(stream, until)) is not None:
                    last = seen
                    wait_s = watched.patience_s(last, patience)
                    if wait_s is None or until is None:
                        until = None if wait_s is None else now() + wait_s
                    yield last
        except grpc.aio.AioRpcError as error:
            found = watched.translate(error)
            if last is None or not isinstance(found, AWAY):
                raise found from error
        except TimeoutError:
            pass
        if last is not None and watched.ended(last):
            return
        if until is None:
            until = now() + patience.reconnect_s
            on_lost()
        if now() >= until:
            if last is not None and watched.unknown(last):
                return
            raise PeerUnreachableError(
                f"the service did not answer for {patience.reconnect_s:g} s; what was watched may go on without this",
                remedy=watched.resume,
            )
        await asyncio.sleep(min(patience.retry_s, max(0.0, until - now())))


async def _next(stream: AsyncGenerator[Seen, None], until: float | None) -> Seen | None:
    """What the stream brings next; ``None`` at its end."""
    async with asyncio.timeout_at(until):
        return await anext(stream, None)
