"""How much a guest gets done while it is migrated, and before: by its own counter and this computer's clock.

Promise: only what the guest counted itself is called work, and both rates are between two signs of life that it gave,
the one before its migration and the one from the last sign before that began to the first after it had ended.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Final

from vmferry.cli.demo_guest import Guest
from vmferry.cli.demo_hosts import DemoHost

_BEFORE_S: Final = 1.0
"""How long the guest is watched before."""


@dataclass(frozen=True)
class Sign:
    """What the guest had counted to at some moment."""

    at_s: float
    work: int


@dataclass(frozen=True)
class Watched:
    """A guest that was watched for a while before its migration."""

    first: Sign
    begun: Sign

    def slowdown_percent(self, arrived: Sign) -> float:
        """By how much less it did per second until it had arrived; below zero if it did more."""
        before, meanwhile = _rate(self.first, self.begun), _rate(self.begun, arrived)
        return round(100 * (1 - meanwhile / before), 1)


async def watch_before(guest: Guest, host: DemoHost) -> Watched:
    """See how fast it works where it is."""
    first = await next_sign(guest, host)
    await asyncio.sleep(_BEFORE_S)
    return Watched(first, await next_sign(guest, host))


async def next_sign(guest: Guest, host: DemoHost) -> Sign:
    """Wait for its next sign of life there."""
    work = await guest.next_work(host)
    return Sign(time.monotonic(), work)


def _rate(since: Sign, until: Sign) -> float:
    return (until.work - since.work) / (until.at_s - since.at_s)
