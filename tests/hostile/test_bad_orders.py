"""Migrations that cannot, or must not, come to their end: limits, hosts that are full, guests that write too fast.

After each the guest runs on at the source, undamaged, the destination holds nothing, and the next migration
completes.
"""

from __future__ import annotations

import asyncio
import re
import signal
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.integration.hosts import Guest, World, configured
from tests.integration.proxy import Proxy
from tests.integration.services import eventually, refusal
from vmferry.machines.process import ProcessIdentity
from vmferry.v1 import migration_pb2 as pb

pytestmark = pytest.mark.usefixtures("tidy")

SLOW = 3e6
"""Bytes per second that keep a small guest in pre-copy for a second or two."""


@pytest.fixture
async def guest(world: World) -> AsyncIterator[Guest]:
    """A canary on host a that is still clean afterwards, and crosses."""
    guest = await world.run()
    yield guest
    await world.assert_stays(guest, world.a, world.b)
    await world.assert_crosses(guest, world.a, world.b)


async def start_slowly(world: World, guest: Guest, link: Proxy, **options: Any) -> str:
    """A migration that is in pre-copy when this returns, and will be for a while."""
    link.up_bytes_per_s = SLOW
    link.begin_migration()
    migration_id = await world.start(guest, world.a, world.b, address=link.address, **options)
    await world.enters(world.a, migration_id, pb.MIGRATION_PHASE_PRECOPYING)
    return migration_id


async def assert_failed(world: World, migration_id: str, reason: str) -> pb.Migration:
    migration = await world.ended(world.a, migration_id)
    assert migration.outcome == pb.MIGRATION_OUTCOME_FAILED, migration
    assert migration.reason.reason == reason, migration.reason
    assert migration.reason.message
    assert migration.reason.remedy
    assert migration.owner == world.a.identity.uri
    return migration


async def cancel(world: World, migration_id: str) -> pb.Migration:
    async with world.source(world.a) as stub:
        return (await stub.CancelMigration(pb.CancelMigrationRequest(id=migration_id))).migration


async def test_a_cancelled_migration_gives_the_guest_back(world: World, guest: Guest, link: Proxy) -> None:
    """In pre-copy, cancelling ends the migration as CANCELLED; cancelling it again, later, changes nothing."""
    migration_id = await start_slowly(world, guest, link)
    for _ in range(3):
        await cancel(world, migration_id)
    ended = await world.ended(world.a, migration_id)
    assert ended.outcome == pb.MIGRATION_OUTCOME_CANCELLED
    assert ended.reason.reason == "CANCELLED"
    assert await cancel(world, migration_id) == ended


async def test_cancelling_at_any_moment_gives_the_guest_back_or_comes_too_late(world: World) -> None:
    """Whenever it comes, a cancellation leaves the guest at exactly one host, running."""
    guest = await world.run()
    here, there = world.a, world.b
    outcomes = set()
    for delay_ms in (0, 20, 60, 120, 250, 350, 450, 600):
        migration_id = await world.start(guest, here, there)
        await asyncio.sleep(delay_ms / 1000)
        async with world.source(here) as stub:
            call = stub.CancelMigration(pb.CancelMigrationRequest(id=migration_id))
            (answer,) = await asyncio.gather(call, return_exceptions=True)
        if isinstance(answer, BaseException):
            assert "the hand-off has begun" in str(answer)
        ended = await world.ended(here, migration_id)
        outcomes.add(ended.outcome)
        if ended.outcome == pb.MIGRATION_OUTCOME_COMPLETED:
            await world.assert_stays(guest, there, here)
            here, there = there, here
        else:
            assert ended.outcome == pb.MIGRATION_OUTCOME_CANCELLED
            await world.assert_stays(guest, here, there)
    assert pb.MIGRATION_OUTCOME_CANCELLED in outcomes
    await world.assert_crosses(guest, here, there)


async def test_a_completed_migration_cannot_be_cancelled(world: World) -> None:
    """After the end, cancelling answers with the migration as it ended."""
    guest = await world.run()
    migration = await world.assert_crosses(guest, world.a, world.b)
    assert await cancel(world, migration.id) == migration
    await world.assert_stays(guest, world.b, world.a)


async def test_a_busy_machine_is_told_so(world: World, guest: Guest, link: Proxy) -> None:
    """While a migration is open a second one is refused by name, and the plan says why."""
    migration_id = await start_slowly(world, guest, link)
    async with world.source(world.a) as stub:
        order = world.order(guest, world.a, world.b)
        assert (await refusal(stub.StartMigration(order))).reason == "MACHINE_BUSY"
        plan = pb.PlanMigrationRequest(machine=guest.id, destination=order.destination)
        report = (await stub.PlanMigration(plan)).report
    assert not report.compatible
    assert "machine.busy" in {item.id for item in report.items}
    await cancel(world, migration_id)
    await world.ended(world.a, migration_id)


async def test_a_host_lets_only_so_many_leave(world: World, guest: Guest, link: Proxy) -> None:
    """One more than max_outgoing waits, one more than max_queued is refused by name; the open one goes on."""
    other, third = await world.run(), await world.run()
    async with configured(world.a.source, max_outgoing=1, max_queued=1):
        migration_id = await start_slowly(world, guest, link)
        waiting = await world.start(other, world.a, world.b)
        queued = await world.state(world.a, waiting)
        assert (queued.phase, queued.queue.position) == (pb.MIGRATION_PHASE_QUEUED, 1)
        assert "max_outgoing" in queued.queue.waits_for
        async with world.source(world.a) as stub:
            error = await refusal(stub.StartMigration(world.order(third, world.a, world.b)))
        assert error.reason == "TOO_MANY_MIGRATIONS"
        assert error.metadata["limit"] == "max_queued"
        await cancel(world, migration_id)
        await world.ended(world.a, migration_id)
        assert (await world.ended(world.a, waiting)).outcome == pb.MIGRATION_OUTCOME_COMPLETED
    await world.assert_crosses(third, world.a, world.b)


