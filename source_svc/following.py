"""What is common to migrations that a task follows to their end, whether this process began them or found them open.

Promise: asking for more haste changes when the next try is made, and nothing else.
"""

from __future__ import annotations

import asyncio

from source_svc.departure import Departure
from source_svc.peer import Destination
from vmferry.recovery.contact import Contact


class Followed:
    """The base of both."""

    _destination: Destination
    _departure: Departure
    _task: asyncio.Task[None] | None

    @property
    def contact(self) -> Contact:
        """What was heard from the destination last."""
        return self._destination.contact

    @property
    def settling(self) -> bool:
        """Whether it tries again and again what it cannot bring about by itself."""
        return self._departure.settling

    async def hurry(self) -> None:
        """Have that be tried now; returns when it was."""
        assert self._task is not None
        await self._departure.pause.hurry(self._task)
