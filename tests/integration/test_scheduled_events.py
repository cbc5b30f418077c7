"""Scheduled Events of machines that really migrate: what their guests are told, before, meanwhile and afterwards."""

from __future__ import annotations

import asyncio
import email.utils
import json
import time
from collections.abc import AsyncIterator, Callable
from http.client import HTTPConnection
from typing import Any

import pytest

from source_svc.residents import LOOK_S
from tests.integration.hosts import Guest, World, configured, open_world
from tests.integration.metadata import URL, Client, Reply, free_port
from tests.integration.services import Host, eventually
from tests.integration.told import RATE, client, events, past, shown
from tests.integration.updates import ask as ask_update
from tests.integration.updates import ended as update_ended
from vmferry.events import policy
from vmferry.events.states import Ending
from vmferry.v1 import migration_pb2 as pb
from vmferry.v1 import update_pb2 as up


@pytest.fixture(scope="module")
async def world() -> AsyncIterator[World]:
    """Hosts a and b."""
    async with open_world(metadata_requests_per_s=RATE) as opened:
        yield opened


@pytest.fixture
async def guest(world: World) -> AsyncIterator[Guest]:
    """A machine on host a, which is gone afterwards."""
    made = await world.run()
    yield made
    assert await world.end_guests() == []


async def test_a_crossing_appears_and_is_gone_with_the_machine(world: World, guest: Guest) -> None:
    """Without notice nobody waits; the numbers go on upwards at the destination, and what happened is recorded."""
    here = await client(world.a, guest)
    assert await events(here) == []
    migration = await world.assert_crosses(guest, world.a, world.b)
    assert migration.event_id
    assert pb.MIGRATION_PHASE_ANNOUNCED not in [timing.phase for timing in migration.timings]
    ended = past(world.a, guest, migration.event_id)
    assert ended.ending is Ending.COMPLETED
    assert ended.lasted_s is not None
    assert 0 < ended.lasted_s < migration.total.ToNanoseconds() / 1e9
    there = await client(world.b, guest)
    there.last = here.last
    assert await events(there) == []
    # It was told of an event here that is over there: another document has been shown in between, or might have been.
    known = await asyncio.to_thread(there.acknowledge, migration.event_id)
    assert known.status == 200
    before = there.last
    back = await world.assert_crosses(guest, world.b, world.a)
    again = await client(world.a, guest)
    again.last = before
    assert await events(again) == []
    assert back.event_id != migration.event_id


async def test_an_acknowledgement_starts_the_migration_early(world: World, guest: Guest) -> None:
    """The event says what is to come; the guest approves it, and does not have to wait for its time."""
    here = await client(world.a, guest)
    assert await events(here) == []
    empty = here.last
    migration_id = await world.start(guest, world.a, world.b, notice=300.0)
    waiting = await world.enters(world.a, migration_id, pb.MIGRATION_PHASE_ANNOUNCED)
    event = await shown(here)
    assert here.last > empty
    due = email.utils.parsedate_to_datetime(event["NotBefore"]).timestamp()
    assert 290 < due - time.time() <= 300
    assert (event["EventType"], event["EventSource"], event["ResourceType"]) == (
        "Freeze",
        "Platform",
        "VirtualMachine",
    )
    assert event["Resources"] == [guest.spec.name]
    assert event["EventId"] == waiting.event_id
    assert event["DurationInSeconds"] == 1
    number = here.last
    assert await events(here) == [event]
    assert here.last == number
    for _ in range(2):  # once more than needed, as some clients do
        assert (await asyncio.to_thread(here.acknowledge, event["EventId"].lower())).status == 200
    migration = await world.ended(world.a, migration_id)
    assert migration.outcome == pb.MIGRATION_OUTCOME_COMPLETED, migration
    assert migration.total.ToSeconds() < 60
    assert past(world.a, guest, event["EventId"]).event.approved_by == guest.spec.name
    there = await client(world.b, guest)
    there.last = here.last
    assert await events(there) == []
    assert there.last > number
    await guest.assert_clean(world.b)


