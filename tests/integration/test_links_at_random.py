"""Two hundred migrations over links that break at random moments; a sample of them unless VMFERRY_SOAK is set.

Every one ends with an undamaged guest and exactly one copy; one that broke while its guest ran, completes.
"""

from __future__ import annotations

import os
import random
from collections.abc import AsyncIterator

import pytest

from tests.integration.links import Broken, assert_right, broken_hosts, disturbed

SOAK = bool(os.environ.get("VMFERRY_SOAK"))
RUNS = 200 if SOAK else 8
LONGEST_S = 12.0 if SOAK else 2.5
SEED = int(os.environ.get("VMFERRY_SEED") or random.randrange(1 << 32))

pytestmark = pytest.mark.timeout(RUNS * 60)


@pytest.fixture
async def broken() -> AsyncIterator[Broken]:
    """Hosts a and b in namespaces."""
    async with broken_hosts() as hosts:
        yield hosts
        await hosts.tidy()


async def test_migrations_over_links_that_break_at_random(broken: Broken) -> None:
    """A canary goes to and fro; what was sent twice is told."""
    print(f"VMFERRY_SEED={SEED}")
    here, there = broken.world.a, broken.world.b
    guest = await broken.guest()
    completed = repeated = reopened = 0
    for number in range(RUNS):
        rng = random.Random(f"{SEED} {number}")
        lanes = rng.choice((2, 4))
        story = await disturbed(broken, rng, guest, here, there, longest_s=LONGEST_S, lanes=lanes)
        print(f"{number}: {lanes} lanes, {story}", flush=True)
        await assert_right(broken, guest, here, there, story)
        repeated += story.migration.progress.repeated_bytes
        reopened += story.migration.progress.reconnects
        if story.completed:
            completed += 1
            here, there = there, here
    print(f"{completed} of {RUNS} completed; {reopened} lanes reopened, {repeated} bytes sent twice")
    assert completed > RUNS // 2
