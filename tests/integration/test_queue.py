"""Migrations that wait: in their order, until they begin, are cancelled or are over, and across restarts.

The hosts let one machine leave at a time. A migration that is held back by its bandwidth keeps the others waiting.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import uuid
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tests.integration.hosts import World, open_world
from tests.integration.services import DEADLINE_S, eventually, refusal
from vmferry.cli.machine import end_machine
from vmferry.security.tickets import CLOCK_SKEW
from vmferry.v1 import migration_pb2 as pb

pytestmark = pytest.mark.usefixtures("tidy")

SLOW = 300_000
"""Bytes a second at which a canary takes its time."""
QUEUED, PRECOPYING, ENDED = (
    pb.MIGRATION_PHASE_QUEUED,
    pb.MIGRATION_PHASE_PRECOPYING,
    pb.MIGRATION_PHASE_ENDED,
)
COMPLETED, FAILED, CANCELLED = (
    pb.MIGRATION_OUTCOME_COMPLETED,
    pb.MIGRATION_OUTCOME_FAILED,
    pb.MIGRATION_OUTCOME_CANCELLED,
)


@pytest.fixture(scope="module")
async def world() -> AsyncIterator[World]:
    """Hosts that let one machine leave at a time, and soon ask again."""
    async with open_world(max_outgoing=1, queue_retry_s=0.1, max_queue_retry_s=0.4) as opened:
        yield opened


@pytest.fixture
async def slow(world: World) -> str:
    """A migration that is under way and keeps the others waiting until it is cancelled; its id."""
    migration_id = await world.start(await world.run(), world.a, world.b, max_bandwidth=SLOW)
    await world.enters(world.a, migration_id, PRECOPYING)
    return migration_id


async def cancel(world: World, migration_id: str) -> pb.Migration:
    """Cancel a migration on host a."""
    async with world.source(world.a) as stub:
        request = pb.CancelMigrationRequest(id=migration_id)
        return (await stub.CancelMigration(request, timeout=DEADLINE_S)).migration


async def change(world: World, migration_id: str, **fields: Any) -> pb.Migration:
    """Change a migration on host a."""
    async with world.source(world.a) as stub:
        request = pb.UpdateMigrationRequest(id=migration_id, **fields)
        return (await stub.UpdateMigration(request, timeout=DEADLINE_S)).migration


async def started(world: World, request: pb.StartMigrationRequest, who: str = "controller") -> pb.Migration:
    """What a request is answered with by host a."""
    async with world.source(world.a, who) as stub:
        return (await stub.StartMigration(request, timeout=DEADLINE_S)).migration


async def positions(world: World, *migrations: str) -> list[int]:
    """Where migrations stand in host a's queue; 0 for those that do not."""
    return [(await world.state(world.a, one)).queue.position for one in migrations]


async def in_turn(world: World, *migrations: str) -> None:
    """All of these complete, one after the other."""
    ended = [await world.ended(world.a, one) for one in migrations]
    assert [one.outcome for one in ended] == [COMPLETED] * len(migrations), ended
    assert [one.timings[0].phase for one in ended] == [QUEUED] * len(migrations)
    begun = [one.timings[1].start_time.ToNanoseconds() for one in ended]
    assert begun == sorted(begun)


def soon(seconds: float) -> datetime:
    """A moment in so many seconds."""
    return datetime.now(UTC) + timedelta(seconds=seconds)


async def test_what_waits_goes_by_priority_and_can_be_changed(world: World, slow: str) -> None:
    """A higher priority comes first, also one that is given later; what is cancelled leaves at once."""
    first, second, third = [
        await world.start(await world.run(), world.a, world.b, priority=priority) for priority in (0, 0, 5)
    ]
    assert await positions(world, first, second, third) == [2, 3, 1]
    assert (await change(world, second, priority=9)).options.priority == 9
    await world.reaches(world.a, second, lambda now: now.queue.position == 1, "it is the first")
    gone = await cancel(world, third)
    assert (gone.phase, gone.outcome, gone.reason.reason) == (ENDED, CANCELLED, "CANCELLED")
    assert await cancel(world, third) == gone
    assert gone.owner == world.a.identity.uri
    await world.reaches(world.a, first, lambda now: now.queue.position == 2, "the others move up")
    await cancel(world, slow)
    await in_turn(world, second, first)


