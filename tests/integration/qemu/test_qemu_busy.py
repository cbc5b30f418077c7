"""A Linux guest in QEMU that writes too much is slowed down on the way, and is well where it arrives."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.hosts import World
from tests.integration.qemu.conftest import boot, linux_spec
from vmferry.v1 import migration_pb2 as pb

pytestmark = [pytest.mark.usefixtures("tidy"), pytest.mark.timeout(300)]

CAP = 6_000_000


async def test_a_busy_linux_guest_is_slowed_down(world: World, images: Path) -> None:
    """It is held back while it is copied; then it counts on without a hole, and its files are as they were."""
    guest = await boot(world, linux_spec(images, writes=24))
    migration_id = await world.start(
        guest,
        world.a,
        world.b,
        path="direct",
        max_bandwidth=CAP,
        switchover_bandwidth=CAP,
        downtime_limit=0.04,
        max_throttle_percent=60,
        on_no_convergence=pb.ON_NO_CONVERGENCE_SWITCH,
    )
    await world.reaches(
        world.a, migration_id, lambda now: now.progress.throttle_percent > 0, "the guest is slowed down"
    )
    ended = await world.ended(world.a, migration_id)
    assert ended.outcome == pb.MIGRATION_OUTCOME_COMPLETED, ended
    assert ended.progress.throttle_percent == 0
    await guest.assert_clean(world.b)