async def test_a_guest_that_never_answers_is_not_waited_for_longer(world: World, guest: Guest) -> None:
    """It starts when its time has come, and not before."""
    here = await client(world.a, guest)
    migration_id = await world.start(guest, world.a, world.b, notice=1.0)
    event = await shown(here)
    migration = await world.ended(world.a, migration_id)
    assert migration.outcome == pb.MIGRATION_OUTCOME_COMPLETED, migration
    waited = next(one for one in migration.timings if one.phase == pb.MIGRATION_PHASE_ANNOUNCED)
    assert 0.9 <= waited.elapsed.ToMilliseconds() / 1e3 < 3
    ended = past(world.a, guest, event["EventId"])
    assert ended.event.approved_by == ""
    assert ended.event.started_s >= ended.event.not_before_s


async def test_a_cancelled_migration_takes_its_event_away(world: World, guest: Guest) -> None:
    """It was never started, nothing lasted, and the guest runs on."""
    here = await client(world.a, guest)
    migration_id = await world.start(guest, world.a, world.b, notice=300.0)
    event = await shown(here)
    number = here.last
    async with world.source(world.a) as stub:
        await stub.CancelMigration(pb.CancelMigrationRequest(id=migration_id))
    migration = await world.ended(world.a, migration_id)
    assert migration.outcome == pb.MIGRATION_OUTCOME_CANCELLED
    assert await events(here) == []
    assert here.last > number
    ended = past(world.a, guest, event["EventId"])
    assert (ended.ending, ended.lasted_s) == (Ending.CANCELLED, None)
    await world.assert_stays(guest, world.a, world.b)


async def test_the_event_is_started_while_the_guest_is_paused(world: World, guest: Guest) -> None:
    """A destination that falls silent in the switch: Started without a date, then over, and how long it lasted."""
    world.b.dest.environment = {"VMFERRY_FAILPOINTS": "dest.verified=stop"}
    try:
        await world.b.dest.restart()
        async with configured(world.a.source, switch_timeout_s=1.0, metadata_requests_per_s=RATE):
            here = await client(world.a, guest)
            migration_id = await world.start(guest, world.a, world.b)
            event = await shown(here, "Started")
            assert event["NotBefore"] == ""
            assert (await asyncio.to_thread(here.acknowledge, event["EventId"])).status == 200
            migration = await world.ended(world.a, migration_id)
            assert migration.outcome == pb.MIGRATION_OUTCOME_FAILED
            assert await events(here) == []
            ended = past(world.a, guest, event["EventId"])
            assert ended.ending is Ending.COMPLETED
            assert ended.lasted_s is not None
            assert ended.lasted_s > 0.5
    finally:
        world.b.dest.environment = {}
        await world.b.dest.kill()
        await world.b.dest.start()
    await world.assert_stays(guest, world.a, world.b)


async def test_a_service_that_is_killed_remembers_what_it_told(world: World, guest: Guest) -> None:
    """Its next start gives the event up with the migration, or goes on with both, by the same identity.

    Which of them depends on what it had written of the beginning; the guest is told nothing else meanwhile.
    """
    here = await client(world.a, guest)
    migration_id = await world.start(guest, world.a, world.b, notice=300.0)
    event = await shown(here)
    number = here.last
    await world.a.source.kill()
    await world.a.source.start()
    here = await client(world.a, guest)
    here.last = number
    migration = await world.state(world.a, migration_id)
    if migration.phase == pb.MIGRATION_PHASE_ENDED:
        assert await events(here) == []
        assert here.last == number + 1
    else:
        assert await events(here) == [event]
        assert here.last == number
    assert (await asyncio.to_thread(here.acknowledge, event["EventId"])).status == 200
    migration = await world.ended(world.a, migration_id)
    cancelled = migration.outcome == pb.MIGRATION_OUTCOME_FAILED
    ending = Ending.CANCELLED if cancelled else Ending.COMPLETED
    assert past(world.a, guest, event["EventId"]).ending is ending
    there = await client(world.a if cancelled else world.b, guest)
    there.last = number
    assert await events(there) == []