async def test_callers_take_turns(world: World, slow: str) -> None:
    """One who asked for two does not keep another waiting for both."""
    requests = [world.order(await world.run(), world.a, world.b) for _ in range(3)]
    whose = ["controller", "controller", "admin"]
    first, second, other = [
        (await started(world, request, who)).id for request, who in zip(requests, whose, strict=True)
    ]
    # The controller has one under way already.
    assert await positions(world, other, first, second) == [1, 2, 3]
    await cancel(world, slow)
    await in_turn(world, other, first, second)


async def test_the_queue_and_the_history_survive_a_kill(world: World, slow: str) -> None:
    """After a kill what waited waits in the same order, and what had ended is told as it was, prediction included."""
    crossed = await cancel_and_cross(world, slow)
    kept = await world.start(await world.run(), world.a, world.b, max_bandwidth=SLOW)
    await world.enters(world.a, kept, PRECOPYING)
    requests = [world.order(await world.run(), world.a, world.b, priority=one) for one in (1, 7)]
    low, high = [await started(world, request) for request in requests]
    gone = await cancel(world, await world.start(await world.run(), world.a, world.b))
    before = await listed(world)

    await world.a.source.kill()
    await world.a.source.start()

    assert await world.state(world.a, crossed.id) == crossed
    assert await world.state(world.a, gone.id) == gone
    assert {one.id for one in await listed(world)} == {one.id for one in before}
    aborted = await world.ended(world.a, kept)  # its attempt was open, and closed by the restart
    assert (aborted.outcome, aborted.options.max_bandwidth) == (FAILED, SLOW)
    for request, known in zip(requests, (low, high), strict=True):
        again = await started(world, request)
        assert (again.id, again.trace_id, again.caller) == (known.id, known.trace_id, known.caller)
        assert again.create_time == known.create_time
        assert again.revision > known.revision
    await in_turn(world, high.id, low.id)


async def cancel_and_cross(world: World, slow: str) -> pb.Migration:
    """Make room, and move a machine."""
    await cancel(world, slow)
    await world.ended(world.a, slow)
    crossed = await world.migrate(await world.run(memory_mib=64), world.a, world.b)
    assert crossed.outcome == COMPLETED
    assert crossed.HasField("prediction")
    return await world.state(world.a, crossed.id)


async def listed(world: World, **fields: Any) -> list[pb.Migration]:
    """All migrations that host a knows, page by page."""
    found: list[pb.Migration] = []
    request = pb.ListMigrationsRequest(page_size=2, **fields)
    async with world.source(world.a) as stub:
        while True:
            answer = await stub.ListMigrations(request, timeout=DEADLINE_S)
            found += answer.migrations
            if not answer.next_page_token:
                return found
            request.page_token = answer.next_page_token


async def test_a_queue_survives_a_stop_in_order(world: World, slow: str) -> None:
    """A service that is stopped gives back what is under way and leaves what waits to its next start."""
    waiting = await world.start(await world.run(), world.a, world.b)
    await world.a.source.restart()
    assert (await world.state(world.a, slow)).outcome == CANCELLED
    await in_turn(world, waiting)


async def test_two_callers_with_one_request_start_one_migration(world: World) -> None:
    """At the same time, later, and after a restart: the same request is answered with the same migration."""
    guest, there = await world.run(), world.b
    requests = [world.order(guest, world.a, there) for _ in range(2)]
    requests[1].request_id = requests[0].request_id
    first, second = await asyncio.gather(started(world, requests[0]), started(world, requests[1], "admin"))
    assert first.id == second.id
    ended = await world.ended(world.a, first.id)
    await eventually(lambda: remembered(world, ended), "it is remembered")
    await world.a.source.kill()
    await world.a.source.start()
    answers = await asyncio.gather(*(started(world, request) for request in requests))
    assert [one.id for one in answers] == [first.id] * 2
    assert (answers[0].outcome, answers[0].revision) == (COMPLETED, ended.revision)
    used = world.order(guest, world.a, there, ticket=requests[0].ticket)
    async with world.source(world.a) as stub:
        assert (await refusal(stub.StartMigration(used))).reason in {"TICKET_USED", "MACHINE_NOT_FOUND"}


