"""Guests cross in QEMU's own migration stream, inside our lanes, under the same hand-off.

Under KVM the stream flows while the guest runs; QEMU's emulator loses track of writes, so there the guest is paused
for all of it. Whatever goes wrong on the way, the guest goes on at the source, nothing is left, and the next crossing
works.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.integration.hosts import MIB, World
from tests.integration.proxy import Proxy
from tests.integration.qemu.conftest import LinuxGuest, boot, linux_spec, ticker_in_stream
from tests.integration.services import DEADLINE_S, eventually, eventually_async
from vmferry.machines.spec import MachineSpec
from vmferry.v1 import compatibility_pb2, machine_pb2
from vmferry.v1 import migration_pb2 as pb

pytestmark = [pytest.mark.usefixtures("tidy"), pytest.mark.timeout(240)]

KIB = 1024
SLOW = 150 * KIB
"""So slow that the stream of the smallest guest takes some seconds."""
MEMORY_MIB = 64
PLAIN_STREAM = {"path": "stream", "compression": "none"}
"""Compressed, the stream of a guest whose memory is nearly all zero would be through at once."""
STREAM = {**PLAIN_STREAM, "downtime_limit": 30.0}


@pytest.fixture(params=["kvm", "tcg"])
def ticker(request: pytest.FixtureRequest, images: Path) -> MachineSpec:
    """The smallest guest that checks itself, streamed while it runs and streamed while it is paused."""
    return ticker_in_stream(images, request.param)


async def in_the_middle(world: World, guest: LinuxGuest, link: Proxy) -> str:
    """Start a migration that has sent a part of its stream; returns its id."""
    link.begin_migration()
    link.up_bytes_per_s = SLOW
    migration_id = await world.start(guest, world.a, world.b, address=link.address, **STREAM)
    await world.reaches(
        world.a, migration_id, lambda now: now.progress.wire_bytes > 50_000, "a part of the stream is sent"
    )
    return migration_id


async def settled(world: World, guest: LinuxGuest) -> bool:
    """Whether the source has settled what was open when it ended."""
    machine = await world.machine(world.a, guest)
    return machine.right == machine_pb2.MACHINE_RIGHT_OWNED and not machine.migration_id


async def assert_well(world: World, guest: LinuxGuest) -> None:
    """It goes on at the source, nothing is left, and it can cross either way."""
    await world.assert_stays(guest, world.a, world.b)
    left = [path.name for path in world.a.directory.paths(guest.spec).home.glob("*stream*")]
    assert left == []
    await world.assert_crosses(guest, world.a, world.b, **STREAM)
    await world.assert_crosses(guest, world.b, world.a, path="direct")


async def test_both_ways_take_turns(world: World, ticker: MachineSpec) -> None:
    """One guest crosses in streams and directly, there and back; each migration says which way it took, and why."""
    guest = await boot(world, ticker)
    here, there = world.a, world.b
    for path in ("stream", "direct", "stream", "stream", "direct"):
        migration = await world.assert_crosses(guest, here, there, path=path, downtime_limit=30.0)
        assert (migration.path, bool(migration.tracker)) == (path, path == "direct")
        assert "insists" in migration.path_reason
        assert migration.progress.memory_bytes == MEMORY_MIB * MIB
        assert migration.progress.wire_bytes > 20_000
        here, there = there, here


async def test_a_busy_linux_guest_goes_in_a_stream(world: World, images: Path, link: Proxy) -> None:
    """All its memory arrives, compressed, through lanes that are cut on the way; it finds its files as they were."""
    guest = await boot(world, linux_spec(images, vcpus=2, writes=4, nics=1))
    link.begin_migration()
    link.up_bytes_per_s = 10 * MIB
    options = {**STREAM, "compression": "zstd"}
    migration_id = await world.start(guest, world.a, world.b, address=link.address, **options)
    for sent in (4 * MIB, 10 * MIB):
        await world.reaches(
            world.a, migration_id, lambda now, sent=sent: now.progress.wire_bytes > sent, "so much is sent"
        )
        for lane in link.lanes:
            lane.reset()
    link.up_bytes_per_s = None
    migration = await world.ended(world.a, migration_id)
    assert migration.outcome == pb.MIGRATION_OUTCOME_COMPLETED, migration
    assert len(link.links) > len(link.lanes) + 3, "lanes were reopened"
    await guest.assert_clean(world.b)
    await world.assert_crosses(guest, world.b, world.a, **STREAM)


async def test_lanes_that_are_cut_go_on_where_they_were(
    world: World, ticker: MachineSpec, link: Proxy
) -> None:
    """Again and again, with pieces waiting for each other at the destination."""
    guest = await boot(world, ticker)
    migration_id = await in_the_middle(world, guest, link)
    for _ in range(3):
        before = len(link.links)
        for lane in link.lanes:
            lane.reset()
        await eventually(lambda before=before: len(link.links) > before, "a lane is reopened")
    link.up_bytes_per_s = None
    migration = await world.ended(world.a, migration_id)
    assert migration.outcome == pb.MIGRATION_OUTCOME_COMPLETED, migration
    await guest.assert_clean(world.b)


async def test_a_cancelled_stream_leaves_nothing(world: World, ticker: MachineSpec, link: Proxy) -> None:
    """QEMU's migration is ended, and the guest runs on."""
    guest = await boot(world, ticker)
    migration_id = await in_the_middle(world, guest, link)
    async with world.source(world.a) as stub:
        await stub.CancelMigration(pb.CancelMigrationRequest(id=migration_id), timeout=DEADLINE_S)
    link.up_bytes_per_s = None
    assert (await world.ended(world.a, migration_id)).outcome == pb.MIGRATION_OUTCOME_CANCELLED
    await assert_well(world, guest)