async def test_nobody_gets_less_notice_than_azure_gives(world: World, guest: Guest) -> None:
    """Where the host says so: whoever moves or updates the machine at once is held for 15 minutes, or an approval."""
    async with configured(world.a.source, event_minimum_notice=True, metadata_requests_per_s=RATE):
        here = await client(world.a, guest)
        asked = await ask_update(world, guest)
        event = await shown(here)
        due = email.utils.parsedate_to_datetime(event["NotBefore"]).timestamp()
        assert 880 < due - time.time() <= 900
        assert event["Description"] == policy.MAINTENANCE
        assert (await asyncio.to_thread(here.acknowledge, event["EventId"])).status == 200
        assert (await update_ended(world, asked)).outcome == up.UPDATE_OUTCOME_COMPLETED
        migration_id = await world.start(guest, world.a, world.b, notice=0.5)
        event = await shown(here)
        due = email.utils.parsedate_to_datetime(event["NotBefore"]).timestamp()
        assert 880 < due - time.time() <= 900
        assert (await world.state(world.a, migration_id)).phase == pb.MIGRATION_PHASE_ANNOUNCED
        assert (await asyncio.to_thread(here.acknowledge, event["EventId"])).status == 200
        migration = await world.ended(world.a, migration_id)
        assert migration.outcome == pb.MIGRATION_OUTCOME_COMPLETED, migration
        await guest.assert_clean(world.b)


async def test_a_guest_that_does_not_listen_is_not_waited_for(world: World, guest: Guest) -> None:
    """One that never asked, or has been silent for long; its next request is heard, and its numbers begin anew."""
    idle_s = 5.0  # longer than what lies between two requests on a computer that is busy
    async with configured(world.a.source, event_idle_s=idle_s, metadata_requests_per_s=RATE):
        here = await client(world.a, guest)
        # Nobody has asked yet: a cancelled notice would be seen in the phases.
        asked = await ask_update(world, guest, notice_s=300.0)
        assert (await update_ended(world, asked)).outcome == up.UPDATE_OUTCOME_COMPLETED
        assert await events(here) == []
        migration_id = await world.start(guest, world.a, world.b, notice=300.0)
        event = await shown(here)
        number = here.last
        async with world.source(world.a) as stub:
            await stub.CancelMigration(pb.CancelMigrationRequest(id=migration_id))
        await world.ended(world.a, migration_id)
        assert await events(here) == []
        assert here.last > number > 1
        silent = time.time()
        await eventually(lambda: time.time() > silent + idle_s + 0.1, "it has been silent for long")
        here.last = 0
        assert await events(here) == []
        assert here.last == 1
        assert (await asyncio.to_thread(here.acknowledge, event["EventId"])).status == 200


async def test_an_update_in_place_cuts_nobody_off(world: World, guest: Guest) -> None:
    """A connection is served before, while and after its machine goes on in another process."""
    here = await client(world.a, guest)
    connection = here.open()
    try:
        await served(here, connection)
        first = connection.sock
        ending = asyncio.create_task(update_ended(world, await ask_update(world, guest)))
        while not ending.done():
            await served(here, connection)
        assert (await ending).outcome == up.UPDATE_OUTCOME_COMPLETED
        noticed = time.monotonic() + 3 * LOOK_S
        while time.monotonic() < noticed:
            await served(here, connection)
        assert connection.sock is first
    finally:
        connection.close()


async def served(one: Client, connection: HTTPConnection) -> None:
    """A guest asks over a connection that it has."""
    assert (await asyncio.to_thread(one.over, connection)).status == 200


async def test_a_micro_vm_approves_by_its_own_device(world: World) -> None:
    """Its guest asks and approves through the device, there and back; the numbers that it reads only grow."""
    guest = await world.run(program="asker", metadata=True, params={"poll-us": "50000", "approve": "1"})
    try:
        last = await _told(guest, world.a, lambda told: told["Events"] == [])
        for here, there in ((world.a, world.b), (world.b, world.a)):
            migration_id = await world.start(guest, here, there, notice=300.0)
            migration = await world.ended(here, migration_id)
            assert migration.outcome == pb.MIGRATION_OUTCOME_COMPLETED, migration
            assert past(here, guest, migration.event_id).event.approved_by == guest.spec.name
            now = await _told(guest, there, lambda told: told["Events"] == [])
            assert now["DocumentIncarnation"] > last["DocumentIncarnation"]
            last = now
            # What was under way in the very moment of the switch may be lost; the next question is answered.
            assert guest.serial(there).count("unanswered") <= 1
    finally:
        assert await world.end_guests() == []


