"""Running guests cross between real services: what a caller sees, and what must be true at either side."""

from __future__ import annotations

import asyncio
import itertools
import os
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.integration.hosts import MIB, Guest, World, migration_options, open_world
from tests.integration.proxy import Link, Proxy
from tests.integration.services import DEADLINE_S, Host, descriptors, eventually, open_trackers
from tests.integration.traces import events
from vmferry.memory.runs import PAGE_SIZE
from vmferry.v1 import machine_pb2
from vmferry.v1 import migration_pb2 as pb

pytestmark = pytest.mark.usefixtures("tidy")

DIRTYING: dict[str, Any] = {"params": {"resident-mib": "4", "dirty-mib-per-s": "20", "working-set-mib": "4"}}
SLOW = 4e6
"""Bytes per second that make pre-copy of a small guest last a second or two."""


def mappings(pid: int) -> int:
    return Path(f"/proc/{pid}/maps").read_text(encoding="utf-8").count("\n")


def tracked(pid: int) -> bool:
    """Whether the kernel notes writes to memory of this process for somebody."""
    lines = Path(f"/proc/{pid}/smaps").read_text(encoding="utf-8", errors="replace").splitlines()
    return any(line.startswith("VmFlags:") and "uw" in line.split() for line in lines)


def traced_by(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return int(status.split("TracerPid:")[1].split()[0])


def carries_memory(link: Link) -> bool:
    return link.up_bytes > 64 * 1024


def permitted(host: Host, guest: Guest) -> bool:
    return host.ledger.rights(guest.id).permitted


@asynccontextmanager
async def never_two_owners(world: World, guest: Guest) -> AsyncIterator[None]:
    """Look all the time whether both hosts may run the guest."""
    looks = 0

    async def watch() -> None:
        nonlocal looks
        while True:
            # Both held it at one instant only if the first still does after the second was seen to.
            both = permitted(world.a, guest) and permitted(world.b, guest) and permitted(world.a, guest)
            assert not both
            looks += 1
            await asyncio.sleep(0)

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()
        (outcome,) = await asyncio.gather(watching, return_exceptions=True)
        assert isinstance(outcome, asyncio.CancelledError), outcome
        assert looks > 10


async def test_a_busy_guest_goes_there_and_back_five_times(world: World) -> None:
    """Ten crossings under load: the guest finds no damage, each raises the epoch, and no two hosts ever own it."""
    guest = await world.run(**DIRTYING)
    here, there = world.a, world.b
    epoch = (await world.machine(here, guest)).epoch
    async with never_two_owners(world, guest):
        for _ in range(10):
            await world.assert_crosses(guest, here, there)
            here, there = there, here
            now = (await world.machine(here, guest)).epoch
            assert now > epoch
            epoch = now


async def test_the_figures_of_a_crossing_fit_each_other(world: World) -> None:
    """Total, phases, pause and counters of one migration tell one story, and the trace id is there."""
    guest = await world.run()
    migration = await world.assert_crosses(guest, world.a, world.b, verify=pb.VERIFY_MODE_BYTES)
    total, downtime = migration.total.ToTimedelta(), migration.downtime.ToTimedelta()
    phases = [timing.phase for timing in migration.timings]
    assert phases == sorted(phases)
    assert phases[0] == pb.MIGRATION_PHASE_NEGOTIATING
    assert phases[-1] == pb.MIGRATION_PHASE_RELEASING
    spent = sum(timing.elapsed.ToNanoseconds() for timing in migration.timings) / 1e9
    # What lies between two phases is not theirs, and takes longer on a busy machine.
    slack_s = 0.05 + 0.1 * total.total_seconds()
    assert spent == pytest.approx(total.total_seconds(), abs=slack_s)
    assert 0 < downtime.total_seconds() < total.total_seconds()
    between = migration.end_time.ToDatetime() - migration.create_time.ToDatetime()
    assert between.total_seconds() == pytest.approx(total.total_seconds(), abs=slack_s)
    assert migration.progress.memory_bytes == 16 * MIB
    assert migration.progress.sent_bytes >= 4 * MIB
    assert migration.progress.wire_bytes > migration.progress.sent_bytes
    assert migration.progress.remaining_bytes == 0
    assert migration.verification.compared_bytes == 16 * MIB
    assert migration.verification.different_pages == 0
    assert len(migration.trace_id) == 32


async def test_a_watcher_sees_every_change_grow_and_then_the_end(world: World, link: Proxy) -> None:
    """Revisions only grow, phases never go back, the stream ends with the migration; so does a late watcher's."""
    guest = await world.run()
    link.up_bytes_per_s = 2 * SLOW
    migration_id = await world.start(guest, world.a, world.b, address=link.address)
    async with world.source(world.a) as stub:
        request = pb.WatchMigrationRequest(id=migration_id)
        seen = [answer.migration async for answer in stub.WatchMigration(request)]
        late = [answer.migration async for answer in stub.WatchMigration(request)]
    revisions = [migration.revision for migration in seen]
    assert len(revisions) > 5
    assert all(earlier < later for earlier, later in itertools.pairwise(revisions))
    assert [migration.phase for migration in seen] == sorted(migration.phase for migration in seen)
    assert not any(migration.progress.HasField("disconnected_since") for migration in seen)
    assert seen[-1].outcome == pb.MIGRATION_OUTCOME_COMPLETED
    assert late == [seen[-1]]


async def test_a_request_starts_one_migration_however_often_it_is_made(world: World) -> None:
    """Ten copies of a request at once, and one after the end, are all answered with the same migration."""
    guest = await world.run()
    request = world.order(guest, world.a, world.b)
    async with world.source(world.a) as stub, world.source(world.a, "admin") as other:
        calls = [caller.StartMigration(request, timeout=DEADLINE_S) for caller in (stub, other) * 5]
        (migration_id,) = {(await call).migration.id for call in calls}
        ended = await world.ended(world.a, migration_id)
        assert ended.outcome == pb.MIGRATION_OUTCOME_COMPLETED
        again = await stub.StartMigration(request, timeout=DEADLINE_S)
        assert again.migration == ended
        listed = await stub.ListMigrations(pb.ListMigrationsRequest(machine=guest.id))
    assert [migration.id for migration in listed.migrations] == [migration_id]


async def test_lists_come_in_pages(world: World) -> None:
    """Pages of one cover machines by name and migrations newest first, each exactly once."""
    guests = [await world.run() for _ in range(3)]
    ids = []
    for guest in guests[:2]:
        ids.append((await world.assert_crosses(guest, world.a, world.b)).id)
        await world.assert_crosses(guest, world.b, world.a)
    async with world.source(world.a) as stub:
        names, token = [], ""
        for _ in guests:
            page = await stub.ListMachines(pb.ListMachinesRequest(page_size=1, page_token=token))
            names += [machine.name for machine in page.machines]
            token = page.next_page_token
        assert names == sorted(guest.spec.name for guest in guests)
        assert token == ""
        found, token = [], ""
        while True:
            request = pb.ListMigrationsRequest(page_size=1, page_token=token)
            page_of_migrations = await stub.ListMigrations(request)
            found += [migration.id for migration in page_of_migrations.migrations]
            token = page_of_migrations.next_page_token
            if not token:
                break
        assert found[:2] == ids[::-1]
        assert len(found) == len(set(found))
        open_ones = await stub.ListMigrations(pb.ListMigrationsRequest(open_only=True))
        assert not open_ones.migrations


@pytest.mark.parametrize("tracker", ["pagemap-scan", "hash"])
async def test_a_machine_that_does_not_track_itself_crosses(world: World, tracker: str) -> None:
    """Attached to from outside, or compared by hashes, its memory arrives byte for byte, there and back."""
    guest = await world.run(self_track=False, **DIRTYING)
    for here, there in ((world.a, world.b), (world.b, world.a)):
        migration = await world.assert_crosses(
            guest, here, there, tracker=tracker, verify=pb.VERIFY_MODE_BYTES
        )
        assert migration.tracker == tracker


async def test_a_cancelled_attachment_leaves_nothing_in_the_guests_process(world: World, link: Proxy) -> None:
    """During pre-copy its writes are tracked; after a cancellation process and service are as before."""
    guest = await world.run(self_track=False)
    pid = world.a.machine_pid(guest.id)
    before = descriptors(pid), mappings(pid)
    assert not tracked(pid)
    link.up_bytes_per_s = SLOW
    migration_id = await world.start(guest, world.a, world.b, address=link.address)
    await eventually(lambda: tracked(pid), "writes are tracked")
    assert any("userfaultfd" in held for held in open_trackers(world.a.source.pid))
    async with world.source(world.a) as stub:
        await stub.CancelMigration(pb.CancelMigrationRequest(id=migration_id))
    ended = await world.ended(world.a, migration_id)
    assert ended.outcome == pb.MIGRATION_OUTCOME_CANCELLED
    await world.assert_stays(guest, world.a, world.b)
    assert not tracked(pid)
    assert open_trackers(world.a.source.pid) == []
    await eventually(lambda: descriptors(pid) == before[0], "the process has what it had before")
    assert mappings(pid) <= before[1]
    assert traced_by(pid) == 0
    await world.assert_crosses(guest, world.a, world.b)


@pytest.mark.parametrize("page", ["code", "zero"])
async def test_the_comparison_finds_one_flipped_bit(world: World, link: Proxy, page: str) -> None:
    """A bit that changes in the destination's memory after it was received keeps the guest at the source."""
    number = {"code": 0x10000 // PAGE_SIZE, "zero": 16 * MIB // PAGE_SIZE - 1}[page]
    guest = await world.run()
    link.up_bytes_per_s = SLOW
    migration_id = await world.start(
        guest, world.a, world.b, address=link.address, verify=pb.VERIFY_MODE_BYTES
    )
    await world.enters(world.a, migration_id, pb.MIGRATION_PHASE_PRECOPYING)
    here = os.open(world.a.record(guest.id).paths.ram, os.O_RDONLY)
    there = os.open(world.b.record(guest.id).paths.ram, os.O_RDWR)
    try:

        def arrived() -> bool:
            mine, theirs = (os.pread(file, PAGE_SIZE, number * PAGE_SIZE) for file in (here, there))
            return mine == theirs

        await eventually(arrived, "the page arrives")
        (byte,) = os.pread(there, 1, number * PAGE_SIZE + 7)
        os.pwrite(there, bytes([byte ^ 0x10]), number * PAGE_SIZE + 7)
    finally:
        os.close(here)
        os.close(there)
    link.up_bytes_per_s = None
    migration = await world.ended(world.a, migration_id)
    assert migration.verification.different_pages == 1
    await world.assert_failed_and_well(guest, world.a, world.b, migration, "HASH_MISMATCH")


async def test_broken_connections_are_not_a_broken_migration(world: World, link: Proxy) -> None:
    """Lanes that are cut again and again go on where they were; memory is identical, and the trace counts them."""
    guest = await world.run(**DIRTYING)
    link.up_bytes_per_s = SLOW
    link.begin_migration()
    migration_id = await world.start(
        guest, world.a, world.b, address=link.address, verify=pb.VERIFY_MODE_BYTES, lanes=4
    )
    # Before that, connections carry pages to measure with.
    await world.enters(world.a, migration_id, pb.MIGRATION_PHASE_PRECOPYING)
    cuts = 0

    def whole(now: pb.Migration) -> bool:
        return now.progress.lanes_connected == 4 and now.progress.reconnects == cuts

    for number in range(6):
        await world.reaches(world.a, migration_id, whole, "all lanes are connected")
        await eventually(lambda: len(link.lanes) == 4, "nothing else is")
        victim = link.lanes[number % 4]
        await eventually(partial(carries_memory, victim), "the lane carries memory")
        victim.reset()
        cuts += 1
    await world.reaches(world.a, migration_id, whole, "all lanes are connected")
    refused, link.cut = link.refused, True
    for victim in link.lanes:
        victim.reset()
        cuts += 1
    await eventually(lambda: link.refused - refused > 8, "lanes are turned away")
    link.cut = False
    link.up_bytes_per_s = None
    migration = await world.ended(world.a, migration_id)
    assert migration.outcome == pb.MIGRATION_OUTCOME_COMPLETED, migration
    assert migration.verification.different_pages == 0
    await guest.assert_clean(world.b)

    def reopened() -> list[str]:
        found = events(world.trace_dir, migration.trace_id)
        return [span for span, event, _ in found if event == "lane reopened"]

    await eventually(lambda: len(reopened()) >= cuts, "the trace tells of every cut")


async def test_lanes_may_be_as_many_as_documented(world: World) -> None:
    """Two lanes and sixteen lanes both work."""
    guest = await world.run()
    await world.assert_crosses(guest, world.a, world.b, lanes=2)
    await world.assert_crosses(guest, world.b, world.a, lanes=16)


async def test_a_plan_changes_nothing(world: World) -> None:
    """A plan says what would block without changing anything, and finds nothing against a good pair."""
    guest = await world.run()
    async with world.source(world.a) as stub:
        request = pb.PlanMigrationRequest(
            machine=guest.id,
            destination=pb.Destination(host=world.b.identity.uri, address=world.b.dest.address),
            options=migration_options(),
        )
        report = (await stub.PlanMigration(request, timeout=DEADLINE_S)).report
    assert report.compatible
    assert report.protocol_version == 2
    assert (report.path, report.path_reason != "") == ("direct", True)
    assert report.tracker
    await world.assert_stays(guest, world.a, world.b)


@pytest.mark.slow
async def test_the_services_stay_small_whatever_the_guests_size() -> None:
    """A GiB of guest, half of it filled, crosses while no service ever has 200 MiB resident."""
    async with open_world() as world:
        guest = await world.run(memory_mib=1024, params={"resident-mib": "512"})
        await eventually(
            lambda: "tick=" in guest.serial(world.a), "the guest has filled its memory", seconds=90
        )
        migration = await world.assert_crosses(guest, world.a, world.b)
        assert migration.progress.sent_bytes >= 512 * MIB
        for service in world.services:
            assert int(service.status("VmHWM").split()[0]) < 200 * 1024, service.role
        assert await world.end_guests() == []


async def test_both_sides_say_the_same_about_a_machine_on_its_way(world: World, link: Proxy) -> None:
    """In pre-copy the source calls it LEAVING and running, the destination ARRIVING; nobody else may take it."""
    guest = await world.run()
    link.up_bytes_per_s = SLOW
    migration_id = await world.start(guest, world.a, world.b, address=link.address)
    await world.enters(world.a, migration_id, pb.MIGRATION_PHASE_PRECOPYING)
    leaving, arriving = await world.machine(world.a, guest), await world.machine(world.b, guest)
    assert leaving.right == machine_pb2.MACHINE_RIGHT_LEAVING
    assert leaving.state == machine_pb2.MACHINE_STATE_RUNNING
    assert leaving.migration_id == migration_id
    assert arriving.right == machine_pb2.MACHINE_RIGHT_ARRIVING
    assert arriving.state == machine_pb2.MACHINE_STATE_INCOMING
    link.up_bytes_per_s = None
    assert (await world.ended(world.a, migration_id)).outcome == pb.MIGRATION_OUTCOME_COMPLETED


async def test_a_request_id_is_a_uuid_of_the_callers_choice(world: World) -> None:
    """Two requests for two machines are two migrations, told apart by their ids."""
    guests = [await world.run() for _ in range(2)]
    ids = {await world.start(guest, world.a, world.b) for guest in guests}
    assert len(ids) == 2
    for migration_id in ids:
        assert (await world.ended(world.a, migration_id)).outcome == pb.MIGRATION_OUTCOME_COMPLETED
        assert uuid.UUID(migration_id).hex == migration_id