async def test_a_waiting_copy_that_is_killed_does_no_harm(
    world: World, ticker: MachineSpec, link: Proxy
) -> None:
    """The destination's QEMU dies in mid-stream."""
    guest = await boot(world, ticker)
    migration_id = await in_the_middle(world, guest, link)
    os.kill(world.b.machine_pid(guest.id), signal.SIGKILL)
    migration = await world.ended(world.a, migration_id)
    assert migration.outcome == pb.MIGRATION_OUTCOME_FAILED
    link.heal()
    await assert_well(world, guest)


async def test_a_guest_that_is_killed_is_told_as_dead(world: World, ticker: MachineSpec, link: Proxy) -> None:
    """The source's QEMU dies in mid-stream: the end of its stream is not taken for a success."""
    guest = await boot(world, ticker)
    migration_id = await in_the_middle(world, guest, link)
    os.kill(world.a.machine_pid(guest.id), signal.SIGKILL)
    link.up_bytes_per_s = None
    await eventually(lambda: not world.b.holdings(guest.spec), "the destination holds nothing")
    assert (await world.machine(world.a, guest)).state == machine_pb2.MACHINE_STATE_DEAD
    assert not world.b.ledger.rights(guest.id).permitted
    assert (await world.state(world.a, migration_id)).outcome != pb.MIGRATION_OUTCOME_COMPLETED


async def test_a_source_that_is_killed_finds_its_guest_again(
    world: World, ticker: MachineSpec, link: Proxy
) -> None:
    """The service dies with QEMU in the middle of its stream: the next start has the guest go on."""
    guest = await boot(world, ticker)
    await in_the_middle(world, guest, link)
    await world.a.source.kill()
    link.heal()
    await world.a.source.start()
    await eventually_async(lambda: settled(world, guest), "the machine is settled")
    await assert_well(world, guest)


async def test_a_destination_that_is_killed_leaves_nothing(
    world: World, ticker: MachineSpec, link: Proxy
) -> None:
    """The service dies in mid-stream: the source gives up, and the next start removes what had come."""
    guest = await boot(world, ticker)
    migration_id = await in_the_middle(world, guest, link)
    await world.b.dest.kill()
    link.heal()
    await world.b.dest.start()
    assert (await world.ended(world.a, migration_id)).outcome == pb.MIGRATION_OUTCOME_FAILED
    await assert_well(world, guest)


