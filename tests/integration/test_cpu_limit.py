"""A guest whose process has a cgroup to itself is slowed down by the kernel's own limit, and that is always undone.

The group is real, of whichever version this computer has its processors in.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.cgroups import cpu_group
from tests.integration.busy_guests import STUCK, assert_never_held, busy, throttled
from tests.integration.hosts import Guest, World, open_world
from tests.integration.hypervisors import run_state
from tests.integration.services import Host, eventually, eventually_async
from vmferry.bench.usage import used_s
from vmferry.machines.cpulimit import RECORD
from vmferry.machines.port import RunState
from vmferry.v1 import migration_pb2 as pb

pytestmark = pytest.mark.usefixtures("tidy")

MOST_PERCENT = 95
MEASURED_S = 1.0
LOOKS = 5
"""Each takes long at a hypervisor that has little time."""
SLACK = 3.0
"""The kernel counts in ticks, and what is left of a period that had begun is not taken away."""


@pytest.fixture(scope="module")
async def world() -> AsyncIterator[World]:
    """Hosts of this module."""
    async with open_world() as opened:
        yield opened


@pytest.fixture
async def guest(world: World) -> AsyncIterator[Guest]:
    """A guest that writes as fast as it can, and services that all run again afterwards."""
    yield await busy(world, mib_per_s=1_000_000)
    for service in world.services:
        if not service.running:
            await service.start()


def record(host: Host, guest: Guest) -> Path:
    """What the next service would be told."""
    return host.directory.paths(guest.spec).home / RECORD


@pytest.mark.parametrize("end", ["completed", "cancelled", "killed"])
async def test_the_kernel_slows_it_down_until_the_end(world: World, guest: Guest, end: str) -> None:
    """It is never held still and gets no more than it may; the limit is what it was, however the migration ends."""
    pid = world.a.machine_pid(guest.id)
    with cpu_group() as group:
        group.add(pid)
        before = group.said()
        choice = pb.ON_NO_CONVERGENCE_WAIT
        migration_id = await throttled(
            world, guest, MOST_PERCENT, **STUCK, max_throttle_percent=MOST_PERCENT, on_no_convergence=choice
        )
        assert group.said() != before
        assert record(world.a, guest).exists()
        held, used, since = group.times_held_back(), used_s(pid), time.monotonic()
        await eventually(lambda: time.monotonic() - since > MEASURED_S, "it has had some time")
        share = (used_s(pid) - used) / (time.monotonic() - since)
        assert share < (1 - MOST_PERCENT / 100) * SLACK, f"it had {share:.0%} of a processor"
        assert group.times_held_back() > held
        for _ in range(LOOKS):
            assert await run_state(world.a, guest) is RunState.RUNNING
        if end == "killed":
            await world.a.source.kill()
            assert group.said() != before, "nobody has undone it yet"
            await world.a.source.start()
        else:
            async with world.source(world.a) as stub:
                if end == "cancelled":
                    await stub.CancelMigration(pb.CancelMigrationRequest(id=migration_id))
                else:
                    await stub.SwitchNow(pb.SwitchNowRequest(id=migration_id))
            outcome = (await world.ended(world.a, migration_id)).outcome
            assert outcome == getattr(pb, f"MIGRATION_OUTCOME_{end.upper()}")
        await eventually(lambda: group.said() == before, "the limit is undone")
        assert not record(world.a, guest).exists()
        await assert_settled(world, guest, world.b if end == "completed" else world.a)


async def assert_settled(world: World, guest: Guest, host: Host) -> None:
    """The guest runs there, undamaged."""

    async def settled() -> bool:
        return not (await world.machine(host, guest)).migration_id

    await eventually_async(settled, "nothing of the migration is open")
    await guest.assert_clean(host)
    await assert_never_held(host, guest)