async def _told(guest: Guest, host: Host, condition: Callable[[Any], bool]) -> Any:
    """The newest document that a guest says it was given, once it is so."""

    def newest() -> Any:
        lines = guest.serial(host).split("\n")[:-1]
        found = [line.removeprefix("asker told=") for line in lines if line.startswith("asker told=")]
        told = json.loads(found[-1]) if found else None
        return told if told and condition(told) else None

    return await eventually(newest, "the guest is told")


async def test_what_http_libraries_send(world: World, guest: Guest) -> None:
    """Over a real socket: one connection kept open, HEAD, small letters, pieces, expectations, and nonsense."""
    port = free_port()
    async with configured(
        world.a.source, metadata_listen=(f"{guest.spec.name}=127.0.0.1:{port}",), metadata_requests_per_s=RATE
    ):
        here = await client(world.a, guest)
        await world.start(guest, world.a, world.b, notice=300.0)
        event = await shown(here)
        by_port = Client(port)
        await eventually(lambda: _answers(by_port), "the port is listened at")
        await asyncio.to_thread(_as_libraries_do, by_port, event["EventId"])


def _answers(one: Client) -> bool:
    try:
        return one.request().status == 200
    except OSError:
        return False


def _as_libraries_do(one: Client, event_id: str) -> None:
    connection = one.open()
    try:
        first = one.over(connection, Connection="keep-alive")
        kept = connection.sock
        again = one.over(connection, If_None_Match=first.headers["etag"])
        assert (again.status, again.body) == (304, b"")
        head = one.over(connection, "HEAD")
        assert (head.status, head.body) == (200, b"")
        assert head.headers["content-length"] == first.headers["content-length"]
        assert connection.sock is kept is not None
    finally:
        connection.close()
    host = b"host: x\r\nmetadata: TRUE\r\n"
    line = b" /metadata/scheduledevents/?api-version=2019-08-01 HTTP/1.1\r\n"
    assert first.body in one.raw(b"GET" + line + host + b"\r\n", until=first.body)
    old = one.raw(b"GET" + line.replace(b"1.1", b"1.0") + host + b"\r\n", until=first.body)
    assert old.startswith(b"HTTP/1.0 200 OK\r\n")
    body = json.dumps({"StartRequests": [{"EventId": "x"}, {"EventId": event_id.lower()}]}).encode()
    form = host + b"content-type: application/x-www-form-urlencoded\r\n"
    pieces = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:7], body[7:]))
    chunked = b"POST" + line + form + b"transfer-encoding: chunked\r\n\r\n" + pieces + b"0\r\n\r\n"
    assert one.raw(chunked, until=first.body).startswith(b"HTTP/1.1 200 OK\r\n")
    expecting = b"POST" + line + form + b"expect: 100-continue\r\ncontent-length: %d\r\n\r\n" % len(body)
    asked = one.open()
    asked.connect()
    try:
        asked.sock.sendall(expecting)
        assert asked.sock.recv(1024) == b"HTTP/1.1 100 Continue\r\n\r\n"
        asked.sock.sendall(body)
        assert asked.sock.recv(65536).startswith(b"HTTP/1.1 200 OK\r\n")
    finally:
        asked.close()
    assert one.raw(b"\x16\x03\x01\x02\x00\r\n\r\n", until=b"\r\n").startswith(b"HTTP/1.")
    too_long: Reply = one.request("POST", URL, b"[" * 200_000)
    assert too_long.status == 400
    assert too_long.json["error"]


async def test_the_rate_of_requests_is_limited_for_each_machine_alone(world: World) -> None:
    """Five a second, as Azure has it; what one machine asks does not count for another."""
    first, second = await world.run(), await world.run()
    try:
        async with configured(world.a.source, metadata_requests_per_s=5):
            asking, other = await client(world.a, first), await client(world.a, second)

            def ask_seven() -> list[int]:
                connection = asking.open()
                try:
                    return [asking.over(connection).status for _ in range(7)]
                finally:
                    connection.close()

            assert await asyncio.to_thread(ask_seven) == [200] * 5 + [429] * 2
            assert (await asyncio.to_thread(other.request)).status == 200
    finally:
        assert await world.end_guests() == []
