"""The link to a destination while a migration is under way: calls that are repeated, and what is told of it.

Promise: only calls that are harmless to repeat are, and only while the destination cannot be reached; whoever watches
a migration sees at any time whether it is connected, and for how much longer a connection is tried.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from source_svc.migrations import Migration
from vmferry.errors import PeerUnreachableError
from vmferry.telemetry.metrics import count_retry
from vmferry.telemetry.tracing import span_event
from vmferry.transfer.lanes import Lanes
from vmferry.v1 import handoff_pb2

Answer = TypeVar("Answer")
_FIRST_RETRY_S: Final = 0.02
_LONGEST_RETRY_S: Final = 1.0
_LOOK_S: Final = 0.2
_OPENING_S: Final = 2.0
_TOLD_S: Final = 1.0
"""How often the time that is left is told anew."""


async def until_reached(ask: Callable[[], Awaitable[Answer]], call: str, limit_s: float) -> Answer:
    """Make a call that may be repeated, again while the destination cannot be reached.

    Raises:
        PeerUnreachableError: it could not be for so long.
    """
    now, wait_s = asyncio.get_running_loop().time, _FIRST_RETRY_S
    lost_at: float | None = None
    while True:
        try:
            return await ask()
        except PeerUnreachableError as error:
            lost_at = now() if lost_at is None else lost_at
            if now() - lost_at > limit_s:
                raise unreachable(limit_s, error) from error
            span_event("call repeated", call=call, cause=error.message)
            count_retry(call)
        await asyncio.sleep(wait_s)
        wait_s = min(2 * wait_s, _LONGEST_RETRY_S)


def unreachable(limit_s: float, cause: Exception) -> PeerUnreachableError:
    """The error of a destination that was tried again for as long as was asked for."""
    return PeerUnreachableError(
        f"the destination could not be reached for {limit_s:g} s: {cause}",
        limit="reconnect_timeout",
        seconds=f"{limit_s:g}",
    )


class LinkReport:
    """Shows in a migration how its lanes are connected."""

    def __init__(self, lanes: Lanes, migration: Migration) -> None:
        self._lanes = lanes
        self._migration = migration
        self._told_at = 0.0
        self._was_up = False
        self._task = asyncio.create_task(self._follow())

    async def close(self) -> None:
        """Show the last figures, and that nothing is connected any more; safe to call twice."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        progress = self._migration.message.progress
        self._count()
        progress.lanes_connected = 0
        progress.ClearField("disconnected_since")
        progress.ClearField("reconnect_left")

    async def _follow(self) -> None:
        while True:
            if self._look():
                await self._migration.touch()
            await asyncio.sleep(_LOOK_S)

    def _look(self) -> bool:
        """Bring the resource up to date; whether there is something new in it."""
        now, connections = time.time(), self._lanes.connections
        progress = self._migration.message.progress
        self._was_up |= connections.standing > 0
        # Lanes that are being opened for the first time are not broken, unless that takes conspicuously long.
        patient_s = 0.0 if self._was_up else _OPENING_S
        lost = connections.all_lost_s is not None and connections.all_lost_s >= patient_s
        news = self._count()
        if progress.lanes_connected != connections.standing:
            progress.lanes_connected = connections.standing
            news = True
        if lost and not progress.HasField("disconnected_since"):
            assert connections.all_lost_s is not None
            progress.disconnected_since.FromNanoseconds(int((now - connections.all_lost_s) * 1e9))
            news = True
        elif not lost and progress.HasField("disconnected_since"):
            progress.ClearField("disconnected_since")
            progress.ClearField("reconnect_left")
            news = True
        if lost and (news or abs(now - self._told_at) >= _TOLD_S):
            progress.reconnect_left.FromNanoseconds(int(connections.reconnect_left_s * 1e9))
            self._told_at = now
            news = True
        return news

    def _count(self) -> bool:
        traffic, progress = self._lanes.traffic, self._migration.message.progress
        counted = (traffic.reconnects, traffic.repeated_bytes)
        if counted == (progress.reconnects, progress.repeated_bytes):
            return False
        progress.reconnects, progress.repeated_bytes = counted
        return True


def granted(wanted_s: float, begun: handoff_pb2.BeginResponse) -> float:
    """How long a broken connection is tried again: no longer than the destination waits for it."""
    granted = begun.reconnect_timeout
    return min(wanted_s, granted.ToNanoseconds() / 1e9) if begun.HasField("reconnect_timeout") else wanted_s
