"""Scheduled Events of machines of one availability set, which see each other's, on one host and on several."""

from __future__ import annotations

import asyncio
import signal
import sys
import uuid
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.integration.hosts import Guest, World, configured, open_world
from tests.integration.services import Host, eventually
from tests.integration.told import RATE, client, events, is_past, past, shown
from vmferry.cli.machine import run_machine
from vmferry.events.states import Ending
from vmferry.machines.microvm.spec import MicrovmSpec
from vmferry.machines.spec import MachineSpec, new_mac
from vmferry.v1 import migration_pb2 as pb


@pytest.fixture(scope="module")
async def world() -> AsyncIterator[World]:
    """Hosts a and b."""
    async with open_world(metadata_requests_per_s=RATE) as opened:
        yield opened


async def member(world: World, name: str, group: str, host: Host | None = None) -> Guest:
    """A machine on host a, or another one, that is called so, in this availability set."""
    part = MicrovmSpec(program="canary", mac=new_mac(), params={"resident-mib": "4"})
    spec = MachineSpec(
        name=f"vm-{uuid.uuid4().hex[:8]}",
        uuid=str(uuid.uuid4()),
        memory_mib=16,
        microvm=part,
        guest_name=name,
        availability_set=group,
    )
    made = Guest(spec, host or world.a)
    world.guests.append(made)
    await run_machine(spec, made.made_on.config)
    return made


async def test_machines_of_a_set_see_each_others_events_and_nobody_elses(world: World) -> None:
    """Any machine of the set may approve an event, whichever it names; one outside of it does not see it at all."""
    first, second, stranger = [
        await member(world, name, group)
        for name, group in (("WestNO_0", "web"), ("WestNO_1", "web"), ("WestNO_2", ""))
    ]
    try:
        clients = [await client(world.a, one) for one in (first, second, stranger)]
        migration_id = await world.start(first, world.a, world.b, notice=300.0)
        event = await shown(clients[0])
        assert event["Resources"] == ["WestNO_0"]
        assert await events(clients[1]) == [event]
        assert await events(clients[2]) == []
        refused = await asyncio.to_thread(clients[2].acknowledge, event["EventId"])
        assert refused.status == 400
        assert (await world.state(world.a, migration_id)).phase == pb.MIGRATION_PHASE_ANNOUNCED
        assert (await asyncio.to_thread(clients[1].acknowledge, event["EventId"])).status == 200
        migration = await world.ended(world.a, migration_id)
        assert migration.outcome == pb.MIGRATION_OUTCOME_COMPLETED
        assert past(world.a, first, event["EventId"]).event.approved_by == "WestNO_1"
        assert await events(clients[1]) == []
        named = await asyncio.to_thread(
            (await client(world.b, first)).request, "GET", "/metadata/instance?api-version=2021-12-13"
        )
        assert named.json["compute"]["name"] == "WestNO_0"
    finally:
        assert await world.end_guests() == []


async def test_machines_of_a_set_on_another_host_are_told_too(world: World) -> None:
    """All the time until the machine has come, and not only while its own host is there to be asked.

    What one of them acknowledges is told to that host, as soon as it is there again.
    """
    moving, staying = await member(world, "WestNO_0", "web", world.b), await member(world, "WestNO_1", "web")
    peers = (f"{world.b.identity.uri}={world.b.source.address}",)
    try:
        async with configured(world.a.source, event_peers=peers, metadata_requests_per_s=RATE):
            there, here = await client(world.b, moving), await client(world.a, staying)
            migration_id = await world.start(moving, world.b, world.a, notice=300.0)
            event = await shown(there)
            assert await shown(here) == event
            number = here.last
            assert (await world.state(world.b, migration_id)).phase == pb.MIGRATION_PHASE_ANNOUNCED
            world.b.source.signal(signal.SIGSTOP)
            assert (await asyncio.to_thread(here.acknowledge, event["EventId"])).status == 200
            await eventually(
                lambda: "does not tell of its events" in world.a.source.log_text(), "host b is missed"
            )
            assert await events(here) == [event]
            world.b.source.signal(signal.SIGCONT)
            statuses = [event["EventStatus"]]
            async with asyncio.timeout(60):
                while found := await events(here):
                    statuses += [one["EventStatus"] for one in found if one["EventId"] == event["EventId"]]
                    assert len(found) == 1
            assert statuses == sorted(statuses)
            assert here.last > number
            migration = await world.ended(world.b, migration_id)
            assert migration.outcome == pb.MIGRATION_OUTCOME_COMPLETED, migration
            assert await events(here) == []
            assert past(world.b, moving, event["EventId"]).event.approved_by == "WestNO_1"
    finally:
        world.b.source.signal(signal.SIGCONT)
        assert await world.end_guests() == []


async def test_a_drain_with_a_notice_tells_every_guest(world: World) -> None:
    """Each has an event of its own, which its set sees; one that approves leaves early, the other when it is time."""
    guests = [await member(world, name, "web") for name in ("WestNO_0", "WestNO_1")]
    try:
        clients = [await client(world.a, one) for one in guests]
        code, said = await vmferry(
            world, "drain", "a", "--to", f"b={world.b.dest.address}", "--notice", "8", "--no-wait"
        )
        assert code == 0, said
        seen: list[dict[str, Any]] = []
        async with asyncio.timeout(60):
            while len(seen) < len(guests):
                seen = await events(clients[0])
                await asyncio.sleep(0.01)
        assert await events(clients[1]) == seen
        assert {one["EventStatus"] for one in seen} == {"Scheduled"}
        assert sorted(name for one in seen for name in one["Resources"]) == ["WestNO_0", "WestNO_1"]
        assert {one["EventType"] for one in seen} == {"Freeze"}
        first, second = sorted(seen, key=lambda one: str(one["Resources"]))
        assert (await asyncio.to_thread(clients[0].acknowledge, first["EventId"])).status == 200
        # Its set sees that it starts, if it looks in time, and that it is over.
        async with asyncio.timeout(60):
            while (listed := await events(clients[1])) != [second]:
                assert [one["EventId"] for one in listed] == [one["EventId"] for one in seen]
        assert world.b.ledger.rights(guests[0].id).permitted
        await eventually(
            lambda: world.b.ledger.rights(guests[1].id).permitted, "the second has left", seconds=60
        )
        for guest, event, approved in zip(guests, (first, second), ("WestNO_0", ""), strict=True):
            # The source learns last that it is over.
            await eventually(lambda g=guest, e=event: is_past(world.a, g, e["EventId"]), "it is recorded")
            ended = past(world.a, guest, event["EventId"])
            assert ended.ending is Ending.COMPLETED
            assert ended.event.approved_by == approved
            assert (ended.event.started_s < ended.event.not_before_s) is bool(approved)
            assert ended.lasted_s is not None
            assert 0 < ended.lasted_s < 5
            assert await events(await client(world.b, guest)) == []
    finally:
        code, said = await vmferry(world, "undrain", "a")
        assert code == 0, said
        assert await world.end_guests() == []


async def vmferry(world: World, *words: str) -> tuple[int, str]:
    """A command to host a, as an operator gives it."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "vmferry.cli.main", *words),
        *("--source", world.a.source.address, "--source-host", world.a.identity.uri),
        *("--tls", str(world.tls_dir("controller"))),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, said.decode()
