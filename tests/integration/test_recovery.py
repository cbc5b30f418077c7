"""Services, hypervisors and networks that fail at observable moments of a real migration.

Whatever fails, the guest runs on exactly one host in the end, undamaged, and can be moved again. Where the outcome
is not known it is called UNKNOWN, and nobody runs the guest until it is.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator

import pytest

from tests.integration.hosts import Guest, World
from tests.integration.hypervisors import run_state
from tests.integration.lost_handoffs import assert_paused_and_unknown, start_and_lose_go, start_slowly
from tests.integration.proxy import Proxy
from tests.integration.services import Service, eventually
from vmferry.handoff import destination
from vmferry.handoff.rights import Standing
from vmferry.machines.port import RunState
from vmferry.v1 import migration_pb2 as pb

pytestmark = pytest.mark.usefixtures("tidy")


@pytest.fixture
async def guest(world: World) -> AsyncIterator[Guest]:
    """A canary on host a, and services that all run again afterwards, so that the next test finds them."""
    guest = await world.run()
    try:
        yield guest
    finally:
        for service in world.services:
            if not service.running:
                await service.start()


async def assert_arrived(world: World, guest: Guest) -> None:
    """The guest runs at b and only there, nothing of it is left at a, and it can come back."""
    await eventually(lambda: not world.a.holdings(guest.spec), "the source has let go")
    assert world.a.ledger.rights(guest.id).standing is Standing.GONE
    await eventually(lambda: world.b.ledger.rights(guest.id).permitted, "the destination owns it")
    await world.assert_stays(guest, world.b, world.a)
    await world.assert_crosses(guest, world.b, world.a)


async def test_a_source_service_killed_in_pre_copy_gives_the_guest_back(
    world: World, guest: Guest, link: Proxy
) -> None:
    """The guest never stops; after the restart the attempt is closed at both ends and another one completes."""
    migration_id = await start_slowly(world, guest, link)
    await world.a.source.kill()
    await guest.assert_clean(world.a)
    await world.a.source.start()
    ended = await world.ended(world.a, migration_id)
    assert ended.outcome == pb.MIGRATION_OUTCOME_FAILED
    assert ended.owner == world.a.identity.uri
    await world.assert_stays(guest, world.a, world.b)
    await world.assert_crosses(guest, world.a, world.b)


async def test_a_source_service_that_stays_away_leaves_the_destination_free(
    world: World, guest: Guest, link: Proxy
) -> None:
    """Nobody tells the destination; it lets go by itself, and the guest runs on without any service."""
    migration_id = await start_slowly(world, guest, link)
    await world.a.source.kill()
    await eventually(lambda: not world.b.holdings(guest.spec), "the destination holds nothing")
    await guest.assert_clean(world.a)
    await world.a.source.start()
    assert (await world.ended(world.a, migration_id)).outcome == pb.MIGRATION_OUTCOME_FAILED
    await world.assert_stays(guest, world.a, world.b)
    await world.assert_crosses(guest, world.a, world.b)


async def test_a_destination_service_killed_in_pre_copy_fails_the_migration(
    world: World, guest: Guest, link: Proxy
) -> None:
    """The source fails it and the guest runs on; the restarted destination removes what was left."""
    # Long enough for the service to be started again, however busy this computer is.
    migration_id = await start_slowly(world, guest, link, reconnect_timeout=60.0)
    await world.b.dest.kill()
    held = world.b.holdings(guest.spec)
    assert held, "a killed service leaves its machine behind"
    await world.b.dest.start()
    link.up_bytes_per_s = None
    migration = await world.ended(world.a, migration_id)
    assert migration.outcome == pb.MIGRATION_OUTCOME_FAILED, migration
    assert migration.reason.reason == "ATTEMPT_NOT_FOUND", migration.reason
    await world.assert_stays(guest, world.a, world.b)
    await world.assert_crosses(guest, world.a, world.b)


async def test_services_that_end_in_order_give_back_what_they_can(
    world: World, guest: Guest, link: Proxy
) -> None:
    """SIGTERM in pre-copy: whichever service it is, it ends with 0, the guest runs on and nothing stays reserved."""
    for service in (world.a.source, world.b.dest):
        migration_id = await start_slowly(world, guest, link)
        assert await service.stop() == 0
        link.heal()
        if service is world.b.dest:
            migration = await world.ended(world.a, migration_id)
            assert migration.outcome == pb.MIGRATION_OUTCOME_FAILED, migration
        await guest.assert_clean(world.a)
        await eventually(lambda: not world.b.holdings(guest.spec), "the destination holds nothing")
        await service.start()
        await world.assert_stays(guest, world.a, world.b)
    await world.assert_crosses(guest, world.a, world.b)


async def test_machines_outlive_their_services(world: World, guest: Guest) -> None:
    """A guest that arrived runs on while its host has no service at all, and is found again by the next ones."""
    await world.assert_crosses(guest, world.a, world.b)
    pid = world.b.machine_pid(guest.id)
    for end in (Service.stop, Service.kill):
        await asyncio.gather(end(world.b.source), end(world.b.dest))
        await guest.assert_clean(world.b)
        await asyncio.gather(world.b.source.start(), world.b.dest.start())
        await world.assert_stays(guest, world.b, world.a)
        assert world.b.machine_pid(guest.id) == pid
    await world.assert_crosses(guest, world.b, world.a)


@pytest.mark.parametrize("answer_only", [True, False], ids=["answer", "go"])
async def test_a_lost_go_is_unknown_until_the_network_heals(
    world: World, guest: Guest, link: Proxy, answer_only: bool
) -> None:
    """While it lasts the guest is paused at the source; afterwards the migration has completed, once."""
    migration_id = await start_and_lose_go(world, guest, link, answer_only=answer_only)
    await assert_paused_and_unknown(world, guest, migration_id)
    there = world.b.ledger.rights(guest.id)
    if answer_only:
        assert there.permitted
        await guest.assert_clean(world.b)
    else:
        assert isinstance(there.incoming.current, destination.Prepared)
        assert await run_state(world.b, guest) is not RunState.RUNNING
    assert await run_state(world.a, guest) is not RunState.RUNNING
    link.heal()
    migration = await world.ended(world.a, migration_id)
    assert migration.outcome == pb.MIGRATION_OUTCOME_COMPLETED, migration
    assert migration.owner == world.b.identity.uri
    assert migration.downtime.ToNanoseconds() > 1e9  # from the pause to the answer, and that took a while
    await assert_arrived(world, guest)


@pytest.mark.parametrize("answer_only", [True, False], ids=["answer", "go"])
async def test_a_source_service_killed_after_the_hand_off_completes_it_later(
    world: World, guest: Guest, link: Proxy, answer_only: bool
) -> None:
    """What is in the journal is enough: the next start asks until it knows, and never resumes the guest here."""
    migration_id = await start_and_lose_go(world, guest, link, answer_only=answer_only)
    await world.a.source.kill()
    assert await run_state(world.a, guest) is not RunState.RUNNING
    await world.a.source.start()
    await assert_paused_and_unknown(world, guest, migration_id)
    assert await world.a.source.stop() == 0
    assert await run_state(world.a, guest) is not RunState.RUNNING
    link.heal()
    await world.a.source.start()
    ended = await world.ended(world.a, migration_id)
    assert ended.outcome == pb.MIGRATION_OUTCOME_COMPLETED
    assert ended.owner == world.b.identity.uri
    await assert_arrived(world, guest)


@pytest.mark.parametrize("answer_only", [True, False], ids=["answer", "go"])
async def test_a_destination_service_killed_at_the_hand_off_takes_over_when_it_is_back(
    world: World, guest: Guest, link: Proxy, answer_only: bool
) -> None:
    """Its prepared, or already running, copy lives on without it; after the restart the hand-off completes."""
    migration_id = await start_and_lose_go(world, guest, link, answer_only=answer_only)
    if answer_only:
        await eventually(lambda: world.b.ledger.rights(guest.id).permitted, "the destination owns it")
    await world.b.dest.kill()
    link.heal()
    await assert_paused_and_unknown(world, guest, migration_id)
    await world.b.dest.start()
    ended = await world.ended(world.a, migration_id)
    assert ended.outcome == pb.MIGRATION_OUTCOME_COMPLETED
    await assert_arrived(world, guest)


async def test_a_prepared_copy_that_dies_returns_the_right(world: World, guest: Guest, link: Proxy) -> None:
    """When the destination loses its copy before it owned it, it refuses, and the guest goes on at the source."""
    migration_id = await start_and_lose_go(world, guest, link, answer_only=False)
    await assert_paused_and_unknown(world, guest, migration_id)
    copy = world.b.record(guest.id).process
    assert copy is not None
    copy.send_signal(signal.SIGKILL)
    await eventually(
        lambda: isinstance(world.b.ledger.rights(guest.id).incoming.current, destination.Refused),
        "the destination has refused",
    )
    link.heal()
    ended = await world.ended(world.a, migration_id)
    assert ended.outcome == pb.MIGRATION_OUTCOME_FAILED
    assert ended.owner == world.a.identity.uri
    await world.assert_stays(guest, world.a, world.b)
    await world.assert_crosses(guest, world.a, world.b)


async def test_both_services_killed_at_the_hand_off_settle_it_when_they_are_back(
    world: World, guest: Guest, link: Proxy
) -> None:
    """Two journals and two hypervisors are all that is left, and all that is needed."""
    migration_id = await start_and_lose_go(world, guest, link, answer_only=False)
    await asyncio.gather(world.a.source.kill(), world.b.dest.kill())
    link.heal()
    for host in (world.a, world.b):
        assert await run_state(host, guest) is not RunState.RUNNING
    await asyncio.gather(world.a.source.start(), world.b.dest.start())
    ended = await world.ended(world.a, migration_id)
    assert ended.outcome == pb.MIGRATION_OUTCOME_COMPLETED
    await assert_arrived(world, guest)
