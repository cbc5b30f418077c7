"""Whoever is killed, in whatever phase of a crossing: one copy runs or none, and everybody says the same about it.

Afterwards nothing is left where the machine is not, and where it lives it can be moved again.
"""

from __future__ import annotations

import enum
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.integration.hosts import Bystander, World, open_world
from tests.integration.proxy import Proxy
from tests.integration.qemu.conftest import LinuxGuest, boot, ticker_spec
from tests.integration.qemu.leftovers import left_in_process
from tests.integration.qemu.voyages import Moment, Voyage
from tests.integration.services import Host, Service, eventually, eventually_async, open_trackers
from vmferry.v1 import machine_pb2
from vmferry.v1 import migration_pb2 as pb

pytestmark = [pytest.mark.usefixtures("tidy"), pytest.mark.timeout(300)]


class Victim(enum.StrEnum):
    """Who is killed."""

    SOURCE_QEMU = "source's QEMU"
    DEST_QEMU = "destination's QEMU"
    SOURCE = "source service"
    DEST = "destination service"


class Fate(enum.Enum):
    """Where the machine is afterwards."""

    RUNS_HERE = "it runs where it was"
    RUNS_THERE = "it runs where it went"
    DEAD_HERE = "it died where it was"
    DEAD_THERE = "it died where it went"


def fates() -> list[tuple[Moment, Victim, Fate]]:
    """What has to become of the machine."""
    found = []
    for moment in Moment:
        before = moment in {Moment.NEGOTIATING, Moment.RESERVING, Moment.PRECOPYING, Moment.PAUSING}
        # Sealed, the destination can have all that is needed, and hands it over to itself if it is the last.
        of_source_qemu = Fate.DEAD_HERE if before else Fate.RUNS_THERE
        given_up = moment in {Moment.HANDING_OFF, Moment.RELEASING}
        service = Fate.RUNS_THERE if given_up else Fate.RUNS_HERE
        found += [
            (moment, Victim.SOURCE_QEMU, of_source_qemu),
            (moment, Victim.SOURCE, service),
            (moment, Victim.DEST, service),
        ]
        if moment is not Moment.NEGOTIATING:
            over = moment is Moment.RELEASING
            found.append((moment, Victim.DEST_QEMU, Fate.DEAD_THERE if over else Fate.RUNS_HERE))
    return found


@pytest.fixture(scope="module")
async def world(images: Path) -> AsyncIterator[World]:
    """Hosts of this module alone, whose services are killed again and again."""
    async with open_world(image_roots=(images,), downtime_limit_ms=1000) as opened:
        yield opened


@pytest.fixture
async def voyage(world: World, images: Path, link: Proxy) -> AsyncIterator[Voyage]:
    """A guest on host a that is about to leave, the one of the test before if it lived; services run afterwards."""
    spared, world.bystander = world.bystander, None
    guest = spared.guest if spared else await boot(world, ticker_spec(images))
    assert isinstance(guest, LinuxGuest)
    voyage = Voyage(world, guest, link)
    try:
        yield voyage
    finally:
        voyage.let_go()
        for service in world.services:
            if not service.running:
                await service.start()


async def kill(voyage: Voyage, victim: Victim) -> None:
    """End it without notice."""
    world = voyage.world
    if victim in {Victim.SOURCE, Victim.DEST}:
        await (world.a.source if victim is Victim.SOURCE else world.b.dest).kill()
        return
    process = voyage.process(world.a if victim is Victim.SOURCE_QEMU else world.b)
    process.send_signal(signal.SIGKILL)
    assert await process.wait_ended(5.0)


@pytest.mark.parametrize(
    ("moment", "victim", "fate"), fates(), ids=[f"{moment}-{victim}" for moment, victim, _ in fates()]
)
async def test_a_kill_at_any_moment_leaves_one_copy_or_none(
    voyage: Voyage, moment: Moment, victim: Victim, fate: Fate
) -> None:
    """The machine is where it has to be, both hosts say so, and it goes there and back from where it is."""
    world, guest = voyage.world, voyage.guest
    await voyage.hold(moment)
    await kill(voyage, victim)
    voyage.let_go()
    for service in (world.a.source, world.b.dest):
        if not service.running:
            await service.start()
    await ended(voyage, victim, fate)
    here, there = (world.a, world.b) if fate in {Fate.RUNS_HERE, Fate.DEAD_HERE} else (world.b, world.a)
    if fate in {Fate.DEAD_HERE, Fate.DEAD_THERE}:
        await assert_dead(world, guest, here, there)
        return
    await eventually(lambda: not there.holdings(guest.spec), "the other host holds nothing")
    await settled(world, guest, here)
    await world.assert_stays(guest, here, there)
    assert left_in_process(here, guest) == []
    assert [open_trackers(service.pid) for service in world.services] == [[], [], [], []]
    await world.assert_crosses(guest, here, there)
    if here is world.a:
        await world.assert_crosses(guest, there, here)
    world.bystander = Bystander(world, guest, world.a, world.b)


async def ended(voyage: Voyage, victim: Victim, fate: Fate) -> None:
    """The migration comes to the end that fits the machine's fate."""
    world = voyage.world
    if victim is Victim.SOURCE and not await known(world.a.source, voyage):
        return  # nothing was open any more, or not yet, when the service was killed
    migration = await world.ended(world.a, voyage.id)
    if fate in {Fate.RUNS_THERE, Fate.DEAD_THERE}:
        assert migration.outcome == pb.MIGRATION_OUTCOME_COMPLETED, migration
        assert migration.owner == world.b.identity.uri
    else:
        assert migration.outcome == pb.MIGRATION_OUTCOME_FAILED, migration
        assert migration.owner == world.a.identity.uri
        assert migration.reason.message
        assert migration.reason.remedy


async def known(service: Service, voyage: Voyage) -> bool:
    """Whether the source knows the migration after its restart."""
    async with voyage.world.source(service.host) as stub:
        answer = await stub.ListMigrations(pb.ListMigrationsRequest(), timeout=5.0)
    return voyage.id in [migration.id for migration in answer.migrations]


async def settled(world: World, guest: LinuxGuest, here: Host) -> None:
    """Nothing is open for the machine, and it runs."""

    async def runs() -> bool:
        machine = await world.machine(here, guest)
        return machine.state == machine_pb2.MACHINE_STATE_RUNNING and not machine.migration_id

    await eventually_async(runs, "the machine runs")


async def assert_dead(world: World, guest: LinuxGuest, here: Host, there: Host) -> None:
    """It is told as dead where it was last; the other host holds nothing and may not run it."""
    machine = await world.machine(here, guest)
    assert machine.state == machine_pb2.MACHINE_STATE_DEAD
    assert machine.right == machine_pb2.MACHINE_RIGHT_OWNED
    assert machine.migration_id == ""
    await eventually(lambda: not there.holdings(guest.spec), "the other host holds nothing")
    assert not there.ledger.rights(guest.id).permitted
    assert [open_trackers(service.pid) for service in world.services] == [[], [], [], []]
