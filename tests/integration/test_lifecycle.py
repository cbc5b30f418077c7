"""A migration's whole life: cancelled in each phase, switched by hand, over by its deadline, and told after a kill.

A service is held at a named place while the test acts, so that the phase is certain.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import grpc.aio
import pytest

from tests.integration.hosts import Guest, World, open_world
from tests.integration.places import armed, halted
from tests.integration.services import DEADLINE_S, eventually, refusal
from vmferry.v1 import migration_pb2 as pb

pytestmark = pytest.mark.usefixtures("tidy")

COMPLETED, FAILED, CANCELLED = (
    pb.MIGRATION_OUTCOME_COMPLETED,
    pb.MIGRATION_OUTCOME_FAILED,
    pb.MIGRATION_OUTCOME_CANCELLED,
)


@pytest.fixture(scope="module")
async def world() -> AsyncIterator[World]:
    """Hosts whose limits are longer than a test holds one of them."""
    limits = {"rpc_timeout_s": 10.0, "switch_timeout_s": 15.0, "receive_timeout_s": 15.0}
    async with open_world(**limits) as opened:
        yield opened


@pytest.fixture
async def guest(world: World) -> AsyncIterator[Guest]:
    """A canary on host a; afterwards all services run."""
    guest = await world.run()
    try:
        yield guest
    finally:
        for service in world.services:
            service.environment.clear()
            if not service.running:
                await service.start()
            elif halted(service):
                service.resume()


async def cancel(world: World, migration_id: str) -> pb.Migration:
    """Cancel a migration on host a."""
    async with world.source(world.a) as stub:
        request = pb.CancelMigrationRequest(id=migration_id)
        return (await stub.CancelMigration(request, timeout=DEADLINE_S)).migration


async def switch_now(world: World, migration_id: str) -> pb.Migration:
    """Have it switched."""
    async with world.source(world.a) as stub:
        request = pb.SwitchNowRequest(id=migration_id)
        return (await stub.SwitchNow(request, timeout=DEADLINE_S)).migration


@pytest.mark.parametrize(
    ("place", "phase"),
    [
        ("dest.recorded.accepted", pb.MIGRATION_PHASE_RESERVING),
        ("dest.loaded", pb.MIGRATION_PHASE_SWITCHING),
    ],
)
async def test_cancelled_before_the_hand_off(
    world: World, guest: Guest, place: str, phase: pb.MigrationPhase.ValueType
) -> None:
    """Up to the last moment before the hand-off the guest stays here, and its next migration completes."""
    async with armed(world, place, "stop") as service:
        migration_id = await world.start(guest, world.a, world.b)
        await eventually(lambda: halted(service), f"the destination is held at {place}")
        await world.enters(world.a, migration_id, phase)
        await cancel(world, migration_id)
        service.resume()
    ended = await world.ended(world.a, migration_id)
    assert (ended.outcome, ended.reason.reason) == (CANCELLED, "CANCELLED")
    assert ended.owner == world.a.identity.uri
    await world.assert_stays(guest, world.a, world.b)
    await world.assert_crosses(guest, world.a, world.b)


async def test_cancelled_while_it_copies(world: World, guest: Guest) -> None:
    """In pre-copy the guest has noticed nothing, and nothing is left at the other side."""
    migration_id = await world.start(guest, world.a, world.b, max_bandwidth=300_000)
    await world.enters(world.a, migration_id, pb.MIGRATION_PHASE_PRECOPYING)
    await cancel(world, migration_id)
    assert (await world.ended(world.a, migration_id)).outcome == CANCELLED
    await world.assert_stays(guest, world.a, world.b)


async def test_cancelled_while_it_negotiates(world: World, guest: Guest) -> None:
    """A destination that does not answer keeps nobody from cancelling."""
    world.b.dest.hold()
    try:
        migration_id = await world.start(guest, world.a, world.b)
        await world.enters(world.a, migration_id, pb.MIGRATION_PHASE_NEGOTIATING)
        await cancel(world, migration_id)
        assert (await world.ended(world.a, migration_id)).outcome == CANCELLED
    finally:
        world.b.dest.resume()
    await world.assert_stays(guest, world.a, world.b)


async def test_killed_while_it_negotiates(world: World, guest: Guest) -> None:
    """What had left the queue is not begun again by itself after a restart, although no journal knows of it."""
    world.b.dest.hold()
    try:
        migration_id = await world.start(guest, world.a, world.b)
        await world.enters(world.a, migration_id, pb.MIGRATION_PHASE_NEGOTIATING)
        await world.a.source.kill()
        await world.a.source.start()
        ended = await world.ended(world.a, migration_id)
        assert (ended.outcome, ended.reason.reason) == (FAILED, "WRONG_PHASE")
        assert "restarted" in ended.reason.message
    finally:
        world.b.dest.resume()
    await world.assert_stays(guest, world.a, world.b)


async def test_too_late_once_the_hand_off_has_begun(world: World, guest: Guest) -> None:
    """Neither a caller nor a deadline can end it any more, and both are told so by name; it completes."""
    async with armed(world, "dest.recording.owned", "stop") as service:
        migration_id = await world.start(guest, world.a, world.b)
        await world.enters(world.a, migration_id, pb.MIGRATION_PHASE_HANDING_OFF)
        await eventually(lambda: halted(service), "the destination is about to own it")
        async with world.source(world.a) as stub:
            late = stub.CancelMigration(pb.CancelMigrationRequest(id=migration_id))
            assert (await refusal(late)).reason == "POINT_OF_NO_RETURN"
            update = pb.UpdateMigrationRequest(id=migration_id)
            update.deadline.FromDatetime(datetime.now(UTC) + timedelta(milliseconds=10))
            assert (await refusal(stub.UpdateMigration(update))).reason == "WRONG_PHASE"
        await switch_now(world, migration_id)  # it has switched
        service.resume()
    ended = await world.ended(world.a, migration_id)
    assert ended.outcome == COMPLETED
    assert await cancel(world, migration_id) == ended
    assert await switch_now(world, migration_id) == ended
    await world.assert_stays(guest, world.b, world.a)


async def test_too_late_while_the_source_lets_go(world: World, guest: Guest) -> None:
    """The guest runs at the other host, and it is too late, said by name, twice."""
    hypervisor = world.a.directory.find(guest.id).pid
    async with armed(world, "dest.recorded.owned", "stop") as service:
        migration_id = await world.start(guest, world.a, world.b)
        await eventually(lambda: halted(service), "the destination owns it")
        os.kill(hypervisor, signal.SIGSTOP)  # it does not end when it is asked to
        try:
            service.resume()
            now = await world.enters(world.a, migration_id, pb.MIGRATION_PHASE_RELEASING)
            assert now.owner == world.b.identity.uri
            async with world.source(world.a) as stub:
                for _ in range(2):
                    late = stub.CancelMigration(pb.CancelMigrationRequest(id=migration_id))
                    assert (await refusal(late)).reason == "POINT_OF_NO_RETURN"
            assert (await switch_now(world, migration_id)).phase == pb.MIGRATION_PHASE_RELEASING
        finally:
            os.kill(hypervisor, signal.SIGCONT)
    ended = await world.ended(world.a, migration_id)
    assert ended.outcome == COMPLETED
    await world.assert_stays(guest, world.b, world.a)
    async with world.source(world.a) as stub:
        gone = await refusal(stub.GetMachine(pb.GetMachineRequest(machine=guest.spec.name)))
        assert (gone.reason, f"it was moved to {world.b.identity.uri} at " in gone.message) == (
            "MACHINE_NOT_FOUND",
            True,
        )
        assert f"vmferry status {migration_id}" in gone.instance_remedy


async def test_a_deadline_never_ends_a_hand_off(world: World, guest: Guest) -> None:
    """One that passes while only the destination's answer is missing changes nothing."""
    late = (pb.MIGRATION_PHASE_HANDING_OFF, pb.MIGRATION_PHASE_ENDED)
    async with armed(world, "dest.recording.owned", "stop") as service:
        for seconds in (2.5, 15.0):  # a busy computer may need more than the first to come so far
            request = world.order(guest, world.a, world.b)
            deadline = datetime.now(UTC) + timedelta(seconds=seconds)
            request.options.deadline.FromDatetime(deadline)
            async with world.source(world.a) as stub:
                migration_id = (await stub.StartMigration(request, timeout=DEADLINE_S)).migration.id
            now = await world.reaches(world.a, migration_id, lambda now: now.phase in late, "the hand-off")
            if now.phase == pb.MIGRATION_PHASE_HANDING_OFF:
                break
            assert now.reason.reason == "TIMED_OUT", now
        await eventually(lambda: datetime.now(UTC) > deadline, "the deadline has passed")
        assert (await world.state(world.a, migration_id)).phase == pb.MIGRATION_PHASE_HANDING_OFF
        service.resume()
    assert (await world.ended(world.a, migration_id)).outcome == COMPLETED
    await world.assert_stays(guest, world.b, world.a)


