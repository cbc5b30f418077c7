"""One guest, many crossings: it counts without a hole over both hosts, and nothing piles up in the services."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest

from tests.integration.hosts import MIB, World
from tests.integration.qemu.conftest import boot, linux_spec
from tests.integration.qemu.leftovers import Chronicle, left_in_process
from tests.integration.services import Service, descriptors, eventually, open_trackers
from vmferry.machines.qemu.guest import verdict

pytestmark = [pytest.mark.usefixtures("tidy"), pytest.mark.timeout(180)]

ROUND_TRIPS = 10
POOLED = 8
"""Threads that pools start when they have need of them, up to their size."""
MOST_GROWTH = 64 * MIB
"""How much more memory a service may hold after nine more round trips: less than that of one machine."""


def held(service: Service) -> tuple[int, int, int]:
    """Descriptors, threads and bytes of memory of a service."""
    gc.collect()  # calls of this test that ended keep their connections until they are collected
    threads = int(service.status("Threads"))
    memory = int(service.status("VmRSS").split()[0]) * 1024
    return len(descriptors(service.pid)), threads, memory


async def assert_nothing_piled_up(world: World, before: list[tuple[int, int, int]]) -> None:
    """Every service holds what it held before: connections that are still closing are waited for."""
    await eventually(
        lambda: all(
            held(service)[0] <= old[0] and held(service)[1] <= old[1] + POOLED
            for service, old in zip(world.services, before, strict=True)
        ),
        f"descriptors and threads are hardly more than {before}",
    )
    after = [held(service) for service in world.services]
    growth = [new[2] - old[2] for new, old in zip(after, before, strict=True)]
    print("services hold (descriptors, threads, bytes):", before, "and then", after)
    assert max(growth) < MOST_GROWTH, growth
    assert [open_trackers(service.pid) for service in world.services] == [[], [], [], []]


async def test_ten_times_there_and_back(world: World, images: Path) -> None:
    """Its ticks on both hosts, put together, are one count without a hole or a repetition; its files are right."""
    guest = await boot(world, linux_spec(images, vcpus=2, writes=4, memory_mib=96))
    before: list[tuple[int, int, int]] = []
    with Chronicle(guest) as chronicle:
        chronicle.follow(world.a)
        for number in range(ROUND_TRIPS):
            for here, there in ((world.a, world.b), (world.b, world.a)):
                migration = await world.migrate(guest, here, there)
                assert migration.owner == there.identity.uri, migration
                chronicle.follow(there)
                assert here.holdings(guest.spec) == []
                await guest.wait_ticks(there, 1)
            if number == 0:
                before = [held(service) for service in world.services]
        await guest.assert_clean(world.a)
        found = verdict.verdict(chronicle.text())
    assert found.ok, found.faults
    numbers = [tick.number for tick in found.ticks]
    assert numbers == list(range(1, len(numbers) + 1))
    assert [tick.wall_s for tick in found.ticks] == sorted(tick.wall_s for tick in found.ticks)
    assert left_in_process(world.a, guest) == []
    await assert_nothing_piled_up(world, before)