def remembered(world: World, migration: pb.Migration) -> bool:
    """Whether host a's memory has a migration as it ended."""
    path = world.a.config.memory_path
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
        row = db.execute("SELECT message FROM migrations WHERE id = ?", (migration.id,)).fetchone()
    return row is not None and pb.Migration.FromString(row[0]) == migration


async def test_a_deadline_counts_in_the_queue(world: World, slow: str) -> None:
    """What has not begun by then is given up by name, without having touched the machine."""
    guest = await world.run()
    request = world.order(guest, world.a, world.b)
    request.options.deadline.FromDatetime(soon(0.7))
    ended = await world.ended(world.a, (await started(world, request)).id)
    assert (ended.outcome, ended.reason.reason) == (FAILED, "TIMED_OUT")
    assert "deadline" in ended.reason.message
    assert [timing.phase for timing in ended.timings] == [QUEUED]
    request.request_id = str(uuid.uuid4())
    request.ticket = world.ticket(guest, world.a, world.b)
    async with world.source(world.a) as stub:
        error = await refusal(stub.StartMigration(request))  # it has passed already
    assert (error.reason, error.field) == ("TIMED_OUT", "options.deadline")
    await cancel(world, slow)
    await world.ended(world.a, slow)
    await world.assert_stays(guest, world.a, world.b)


async def test_a_deadline_ends_what_is_under_way(world: World, slow: str) -> None:
    """One that is set on the way, too; the guest runs on here."""
    changed = pb.UpdateMigrationRequest(id=slow)
    changed.deadline.FromDatetime(soon(0.5))
    async with world.source(world.a) as stub:
        await stub.UpdateMigration(changed, timeout=DEADLINE_S)
    ended = await world.ended(world.a, slow)
    assert (ended.outcome, ended.reason.reason) == (FAILED, "TIMED_OUT")
    assert ended.timings[-1].phase == PRECOPYING
    await world.assert_stays(world.guests[-1], world.a, world.b)


async def test_a_ticket_that_grows_old_in_the_queue_is_renewed_or_ends_it(world: World, slow: str) -> None:
    """With a new ticket for the same migration it goes on waiting; without, it ends by name and never begins."""
    ids = [uuid.uuid4().bytes for _ in range(2)]
    guests = [await world.run() for _ in range(2)]
    old = datetime.now(UTC) - CLOCK_SKEW - timedelta(seconds=8)
    ends = [
        world.ticket(guest, world.a, world.b, migration_id=one, now=old, valid_s=12)
        for guest, one in zip(guests, ids, strict=True)
    ]
    kept, lost = [
        await world.start(guest, world.a, world.b, ticket=ticket)
        for guest, ticket in zip(guests, ends, strict=True)
    ]
    strange = world.ticket(guests[0], world.a, world.b)
    async with world.source(world.a) as stub:
        wrong = stub.UpdateMigration(pb.UpdateMigrationRequest(id=kept, ticket=strange))
        assert (await refusal(wrong)).field == "ticket"
    await change(world, kept, ticket=world.ticket(guests[0], world.a, world.b, migration_id=ids[0]))
    ended = await world.ended(world.a, lost)
    assert (ended.outcome, ended.reason.reason) == (FAILED, "TICKET_EXPIRED")
    assert (await world.state(world.a, kept)).phase == QUEUED
    await cancel(world, slow)
    await in_turn(world, kept)


async def test_what_waits_cannot_be_switched(world: World, slow: str) -> None:
    """There is nothing to pause yet; and what has left the queue cannot be moved in it."""
    waiting = await world.start(await world.run(), world.a, world.b)
    async with world.source(world.a) as stub:
        error = await refusal(stub.SwitchNow(pb.SwitchNowRequest(id=waiting)))
        assert error.reason == "WRONG_PHASE"
        late = stub.UpdateMigration(pb.UpdateMigrationRequest(id=slow, priority=3))
        assert (await refusal(late)).field == "priority"
        high = stub.UpdateMigration(pb.UpdateMigrationRequest(id=waiting, priority=10))
        assert (await refusal(high)).field == "priority"
    await cancel(world, waiting)
    await cancel(world, slow)
    await world.ended(world.a, slow)