async def test_a_busy_guest_is_switched_by_hand(world: World) -> None:
    """One that would never converge crosses when somebody says so, typed twice or not, and nothing is lost."""
    params = {"resident-mib": "4", "dirty-mib-per-s": "100", "working-set-mib": "2"}
    guest = await world.run(params=params)
    how = {
        "max_bandwidth": 2_000_000,
        "downtime_limit": 0.03,
        "on_no_convergence": pb.ON_NO_CONVERGENCE_WAIT,
    }
    migration_id = await world.start(guest, world.a, world.b, **how)
    await world.reaches(world.a, migration_id, lambda now: now.progress.round >= 2, "it goes round and round")
    for _ in range(2):
        await switch_now(world, migration_id)
    ended = await world.ended(world.a, migration_id)
    assert ended.outcome == COMPLETED, ended
    assert ended.downtime.ToMilliseconds() > 30
    await world.assert_stays(guest, world.b, world.a)


@pytest.mark.parametrize(
    ("place", "outcome"),
    [
        ("source.recorded.begun", FAILED),
        ("source.recorded.handed-off", COMPLETED),
        ("source.recorded.done", COMPLETED),
        ("source.released", COMPLETED),
    ],
)
async def test_a_killed_source_tells_how_it_came_out(
    world: World, guest: Guest, place: str, outcome: pb.MigrationOutcome.ValueType
) -> None:
    """After the next start the same request is answered with the same migration, and with what the journals say."""
    request = world.order(guest, world.a, world.b)
    async with armed(world, place, "kill") as service:
        async with world.source(world.a) as stub:
            with contextlib.suppress(grpc.aio.AioRpcError):  # killed before it could answer
                await stub.StartMigration(request, timeout=DEADLINE_S)
        await eventually(lambda: not service.running, f"the source is killed at {place}")
        await service.start()
    async with world.source(world.a) as stub:
        again = (await stub.StartMigration(request, timeout=DEADLINE_S)).migration
    ended = await world.ended(world.a, again.id)
    assert ended.outcome == outcome, ended
    assert ended.caller == world.material("controller").identity.uri
    assert ended.request_id == request.request_id
    here, there = (world.b, world.a) if outcome == COMPLETED else (world.a, world.b)
    assert ended.owner == here.identity.uri
    await world.assert_stays(guest, here, there)
    await world.a.source.restart()
    assert await world.state(world.a, again.id) == ended