async def test_a_guest_is_never_paused_for_longer_than_allowed(
    world: World, ticker: MachineSpec, link: Proxy
) -> None:
    """Over a link that is too slow for the rest, or for all of it, the migration ends and the guest runs on."""
    guest = await boot(world, ticker)
    link.up_bytes_per_s = SLOW
    migration = await world.migrate(
        guest, world.a, world.b, address=link.address, **PLAIN_STREAM, downtime_limit=0.1
    )
    assert migration.outcome == pb.MIGRATION_OUTCOME_FAILED
    assert migration.reason.reason == "NOT_CONVERGING", migration.reason
    link.heal()
    await assert_well(world, guest)


async def test_a_stream_is_switched_by_hand(world: World, ticker: MachineSpec, link: Proxy) -> None:
    """Said while its stream flows, twice or not, the guest crosses, whatever the pause; it is never damaged."""
    guest = await boot(world, ticker)
    link.begin_migration()
    link.up_bytes_per_s = SLOW
    waits = {"downtime_limit": 0.1, "on_no_convergence": pb.ON_NO_CONVERGENCE_WAIT}
    allowed = waits if guest.spec.streams_live else {"downtime_limit": 30.0}
    migration_id = await world.start(guest, world.a, world.b, address=link.address, **PLAIN_STREAM, **allowed)
    await world.reaches(
        world.a, migration_id, lambda now: now.progress.wire_bytes > 50_000, "a part of the stream is sent"
    )
    async with world.source(world.a) as stub:
        for _ in range(2):
            await stub.SwitchNow(pb.SwitchNowRequest(id=migration_id), timeout=DEADLINE_S)
    migration = await world.ended(world.a, migration_id)
    assert migration.outcome == pb.MIGRATION_OUTCOME_COMPLETED, migration.reason
    assert migration.path == "stream"
    link.heal()
    await guest.assert_clean(world.b)


async def test_a_stream_keeps_to_its_limits(world: World, ticker: MachineSpec) -> None:
    """It takes as long as its caps make it, and its hypervisor takes in how far it may hold the guest back."""
    guest = await boot(world, ticker)
    slowest = 256 * KIB
    caps = {"max_bandwidth": slowest, "switchover_bandwidth": slowest, "max_throttle_percent": 60}
    here, there = world.a, world.b
    for limits in (caps, {}):
        migration = await world.assert_crosses(guest, here, there, **STREAM, **limits)
        assert migration.progress.wire_bytes > slowest // 4
        if limits:
            took_s = migration.total.ToMilliseconds() / 1000
            assert migration.progress.wire_bytes <= took_s * slowest * 1.05
        here, there = there, here


async def test_what_a_stream_cannot_do_is_refused_by_name(world: World, ticker: MachineSpec) -> None:
    """Comparing bytes blocks, in the plan and in a migration; without it the plan says what to expect."""
    guest = await boot(world, ticker)
    destination = pb.Destination(host=world.b.identity.uri, address=world.b.dest.address)
    found: list[set[tuple[int, str]]] = []
    for verify in (pb.VERIFY_MODE_BYTES, pb.VERIFY_MODE_UNSPECIFIED):
        options = pb.MigrationOptions(path="stream", verify=verify)
        request = pb.PlanMigrationRequest(machine=guest.id, destination=destination, options=options)
        async with world.source(world.a) as stub:
            report = (await stub.PlanMigration(request, timeout=DEADLINE_S)).report
        assert (report.path, report.tracker) == ("stream", "")
        found.append({(item.severity, item.id) for item in report.items})
    blocked, good = found
    paused = {(compatibility_pb2.SEVERITY_WARNS, "path.not-live")}
    notes = {"encoding.chosen", "path.stream", "prediction.unavailable"}
    assert good - paused == {(compatibility_pb2.SEVERITY_NOTE, name) for name in notes}
    assert good >= paused or guest.spec.streams_live
    assert blocked - good == {(compatibility_pb2.SEVERITY_BLOCKS, "verify.unavailable")}
    migration = await world.migrate(guest, world.a, world.b, path="stream", verify=pb.VERIFY_MODE_BYTES)
    assert migration.reason.reason == "INCOMPATIBLE"
    assert "verify.unavailable" in migration.reason.message
    await world.assert_stays(guest, world.a, world.b)
