"""Two hosts in network namespaces, with a wire between them that tests break, and faults at random moments.

Promise: every fault is real (a cable that is pulled, packets that vanish, connections that the kernel resets, a rate)
and decided by a seed; wires are healed and namespaces vanish at the end, however it comes.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from tests.integration.hosts import MIB, Guest, World, open_world
from tests.integration.network import Network, Wire, switched_hosts
from tests.integration.services import Host, Place
from vmferry.v1 import migration_pb2 as pb

WINDOW_BYTES = 4 * MIB
LANES = 4
SLOW_MBIT = 40
RESIDENT_MIB = 24
"""Takes some seconds at that rate."""


@dataclass
class Broken:
    """Two hosts with a network between them that is to be broken."""

    world: World
    network: Network

    @property
    def wire(self) -> Wire:
        """The one to the destination of machines that leave host a."""
        return self.network.wires["b"]

    async def guest(self) -> Guest:
        """A canary with enough memory to be on its way for a while."""
        return await self.world.run(memory_mib=64, params={"resident-mib": str(RESIDENT_MIB)})

    async def tidy(self) -> None:
        """Heal everything and end all machines; fails if anything of them, or of a service, is left or missing."""
        for wire in self.network.wires.values():
            wire.shape(None)
            wire.heal()
        left = await self.world.end_guests()
        assert not left, left
        assert all(service.running for service in self.world.services), "a service has ended"

    def break_down(self) -> None:
        """Reset every connection, and let none be made."""
        self.wire.reset()
        self.wire.unplug()

    async def in_the_middle(self, guest: Guest, **options: object) -> str:
        """Start a migration over a slow link that has sent a part of its memory; returns its id."""
        self.wire.shape(SLOW_MBIT)
        world = self.world
        migration_id = await world.start(guest, world.a, world.b, lanes=LANES, **options)
        await world.reaches(
            world.a, migration_id, lambda now: now.progress.sent_bytes > 2 * MIB, "a part of memory is sent"
        )
        return migration_id


def lost(now: pb.Migration) -> bool:
    """Whether no lane has a connection."""
    return now.progress.HasField("disconnected_since")


def assert_little_was_repeated(migration: pb.Migration) -> None:
    """No break costs more than the window of the lane that it met."""
    progress, lanes = migration.progress, migration.options.lanes
    assert progress.repeated_bytes <= progress.reconnects * (WINDOW_BYTES // lanes + 1024)


@contextlib.asynccontextmanager
async def broken_hosts(**settings: Any) -> AsyncIterator[Broken]:
    """Hosts a and b in namespaces."""
    values: dict[str, Any] = {
        "window_bytes": WINDOW_BYTES,
        "chunk_bytes": 256 * 1024,
        "reconnect_timeout_s": 40.0,
    }
    with switched_hosts(taps=False) as network:
        async with open_world(places=network.places, **(values | settings)) as world:
            yield Broken(world, network)


Fault = Callable[[Wire, Place, random.Random], None]


def _unplug(wire: Wire, _peer: Place, _rng: random.Random) -> None:
    wire.unplug()


def _swallow(wire: Wire, _peer: Place, rng: random.Random) -> None:
    to_host, from_host = rng.choice(((True, True), (True, False), (False, True)))
    wire.swallow(to_host=to_host, from_host=from_host)


def _swallow_one(wire: Wire, peer: Place, rng: random.Random) -> None:
    ports = wire.ports(peer)
    if ports:
        wire.swallow_from_port(rng.choice(ports))


def _reset_all(wire: Wire, _peer: Place, _rng: random.Random) -> None:
    wire.reset()


def _reset_one(wire: Wire, peer: Place, rng: random.Random) -> None:
    ports = wire.ports(peer)
    if ports:
        wire.reset(rng.choice(ports))


def _break_down(wire: Wire, _peer: Place, _rng: random.Random) -> None:
    wire.reset()
    wire.unplug()


def _crawl(wire: Wire, _peer: Place, rng: random.Random) -> None:
    wire.throttle(rng.randint(1, 8))


FAULTS: dict[str, Fault] = {
    "unplugged": _unplug,
    "black hole": _swallow,
    "one path dead": _swallow_one,
    "all reset": _reset_all,
    "one reset": _reset_one,
    "broken down": _break_down,
    "crawling": _crawl,
}


@dataclass
class Story:
    """What happened in one migration over a disturbed link."""

    migration: pb.Migration
    faults: list[str]

    @property
    def completed(self) -> bool:
        """Whether the machine has crossed."""
        return self.migration.outcome == pb.MIGRATION_OUTCOME_COMPLETED

    @property
    def given_back_rightly(self) -> bool:
        """Whether it failed where a broken link may end a migration: before it was begun, or in the guest's pause."""
        phases = {timing.phase for timing in self.migration.timings}
        begun = pb.MIGRATION_PHASE_RESERVING in phases
        return self.migration.outcome == pb.MIGRATION_OUTCOME_FAILED and (
            not begun or pb.MIGRATION_PHASE_SWITCHING in phases
        )

    def __str__(self) -> str:
        progress = self.migration.progress
        last = (
            pb.MigrationPhase.Name(self.migration.timings[-1].phase).removeprefix("MIGRATION_PHASE_").lower()
        )
        return (
            f"{'completed' if self.completed else f'given back while {last}: {self.migration.reason.message}'}; "
            f"{', '.join(self.faults)}; {progress.reconnects} lanes reopened, "
            f"{progress.repeated_bytes} bytes sent twice, downtime {self.migration.downtime.ToMilliseconds()} ms"
        )


async def disturbed(
    broken: Broken,
    rng: random.Random,
    guest: Guest,
    here: Host,
    there: Host,
    *,
    longest_s: float,
    mbit: int = SLOW_MBIT,
    **options: Any,
) -> Story:
    """Migrate over a slow link to which things happen at random moments; it is healed, and what follows awaited."""
    wire = broken.network.wires[there.name]
    wire.shape(mbit)
    faults: list[str] = []
    migration_id = await broken.world.start(guest, here, there, **options)
    for _ in range(rng.choice((1, 1, 2))):
        kind, after_s, for_s = rng.choice(list(FAULTS)), rng.uniform(0, 4.0), rng.uniform(0.05, longest_s)
        await asyncio.sleep(after_s)  # the moment is the random input, nothing is awaited
        now = await broken.world.state(here, migration_id)
        phase = pb.MigrationPhase.Name(now.phase).removeprefix("MIGRATION_PHASE_").lower()
        faults.append(f"{kind} for {for_s:.1f} s while {phase}")
        FAULTS[kind](wire, here.place, rng)
        await asyncio.sleep(for_s)
        wire.heal()
    wire.shape(None)
    async with asyncio.timeout(120), broken.world.source(here) as stub:
        async for answer in stub.WatchMigration(pb.WatchMigrationRequest(id=migration_id)):
            migration = answer.migration
    return Story(migration, faults)


async def assert_right(broken: Broken, guest: Guest, here: Host, there: Host, story: Story) -> None:
    """There is exactly one copy of the machine, undamaged, where it must be; little was sent twice."""
    world, migration = broken.world, story.migration
    assert_little_was_repeated(migration)
    if story.completed:
        assert here.holdings(guest.spec) == []
        assert not here.ledger.rights(guest.id).permitted
        assert there.ledger.rights(guest.id).permitted
        await guest.assert_clean(there)
    else:
        assert story.given_back_rightly, migration
        await world.assert_stays(guest, here, there)
