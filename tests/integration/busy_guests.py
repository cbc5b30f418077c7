"""Guests that write too fast for what carries them, how far they are slowed down, and whether they are let go."""

from __future__ import annotations

import asyncio
from typing import Any

from tests.integration.hosts import Guest, World
from tests.integration.hypervisors import run_state
from tests.integration.services import Host
from vmferry.machines.port import RunState

CAP = 10_000_000
PAUSE_S = 0.2
"""At the cap that is room for 1.8 MB, less than half of a working set."""
SET_MIB = 4
STUCK: dict[str, Any] = {"max_bandwidth": CAP, "downtime_limit": PAUSE_S}
LOOKS = 40


async def busy(world: World, mib_per_s: int = 64) -> Guest:
    """A guest whose working set is written to all the time."""
    rates = {"dirty-mib-per-s": str(mib_per_s), "working-set-mib": str(SET_MIB)}
    return await world.run(program="writer", params=rates)


async def assert_never_held(host: Host, guest: Guest) -> None:
    """However often one looks, for several periods of a throttle, the guest runs."""
    for _ in range(LOOKS):
        assert await run_state(host, guest) is RunState.RUNNING
        await asyncio.sleep(0.01)  # a rate of looking, not a wait for something


async def throttled(world: World, guest: Guest, percent: int, **how: Any) -> str:
    """A migration that will never converge, when its guest is held back so far."""
    migration_id = await world.start(guest, world.a, world.b, **how)
    await world.reaches(
        world.a,
        migration_id,
        lambda now: now.progress.throttle_percent >= percent,
        "the guest is slowed down",
    )
    return migration_id
