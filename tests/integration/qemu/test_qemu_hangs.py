"""A QEMU that stops answering for longer than every limit, and comes back: nothing is lost, nothing stays paused."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.hosts import World, open_world
from tests.integration.proxy import Proxy
from tests.integration.qemu.conftest import LinuxGuest, boot, ticker_spec
from tests.integration.qemu.leftovers import left_in_process
from tests.integration.qemu.voyages import Moment, Voyage
from tests.integration.services import Host, eventually, eventually_async, open_trackers, refusal
from vmferry.v1 import machine_pb2
from vmferry.v1 import migration_pb2 as pb

pytestmark = [pytest.mark.usefixtures("tidy"), pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
async def world(images: Path) -> AsyncIterator[World]:
    """Hosts of this module alone, with short limits."""
    limits: dict[str, Any] = {"switch_timeout_s": 1.0, "qmp_timeout_s": 3.0}
    async with open_world(image_roots=(images,), downtime_limit_ms=1000, **limits) as opened:
        yield opened


@pytest.fixture
async def voyage(world: World, images: Path, link: Proxy) -> AsyncIterator[Voyage]:
    """A guest on host a that is about to leave."""
    voyage = Voyage(world, await boot(world, ticker_spec(images)), link)
    try:
        yield voyage
    finally:
        voyage.let_go()


async def assert_well(world: World, guest: LinuxGuest, here: Host, there: Host) -> None:
    """The guest runs here and nowhere else, nobody tracks it, and it can cross."""

    async def runs() -> bool:
        machine = await world.machine(here, guest)
        return machine.state == machine_pb2.MACHINE_STATE_RUNNING and not machine.migration_id

    await eventually_async(runs, "the machine runs")
    await eventually(lambda: not there.holdings(guest.spec), "the other host holds nothing", seconds=30)
    await world.assert_stays(guest, here, there)
    assert left_in_process(here, guest) == []
    assert [open_trackers(service.pid) for service in world.services] == [[], [], [], []]
    await world.assert_crosses(guest, here, there)


async def test_a_source_that_hangs_over_the_pause_runs_on_when_it_is_back(voyage: Voyage) -> None:
    """It took the order to stop and no answer came: the migration fails as soon as the guest could go on."""
    world = voyage.world
    await voyage.hold(Moment.PAUSING)
    await told_as_waiting(voyage)
    voyage.wake()
    migration = await world.ended(world.a, voyage.id)
    assert migration.outcome == pb.MIGRATION_OUTCOME_FAILED
    assert migration.reason.reason == "TIMED_OUT"
    assert migration.owner == world.a.identity.uri
    await assert_well(world, voyage.guest, world.a, world.b)


async def test_a_source_that_hangs_after_it_paused_runs_on_when_it_is_back(voyage: Voyage) -> None:
    """It has paused its guest, and hangs before it can be resumed: whoever gave it back goes on trying."""
    world = voyage.world
    await voyage.hold(Moment.PRECOPYING)
    machine = world.a.directory.open(world.a.record(voyage.guest.id), observe=True)
    await machine.stop()
    await machine.close()
    voyage.stop_process(world.a)
    voyage.link.let_go()
    await told_as_waiting(voyage)
    async with world.source(world.a) as stub:
        error = await refusal(stub.StartMigration(world.order(voyage.guest, world.a, world.b)))
    assert error.reason == "MACHINE_BUSY"
    voyage.wake()
    migration = await world.ended(world.a, voyage.id)
    assert migration.outcome == pb.MIGRATION_OUTCOME_FAILED
    await assert_well(world, voyage.guest, world.a, world.b)


async def told_as_waiting(voyage: Voyage) -> None:
    """The machine belongs here, its hypervisor is asked again and again, and the migration says so."""
    world = voyage.world
    told = await world.reaches(
        world.a, voyage.id, lambda now: now.reason.reason == "MACHINE_FAILED", "the reason is told"
    )
    assert told.phase != pb.MIGRATION_PHASE_ENDED
    assert told.owner == world.a.identity.uri


async def test_a_source_that_hangs_while_its_service_is_killed_runs_on(voyage: Voyage) -> None:
    """The next start of the service finds a hypervisor that does not answer, and resumes the guest when it does."""
    world = voyage.world
    await voyage.hold(Moment.PAUSING)
    await world.a.source.kill()
    await world.a.source.start()
    voyage.wake()
    await assert_well(world, voyage.guest, world.a, world.b)


async def test_a_copy_that_hangs_while_it_loads_gives_the_guest_back(voyage: Voyage) -> None:
    """The source waits no longer than its limit; the copy is ended, although it does not answer."""
    world = voyage.world
    await voyage.hold(Moment.SEALED)
    migration = await world.ended(world.a, voyage.id)
    assert migration.outcome == pb.MIGRATION_OUTCOME_FAILED
    assert migration.owner == world.a.identity.uri
    await voyage.guest.wait_ticks(world.a)
    await assert_well(world, voyage.guest, world.a, world.b)


async def test_a_copy_that_hangs_at_the_hand_off_takes_over_when_it_is_back(voyage: Voyage) -> None:
    """Go is given and not answered: unknown, and the guest runs nowhere, until the copy answers again."""
    world = voyage.world
    await voyage.hold(Moment.HANDING_OFF)
    voyage.stop_process(world.b)
    voyage.link.let_go()
    unknown = await world.reaches(
        world.a, voyage.id, lambda now: now.outcome == pb.MIGRATION_OUTCOME_UNKNOWN, "UNKNOWN"
    )
    assert unknown.owner == ""
    voyage.wake()
    migration = await world.ended(world.a, voyage.id)
    assert migration.outcome == pb.MIGRATION_OUTCOME_COMPLETED
    await assert_well(world, voyage.guest, world.b, world.a)


async def test_a_source_that_hangs_when_it_is_released_is_ended(voyage: Voyage) -> None:
    """What does not answer is killed: the guest runs where it went, and nothing is left where it was."""
    world = voyage.world
    await voyage.hold(Moment.RELEASING)
    await voyage.guest.wait_ticks(world.b)
    migration = await world.ended(world.a, voyage.id)
    assert migration.outcome == pb.MIGRATION_OUTCOME_COMPLETED
    await assert_well(world, voyage.guest, world.b, world.a)
