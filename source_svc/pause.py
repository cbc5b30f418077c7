"""The wait between two tries of one task, which somebody else may cut short.

Promise: cutting it changes nothing but when the next try is made; a try is never made twice at a time, and
none begins once the service stops.
"""

from __future__ import annotations

import asyncio
import contextlib

from vmferry.errors import ServiceStoppingError


class Pause:
    """Of one task, which is its only waiter."""

    def __init__(self) -> None:
        self._cut = asyncio.Event()
        self._over = False
        self._waiting = False
        self._ended = 0
        """How many tries have ended: each wait begins behind one."""
        self._news = asyncio.Event()
        """Another one has; made anew each time."""

    async def wait(self, seconds: float) -> bool:
        """Wait, for as long as nobody cuts it short; returns whether somebody did.

        Raises:
            ServiceStoppingError: nothing is tried by this process any more.
        """
        self._ended += 1
        self._news.set()
        self._news = asyncio.Event()
        self._waiting = True
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0 if self._over else seconds):
                    await self._cut.wait()
            if self._over:
                raise ServiceStoppingError("the source service stops; its next start goes on trying")
            return self._cut.is_set()
        finally:
            self._cut.clear()
            self._waiting = False

    def end(self) -> None:
        """Leave the next try to the next start of the service, however long it is until then."""
        self._over = True
        self._cut.set()

    async def hurry(self, task: asyncio.Task[None], *, tries: int = 0) -> None:
        """Have the task try now; returns when a try that began after this call has ended, or the task has.

        Args:
            task: whose pause this is.
            tries: how many ends of tries to wait for, if the next one is known to be the right one.
        """
        if not tries:
            # One that is under way began before, maybe with a connection that is dead: one more follows at once.
            tries = 1 if self._waiting else 2
            self._cut.set()
        enough = self._ended + tries
        while self._ended < enough and not task.done():
            news = asyncio.create_task(self._news.wait())
            try:
                await asyncio.wait({task, news}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                news.cancel()
                await asyncio.gather(news, return_exceptions=True)
