"""The migrations that a task follows now: begun by this process, or found open when it started.

Promise: each is followed until its task has ended, whatever it ended in; whoever asked to hear of it does, once.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Iterator
from typing import Final

from source_svc.departure import Departure
from source_svc.outgoing import Outgoing
from source_svc.recovery import Recovered
from vmferry.errors import ServiceStoppingError
from vmferry.telemetry.logs import get_logger

_LOG: Final = get_logger(__name__)


class Underway:
    """All of one source service."""

    def __init__(self) -> None:
        self._running: dict[str, Outgoing | Recovered] = {}
        self._departures: dict[str, Departure] = {}
        self.on_end: list[Callable[[Outgoing | Recovered], None]] = []
        """Called when one has ended, or came back to the queue."""

    def __len__(self) -> int:
        return len(self._running)

    def __iter__(self) -> Iterator[Outgoing | Recovered]:
        return iter(list(self._running.values()))

    def get(self, migration_id: str) -> Outgoing | Recovered | None:
        """The one of this id, if it is under way."""
        return self._running.get(migration_id)

    def of_machine(self, machine_id: str) -> Outgoing | Recovered | None:
        """The one that moves a machine."""
        return next((one for one in self if one.migration.message.machine_id == machine_id), None)

    def is_busy(self, machine_id: str) -> bool:
        """Whether a migration of the machine is under way; one that waits is not."""
        return self.of_machine(machine_id) is not None

    def departure_of(self, machine_id: str) -> Departure | None:
        """The journal of a machine that is under way."""
        return next((one for one in self._departures.values() if one.machine_id == machine_id), None)

    def follow(self, one: Outgoing | Recovered, departure: Departure) -> None:
        """Start it, and follow it to its end."""
        self._running[one.migration.id] = one
        self._departures[one.migration.id] = departure
        one.start().add_done_callback(lambda task: self._forget(one, task))

    async def interrupt(self) -> None:
        """The service stops."""
        await asyncio.gather(*(one.interrupt() for one in self))

    def _forget(self, one: Outgoing | Recovered, task: asyncio.Task[None]) -> None:
        self._running.pop(one.migration.id, None)
        self._departures.pop(one.migration.id, None)
        for tell in self.on_end:
            tell(one)
        # gRPC's ended calls are tied in circles and keep their channels until those are collected.
        asyncio.get_running_loop().call_soon(gc.collect)
        if task.cancelled() or isinstance(error := task.exception(), ServiceStoppingError):
            return
        if error is not None:
            _LOG.critical("a migration ended in an error", migration=one.migration.id, exc_info=error)