async def test_a_host_takes_in_only_so_many(world: World, link: Proxy) -> None:
    """One more than max_incoming waits until the open one has completed, and then crosses."""
    guest, other = await world.run(), await world.run()
    async with configured(world.b.dest, max_incoming=1):
        migration_id = await start_slowly(world, other, link)
        waiting = await world.start(guest, world.a, world.b)
        queued = await world.reaches(
            world.a, waiting, lambda now: now.queue.tries, "the destination said that it is full"
        )
        assert queued.phase == pb.MIGRATION_PHASE_QUEUED
        assert world.b.identity.uri in queued.queue.waits_for
        link.up_bytes_per_s = None
        assert (await world.ended(world.a, migration_id)).outcome == pb.MIGRATION_OUTCOME_COMPLETED
        migration = await world.ended(world.a, waiting)
        assert migration.outcome == pb.MIGRATION_OUTCOME_COMPLETED, migration
        assert migration.timings[0].phase == pb.MIGRATION_PHASE_QUEUED


async def test_two_that_ask_at_once_both_arrive(world: World) -> None:
    """Where one has room and both have seen it, the second one waits, whatever it has begun, and goes then."""
    guests = [await world.run(), await world.run()]
    async with configured(world.b.dest, max_incoming=1):
        started = [world.start(guest, world.a, world.b) for guest in guests]
        ended = [await world.ended(world.a, one) for one in await asyncio.gather(*started)]
        assert [one.outcome for one in ended] == [pb.MIGRATION_OUTCOME_COMPLETED] * 2, ended
        for guest in guests:
            await world.assert_stays(guest, world.b, world.a)


async def test_a_guest_that_writes_too_fast_is_never_paused_for_long(world: World, link: Proxy) -> None:
    """When it does not converge the migration ends by name instead, and the guest has seen no pause."""
    params = {"resident-mib": "4", "dirty-mib-per-s": "100", "working-set-mib": "2"}
    guest = await world.run(params=params)
    link.up_bytes_per_s = 20e6
    migration_id = await world.start(guest, world.a, world.b, address=link.address, downtime_limit=0.03)
    migration = await assert_failed(world, migration_id, "NOT_CONVERGING")
    assert migration.progress.round > 2
    assert migration.progress.dirty_bytes_per_second > 0
    assert not any(timing.phase == pb.MIGRATION_PHASE_SWITCHING for timing in migration.timings)
    await world.assert_stays(guest, world.a, world.b)
    await world.assert_crosses(guest, world.a, world.b)


async def test_a_destination_that_stands_still_is_noticed(world: World, guest: Guest, link: Proxy) -> None:
    """A destination service that is stopped in pre-copy ends the migration by the stall limit; it recovers."""
    migration_id = await start_slowly(world, guest, link, stall_timeout=0.5)
    world.b.dest.signal(signal.SIGSTOP)
    try:
        await assert_failed(world, migration_id, "TIMED_OUT")
        await guest.assert_clean(world.a)
    finally:
        world.b.dest.signal(signal.SIGCONT)


async def test_a_network_that_swallows_everything_is_noticed(world: World, guest: Guest, link: Proxy) -> None:
    """A black hole in pre-copy ends the migration by the stall limit, and the destination lets go by itself."""
    migration_id = await start_slowly(world, guest, link, stall_timeout=0.5)
    link.silence()
    migration = await assert_failed(world, migration_id, "TIMED_OUT")
    assert "0.5" in migration.reason.message


@pytest.mark.parametrize("limit", ["reserve_timeout", "total_timeout"])
async def test_a_limit_that_is_over_ends_the_migration(
    world: World, guest: Guest, link: Proxy, limit: str
) -> None:
    """Reserving, and the whole, may take as long as was said and no longer."""
    link.up_bytes_per_s = SLOW
    seconds = {"reserve_timeout": 0.001, "total_timeout": 0.8}[limit]
    options = {limit: seconds}
    migration_id = await world.start(guest, world.a, world.b, address=link.address, **options)
    await assert_failed(world, migration_id, "TIMED_OUT")


@pytest.mark.parametrize("side", ["here", "there"])
async def test_a_hypervisor_that_dies_in_pre_copy_is_told_so(world: World, link: Proxy, side: str) -> None:
    """Killed at the source, the machine is dead and nothing of it stays; killed at the destination, no harm."""
    guest = await world.run()
    migration_id = await start_slowly(world, guest, link)
    host = {"here": world.a, "there": world.b}[side]
    process = host.record(guest.id).process
    assert isinstance(process, ProcessIdentity)
    assert process.send_signal(signal.SIGKILL)
    link.up_bytes_per_s = None
    if side == "there":
        migration = await world.ended(world.a, migration_id)
        assert migration.outcome == pb.MIGRATION_OUTCOME_FAILED, migration
        # Who notices first decides: the question before the pause, or the destination's own look at its copies.
        assert migration.reason.reason in {"MACHINE_DEAD", "STALE_ATTEMPT"}, migration.reason
        assert re.search("died|closed", migration.reason.message)
        await world.assert_stays(guest, world.a, world.b)
        await world.assert_crosses(guest, world.a, world.b)
        return
    await assert_failed(world, migration_id, "MACHINE_DEAD")
    await eventually(lambda: not world.b.holdings(guest.spec), "the destination holds nothing")
    assert not world.b.ledger.rights(guest.id).permitted
    other = await world.run()
    await world.assert_crosses(other, world.a, world.b)
