"""What a running migration may do to its guest and to the link; callers may change it until the guest is paused.

Promise: a change applies from the next decision on, and to bytes that wait to be sent at once; the last round has a
rate of its own, which begins with the guest's pause.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace

from source_svc.orders import Order
from vmferry.errors import TimedOutError, WrongPhaseError
from vmferry.transfer.convergence import Limits
from vmferry.transfer.pacer import Pacer


class Terms:
    """The terms of one migration as they are now."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._live = True
        self._switch_now = False
        self._paused = False
        self._total: asyncio.Timeout | None = None
        self._began_at = 0.0
        self._changed = asyncio.Event()
        self.limits: Limits = order.limits()
        self.pacer = Pacer(self.limits.precopy_bytes_per_s)

    def live(self, *, live: bool) -> None:
        """Say whether the guest runs while its memory is sent; if not, a longer pause is acceptable."""
        self._live = live
        self.limits = self._limits()

    def switch_now(self) -> None:
        """Switch after the round that is being copied, whatever the pause; nothing more if the guest is paused."""
        if not self._paused:
            self._switch_now = True
            self.limits = self._limits()
            self._changed.set()

    def change(self, order: Order) -> None:
        """Go on as another order would have it.

        Raises:
            WrongPhaseError: the guest is paused, or nothing more is copied.
        """
        if self._paused:
            raise WrongPhaseError(
                "the guest is paused for its switch, and nothing can be changed any more",
                remedy="Wait for the end of the migration, which is near.",
            )
        self._order = order
        self.limits = self._limits()
        self.pacer.change(self.limits.precopy_bytes_per_s)
        if self._total is not None:
            self._total.reschedule(self._began_at + order.total_timeout_s)
        self._changed.set()

    def _limits(self) -> Limits:
        return replace(self._order.limits(live=self._live), switch_now=self._switch_now)

    def guest_pauses(self) -> None:
        """The switch begins: from here on the other rate counts, and nothing changes."""
        self._paused = True
        self.pacer.change(self.limits.pause_bytes_per_s)

    async def changed_or(self, seconds: float) -> None:
        """Wait so long, or until something is changed."""
        self._changed.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._changed.wait()

    @contextlib.asynccontextmanager
    async def total_timeout(self) -> AsyncIterator[None]:
        """Limit what is done within to the total timeout, as it is then."""
        self._began_at = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(self._order.total_timeout_s) as self._total:
                yield
        except TimeoutError as error:
            raise _too_long("total_timeout", self._order.total_timeout_s) from error
        finally:
            self._total = None


@contextlib.asynccontextmanager
async def time_limit(name: str, seconds: float) -> AsyncIterator[None]:
    """Limit what is done within; what takes longer fails with the name of the limit."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError as error:
        raise _too_long(name, seconds) from error


def _too_long(name: str, seconds: float) -> TimedOutError:
    return TimedOutError(f"it took longer than the {name} of {seconds:g} s", limit=name)
