"""Destinations that may not have heard that an attempt was closed.

Promise: whoever may still hold a copy for an attempt that this host closed is told so until it answers, also after a
restart; nothing here decides anything. A prepared copy is dropped by no timer, so one whose source fell silent right
after closing would lie there for ever.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from source_svc.pause import Pause
from source_svc.peer import Destination
from vmferry.errors import (
    JournalDamagedError,
    PeerUnreachableError,
    ServiceStoppingError,
    TimedOutError,
    VmferryError,
)
from vmferry.handoff import source
from vmferry.handoff.ledger import HostLedger
from vmferry.handoff.states import Attempt
from vmferry.security.identity import Identity
from vmferry.telemetry.logs import get_logger

_LOG: Final = get_logger(__name__)
_LONGEST_WAIT_S: Final = 60.0
_PASSING: Final = (PeerUnreachableError, ServiceStoppingError, TimedOutError, JournalDamagedError)


@dataclass
class _Farewell:
    """One that is being said."""

    attempt: Attempt
    task: asyncio.Task[None]
    pause: Pause = field(default_factory=Pause)
    why_not: str = ""
    """Why it could not be said the last time."""


class Farewells:
    """All that are still to be said by one source service."""

    def __init__(
        self, ledger: HostLedger, open_peer: Callable[[str, Identity], Destination], retry_s: float
    ) -> None:
        self._ledger = ledger
        self._open_peer = open_peer
        self._retry_s = retry_s
        self._tasks: set[asyncio.Task[None]] = set()
        self._saying: dict[bytes, _Farewell] = {}

    def say(self, machine_id: str) -> None:
        """Tell the destination of the machine's last attempt, if this host closed it.

        It goes on if another attempt begins, maybe to another destination.
        """
        task = asyncio.create_task(self._say(machine_id), name=f"farewell-{machine_id}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def hurry(self, machine_id: str) -> list[str]:
        """Say what is still to be said about a machine now; returns what came of it, in sentences."""
        said = []
        for one in [one for one in self._saying.values() if one.attempt.machine_id == machine_id]:
            await one.pause.hurry(one.task)
            came = f"could not be told: {one.why_not}" if one.why_not else "knows it now"
            said.append(f"an attempt was closed here and {one.attempt.destination} {came}")
        return said

    async def stop(self) -> None:
        """Leave the rest to the next start."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _say(self, machine_id: str) -> None:
        attempt = await self._closed(machine_id)
        if attempt is None or attempt.migration_id in self._saying:
            return
        task = asyncio.current_task()
        assert task is not None
        farewell = self._saying[attempt.migration_id] = _Farewell(attempt, task)
        wait_s = self._retry_s
        try:
            while not await self._told(farewell):
                await farewell.pause.wait(wait_s)
                wait_s = min(wait_s * 2, _LONGEST_WAIT_S)
        finally:
            del self._saying[attempt.migration_id]

    async def _closed(self, machine_id: str) -> Attempt | None:
        """The machine's last attempt, if it was closed here and none has begun since."""
        outgoing = (await asyncio.to_thread(self._ledger.rights, machine_id)).outgoing
        return outgoing.closed if isinstance(outgoing, source.Quiet) else None

    async def _told(self, farewell: _Farewell) -> bool:
        """Whether the destination knows now, or cannot be told anything."""
        attempt = farewell.attempt
        destination = self._open_peer(attempt.destination_address, Identity.parse(attempt.destination))
        try:
            await destination.tell("Abort", attempt, digest=b"", reason="closed by its source")
        except VmferryError as error:
            farewell.why_not = error.message
            _LOG.info("the destination could not be told", machine=attempt.machine_id, detail=error.message)
            return not isinstance(error, _PASSING)
        finally:
            await destination.close()
        farewell.why_not = ""
        return True
