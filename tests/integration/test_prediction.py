"""What is predicted, and what then happens; and that measuring leaves nothing behind."""

from __future__ import annotations

import asyncio

import pytest

from tests.integration.hosts import Guest, World, migration_options
from tests.integration.proxy import Proxy
from tests.integration.services import DEADLINE_S, Host, eventually, open_trackers
from vmferry.v1 import compatibility_pb2
from vmferry.v1 import migration_pb2 as pb

pytestmark = pytest.mark.usefixtures("tidy")

MIB = 1024 * 1024
IDLE = {"dirty-mib-per-s": "0", "working-set-mib": "24"}
WRITING = {"dirty-mib-per-s": "12", "working-set-mib": "6"}
SLOW = 6e6
"""Bytes per second at which the working set of FAST takes longer than its guest may be paused."""
FAST = {"dirty-mib-per-s": "40", "working-set-mib": "6"}


def request(guest: Guest, there: Host, address: str = "", **options: object) -> pb.PlanMigrationRequest:
    return pb.PlanMigrationRequest(
        machine=guest.id,
        destination=pb.Destination(host=there.identity.uri, address=address or there.dest.address),
        options=migration_options(**options),
    )


async def plan(
    world: World, guest: Guest, address: str = "", **options: object
) -> compatibility_pb2.CompatibilityReport:
    """A plan of going from a to b."""
    async with world.source(world.a) as stub:
        asked = request(guest, world.b, address, **options)
        return (await stub.PlanMigration(asked, timeout=DEADLINE_S)).report


def near(predicted: compatibility_pb2.PredictedTime, actual_s: float, *, slack_s: float) -> bool:
    """Within a factor of three, and a little: tests run beside others on processors that they share."""
    expected_s = predicted.expected.ToNanoseconds() / 1e9
    return expected_s / 3 - slack_s <= actual_s <= expected_s * 3 + slack_s


@pytest.mark.parametrize("params", [pytest.param(IDLE, id="idle"), pytest.param(WRITING, id="writing")])
async def test_a_migration_goes_as_planned(world: World, params: dict[str, str]) -> None:
    """The plan has every figure; the migration carries its prediction and keeps to it."""
    guest = await world.run(memory_mib=64, program="writer", params=params)
    report = await plan(world, guest)
    assert report.compatible
    predicted = report.prediction
    assert predicted.converges
    assert predicted.rounds >= 1
    for time in (predicted.total, predicted.downtime):
        figures = [one.ToNanoseconds() for one in (time.low, time.expected, time.high)]
        assert 0 < figures[0] < figures[1] < figures[2]
    assert predicted.sampled.ToNanoseconds() > 0
    working_set = int(params["working-set-mib"]) * MIB
    assert working_set <= predicted.resident_bytes <= 2 * working_set + 8 * MIB
    assert predicted.link_bytes_per_second > predicted.link_error_bytes_per_second > 0
    assert predicted.reserve_bytes_per_second > 0
    asked_to_write = int(params["dirty-mib-per-s"]) * MIB
    assert asked_to_write / 3 <= predicted.dirty_bytes_per_second <= asked_to_write * 3 + MIB
    assert open_trackers(world.a.source.pid) == []

    migration = await world.assert_crosses(guest, world.a, world.b)

    assert migration.prediction == predicted
    assert near(migration.prediction.total, migration.total.ToNanoseconds() / 1e9, slack_s=3)
    assert near(migration.prediction.downtime, migration.downtime.ToNanoseconds() / 1e9, slack_s=0.5)


async def test_a_guest_too_fast_for_a_slow_link_is_foreseen(world: World, link: Proxy) -> None:
    """What the plan says would not converge does not."""
    guest = await world.run(program="writer", params=FAST)
    link.up_bytes_per_s = SLOW
    predicted = (await plan(world, guest, link.address)).prediction
    assert not predicted.converges, predicted
    assert SLOW / 3 < predicted.link_bytes_per_second < SLOW * 2
    migration = await world.migrate(guest, world.a, world.b, address=link.address)
    assert migration.reason.reason == "NOT_CONVERGING", migration
    assert not migration.prediction.converges
    await guest.assert_clean(world.a)


