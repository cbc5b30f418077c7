"""Many machines that cross one link at once, and one with as many lanes as there may be: shares, and memory.

The link between the hosts is a real queue of the kernel, and whatever has a size has its default size.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager

import pytest

from tests.integration.hosts import MIB, Guest, World, open_world
from tests.integration.network import Network, switched_hosts
from vmferry.bench.usage import Usage
from vmferry.v1 import migration_pb2 as pb

TOGETHER = 10
RESIDENT_MIB = 32
LINK_MBIT = 500
SLOW_MBIT = 20
CRAWL = 262_144
"""Bytes a second at which the first ones wait for the last."""
MEMORY_OF_TEN_MIB = 600
MEMORY_OF_ONE_MIB = 200
LEAST_MEMORY_MIB = 20
"""A service that has less was not looked at."""
MOST_LANES = 16
WORTH_COMPARING = 16 * MIB
"""For ten; less says nothing."""
LEAST_EVENNESS = 0.85
"""Jain's index of shares: 1 if all are the same, 1/n if one has everything; two of ten without any leave 0.8."""
LEAST_SHARE = 0.3
"""Of what everybody would have if all had the same."""


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    """Two hosts with a wire between them."""
    with switched_hosts(taps=False) as opened:
        yield opened


@pytest.fixture(scope="module")
async def world(network: Network) -> AsyncIterator[World]:
    """Services on it that let so many machines leave and arrive at a time."""
    async with open_world(places=network.places, max_outgoing=TOGETHER, max_incoming=TOGETHER) as opened:
        yield opened


@contextmanager
def memory_of_services(world: World) -> Iterator[list[float]]:
    """What each of the two services on the way has at most, in MiB; there at the end."""
    found: list[float] = []
    watched = [Usage((), [service.pid]) for service in (world.a.source, world.b.dest)]
    try:
        yield found
    finally:
        for usage in watched:
            usage.stop()
            found.append(usage.peak_mib or 0)


class Shares:
    """How much each of several migrations sends, as long as all of them have more to send."""

    def __init__(self, migrations: Sequence[str]) -> None:
        self._sent = dict.fromkeys(migrations, 0)
        self._begin: dict[str, int] = {}
        self._over = False

    def note(self, migration: pb.Migration) -> None:
        """Take notice of how one stands."""
        self._over = self._over or migration.phase > pb.MIGRATION_PHASE_PRECOPYING
        if not self._over:
            self._sent[migration.id] = migration.progress.sent_bytes
            if not self._begin and all(self._sent.values()):
                self._begin = dict(self._sent)

    @property
    def bytes(self) -> list[int]:
        """What each has sent in that time."""
        assert self._begin, f"they never were under way together: {self._sent}"
        return [sent - self._begin[one] for one, sent in self._sent.items()]


def evenness(shares: Sequence[int]) -> float:
    """Jain's index."""
    return sum(shares) ** 2 / (len(shares) * sum(share**2 for share in shares))


async def calm(world: World, resident_mib: int) -> Guest:
    """A guest that checks itself, and leaves the processors to others."""
    params = {"resident-mib": str(resident_mib), "tick-us": "100000"}
    return await world.run(memory_mib=resident_mib + 8, params=params)


async def lift(world: World, migrations: Sequence[str]) -> None:
    """Let migrations have as much of the link as they get."""
    async with world.source(world.a) as stub:
        requests = [pb.UpdateMigrationRequest(id=one, max_bandwidth=0) for one in migrations]
        await asyncio.gather(*map(stub.UpdateMigration, requests))


async def watch(world: World, migration_id: str, shares: Shares) -> pb.Migration:
    """Follow one to its end."""
    async with world.source(world.a) as stub:
        async for answer in stub.WatchMigration(pb.WatchMigrationRequest(id=migration_id)):
            shares.note(answer.migration)
    return answer.migration


async def all_under_way(world: World, guests: Sequence[Guest], **options: int) -> list[str]:
    """Migrations of all, each with something on the wire and held back there."""
    started = [await world.start(guest, world.a, world.b, max_bandwidth=CRAWL, **options) for guest in guests]
    for one in started:
        await world.reaches(
            world.a, one, lambda now: now.progress.sent_bytes > 0, "memory of it is on its way"
        )
    return started


async def test_as_many_lanes_as_there_may_be_need_no_more_memory(world: World) -> None:
    """Each service stays below what one migration may need, with sixteen lanes and a larger guest."""
    guest = await calm(world, 192)
    with memory_of_services(world) as peaks:
        await world.assert_crosses(guest, world.a, world.b, lanes=MOST_LANES)
    assert min(peaks) > LEAST_MEMORY_MIB
    assert max(peaks) < MEMORY_OF_ONE_MIB, peaks


async def test_ten_at_once_share_the_link_and_stay_small(world: World, network: Network) -> None:
    """While all have memory to send none is starved; each arrives whole; two services need no more than promised."""
    guests = await asyncio.gather(*(calm(world, RESIDENT_MIB) for _ in range(TOGETHER)))
    wire = network.wires["b"]
    wire.shape(SLOW_MBIT)
    with memory_of_services(world) as peaks:
        started = await all_under_way(world, guests)
        await lift(world, started)
        shares = Shares(started)
        watching = [asyncio.create_task(watch(world, one, shares)) for one in started]
        wire.shape(LINK_MBIT)
        async with asyncio.timeout(100):
            ended = await asyncio.gather(*watching)
    wire.shape(None)
    for guest, migration in zip(guests, ended, strict=True):
        assert migration.outcome == pb.MIGRATION_OUTCOME_COMPLETED, migration
        await guest.assert_clean(world.b)
    sent = shares.bytes
    assert sum(peaks) < MEMORY_OF_TEN_MIB, peaks
    assert sum(sent) > WORTH_COMPARING, sent
    assert evenness(sent) > LEAST_EVENNESS, sent
    assert min(sent) > LEAST_SHARE * sum(sent) / len(sent), sent