async def test_a_machine_that_dies_in_the_queue_ends_by_name(world: World, slow: str) -> None:
    """When its turn comes it is not there any more; the next one begins all the same."""
    dying, other = await world.run(), await world.run()
    lost, next_one = [await world.start(one, world.a, world.b) for one in (dying, other)]
    await end_machine(dying.id, world.a.config)
    await cancel(world, slow)
    ended = await world.ended(world.a, lost)
    assert (ended.outcome, ended.reason.reason) == (FAILED, "MACHINE_NOT_FOUND")
    await in_turn(world, next_one)


@pytest.mark.parametrize("damage", ["garbage", "a folder"])
async def test_no_state_of_the_memory_keeps_machines_from_moving(world: World, damage: str) -> None:
    """A damaged file is set aside, a place where none can be is done without; both are said in the log."""
    path = world.a.config.memory_path
    await world.a.source.stop()
    for name in (path, path.with_name(f"{path.name}-wal"), path.with_name(f"{path.name}-shm")):
        name.unlink(missing_ok=True)
    if damage == "garbage":
        path.write_bytes(b"no database" * 1000)
    else:
        path.mkdir()
    said = len(world.a.source.log_text())
    await world.a.source.start()
    guest = await world.run()
    migration = await world.assert_crosses(guest, world.a, world.b)
    assert [one.id for one in await listed(world, machine=guest.id)] == [migration.id]
    text = world.a.source.log_text()[said:]
    assert ("set aside" if damage == "garbage" else "cannot be used") in text
    await world.a.source.stop()
    if damage == "a folder":
        path.rmdir()
    await world.a.source.start()
    known = [one.id for one in await listed(world, machine=guest.id)]
    assert known == ([migration.id] if damage == "garbage" else [])


async def test_a_watch_goes_on_after_a_restart(world: World, slow: str) -> None:
    """With its token a watcher hears what is new in the next run of the service, and nothing twice."""
    waiting = await world.start(await world.run(), world.a, world.b)
    request = pb.WatchMigrationRequest(id=waiting)
    async with world.source(world.a) as stub:
        first = await anext(aiter(stub.WatchMigration(request)))
    await world.a.source.kill()
    await world.a.source.start()
    request.resume_token = first.resume_token
    async with asyncio.timeout(2 * DEADLINE_S), world.source(world.a) as stub:
        seen = [answer async for answer in stub.WatchMigration(request)]
        revisions = [first.migration.revision, *(answer.migration.revision for answer in seen)]
        assert revisions == sorted(set(revisions))
        assert seen[-1].migration.outcome == COMPLETED
        request.resume_token = seen[-1].resume_token
        assert [answer async for answer in stub.WatchMigration(request)] == []
        request.id = slow
        assert (await refusal(_first(stub.WatchMigration(request)))).field == "resume_token"


async def _first(stream: Any) -> object:
    return await anext(aiter(stream))


async def test_filters_find_what_was(world: World) -> None:
    """By destination, outcome, phase and time, over what is in memory and what is only remembered."""
    guest = await world.run()
    before = datetime.now(UTC)
    done = await world.assert_crosses(guest, world.a, world.b)
    await world.a.source.restart()
    mine = {"machine": guest.spec.name}
    assert [one.id for one in await listed(world, **mine, outcomes=[COMPLETED])] == [done.id]
    assert await listed(world, **mine, outcomes=[FAILED, CANCELLED]) == []
    assert [one.id for one in await listed(world, **mine, destination=world.b.identity.uri)] == [done.id]
    assert await listed(world, **mine, destination=world.a.identity.uri) == []
    assert await listed(world, **mine, phases=[QUEUED]) == []
    assert [one.id for one in await listed(world, created_since=before, phases=[ENDED])] == [done.id]
    assert await listed(world, **mine, created_before=before) == []