async def test_what_compressing_brings_is_foreseen(world: World, link: Proxy) -> None:
    """The same guest over the same link converges where its pages may be compressed, and the plan says so."""
    guest = await world.run(program="writer", params=FAST)
    link.up_bytes_per_s = SLOW
    predicted = (await plan(world, guest, link.address, compression="auto")).prediction
    assert predicted.converges, predicted
    assert SLOW / 3 < predicted.link_bytes_per_second < SLOW * 2
    migration = await world.migrate(guest, world.a, world.b, address=link.address, compression="auto")
    assert migration.outcome == pb.MIGRATION_OUTCOME_COMPLETED, migration
    await guest.assert_clean(world.b)


async def test_a_longer_pause_is_taken_into_account(world: World, link: Proxy) -> None:
    """The migration's own limits count, not those of the plan whose measurements it uses."""
    guest = await world.run(program="writer", params=FAST)
    link.up_bytes_per_s = SLOW
    assert not (await plan(world, guest, link.address)).prediction.converges
    migration = await world.migrate(guest, world.a, world.b, address=link.address, downtime_limit=4.0)
    assert migration.prediction.converges
    assert migration.outcome == pb.MIGRATION_OUTCOME_COMPLETED, migration
    await guest.assert_clean(world.b)


async def test_a_migration_without_a_plan_measures_by_itself(world: World) -> None:
    """While the destination prepares there is time for a short look; nothing of it is armed when memory is copied."""
    guest = await world.run(memory_mib=64, program="writer", params=WRITING)
    here, there = world.a, world.b
    for _ in range(5):
        migration = await world.assert_crosses(guest, here, there)
        here, there = there, here
        if migration.HasField("prediction"):
            break
    assert migration.prediction.total.expected.ToNanoseconds() > 0
    assert migration.prediction.link_bytes_per_second > 0


async def test_a_plan_may_do_without(world: World) -> None:
    """It is then answered without a measurement, and without a word about it."""
    guest = await world.run()
    async with world.source(world.a) as stub:
        asked = request(guest, world.b)
        asked.without_prediction = True
        report = (await stub.PlanMigration(asked, timeout=DEADLINE_S)).report
    assert not report.HasField("prediction")
    assert not [item for item in report.items if item.id.startswith("prediction")]


async def test_what_cannot_be_measured_is_said(world: World) -> None:
    """The tracker that only compares with what was sent shows nothing beforehand; the plan is whole otherwise."""
    guest = await world.run()
    report = await plan(world, guest, tracker="hash")
    assert report.compatible
    assert not report.HasField("prediction")
    (item,) = [item for item in report.items if item.id == "prediction.unavailable"]
    assert item.severity == compatibility_pb2.SEVERITY_NOTE
    assert "hash" in item.message


async def test_several_plans_at_a_time_do_not_disturb_each_other(world: World) -> None:
    """Each of them has a prediction, of one machine or of several."""
    guests = [await world.run() for _ in range(2)]
    reports = await asyncio.gather(*(plan(world, guest) for guest in [*guests, guests[0]]))
    assert all(report.HasField("prediction") for report in reports)
    assert open_trackers(world.a.source.pid) == []


async def test_a_cancelled_plan_leaves_nothing_armed(world: World) -> None:
    """The caller goes away while the guest is being looked at."""
    guest = await world.run(self_track=False)
    async with world.source(world.a) as stub:
        call = stub.PlanMigration(request(guest, world.b), timeout=DEADLINE_S)
        await eventually(lambda: open_trackers(world.a.source.pid), "the guest is being looked at")
        call.cancel()
        await eventually(lambda: not open_trackers(world.a.source.pid), "nothing is armed")
    await world.assert_stays(guest, world.a, world.b)


async def test_a_migration_does_not_wait_for_a_plan(world: World) -> None:
    """It begins while the guest is being looked at; the plan is answered all the same, and both are right."""
    guest = await world.run(self_track=False)
    asked = asyncio.create_task(plan(world, guest))
    await eventually(lambda: open_trackers(world.a.source.pid), "the guest is being looked at")
    await world.assert_crosses(guest, world.a, world.b)
    report = await asked
    if not report.HasField("prediction"):
        assert "prediction.unavailable" in {item.id for item in report.items}
    assert open_trackers(world.a.source.pid) == []


async def test_a_link_that_hardly_carries_anything_is_not_measured_for_ever(
    world: World, link: Proxy
) -> None:
    """The measurement ends in time, without a figure, and the plan is whole otherwise."""
    guest = await world.run()
    link.up_bytes_per_s = 20_000.0
    report = await plan(world, guest, link.address)
    assert report.compatible
    assert not report.HasField("prediction")
    assert "prediction.unavailable" in {item.id for item in report.items}
