"""A Linux guest in QEMU crosses between two hosts, and survives everything that goes wrong on the way."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.integration.hosts import MIB, World, configured
from tests.integration.proxy import Proxy
from tests.integration.qemu.conftest import LinuxGuest, boot, linux_spec
from tests.integration.qemu.crossings import SLOW, damage, plan
from tests.integration.qemu.leftovers import left_in_process
from tests.integration.services import (
    DEADLINE_S,
    descriptors,
    eventually,
    eventually_async,
    open_trackers,
)
from vmferry.machines.qemu.spec import DiskSpec
from vmferry.machines.spec import MachineSpec
from vmferry.memory.regions import find_mapping
from vmferry.memory.trackers import PagemapScanTracker
from vmferry.v1 import machine_pb2
from vmferry.v1 import migration_pb2 as pb

pytestmark = [pytest.mark.usefixtures("tidy"), pytest.mark.timeout(240)]


async def arriving(world: World, guest: LinuxGuest, link: Proxy) -> str:
    """Start a migration that stays in pre-copy; returns its id."""
    link.up_bytes_per_s = SLOW
    migration_id = await world.start(guest, world.a, world.b, address=link.address)
    await world.enters(world.a, migration_id, pb.MIGRATION_PHASE_PRECOPYING)
    await eventually(lambda: open_trackers(world.a.source.pid), "writes are tracked")
    return migration_id


@pytest.mark.parametrize(("vcpus", "crossings"), [(1, 2), (2, 6), (4, 2)])
async def test_a_busy_linux_guest_goes_there_and_back(
    world: World, images: Path, vcpus: int, crossings: int
) -> None:
    """It counts on, its files stay what they were, and nothing is left in its process; the trace names the state."""
    guest = await boot(world, linux_spec(images, vcpus=vcpus, writes=4, nics=1))
    here, there = world.a, world.b
    for _ in range(crossings):
        migration = await world.assert_crosses(guest, here, there)
        assert migration.tracker == "pagemap-scan"
        here, there = there, here
        assert left_in_process(here, guest) == []

    saved, seen = [
        await eventually(
            lambda name=name: next(spans(world.trace_dir, migration.trace_id, name), None),  # type: ignore[misc]
            "the trace is written",
        )
        for name in ("device state", "seal")
    ]
    assert seen["vmferry.sections"] > 25
    assert 20_000 < seen["vmferry.section_bytes"] < saved["vmferry.bytes"] < MIB


def spans(trace_dir: Path, trace_id: str, name: str) -> Iterator[dict[str, int]]:
    """The numbers that a trace tells of the spans of one name."""
    for path in trace_dir.glob("*.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines():
            for resource in json.loads(line)["resourceSpans"]:
                for span in (span for scope in resource["scopeSpans"] for span in scope["spans"]):
                    if (span["traceId"], span["name"]) == (trace_id, name):
                        yield {
                            item["key"]: int(item["value"]["intValue"])
                            for item in span["attributes"]
                            if "intValue" in item["value"]
                        }


async def test_a_cancelled_crossing_leaves_no_trace(world: World, images: Path, link: Proxy) -> None:
    """No userfaultfd stays in the process or the service, the guest runs on, and the next crossing completes."""
    guest = await boot(world, linux_spec(images, writes=4))
    migration_id = await arriving(world, guest, link)
    assert (
        len(left_in_process(world.a, guest)) == 1
    )  # the kernel notes writes, for a descriptor held elsewhere
    async with world.source(world.a) as stub:
        await stub.CancelMigration(pb.CancelMigrationRequest(id=migration_id), timeout=DEADLINE_S)
    ended = await world.ended(world.a, migration_id)
    assert ended.outcome == pb.MIGRATION_OUTCOME_CANCELLED
    assert left_in_process(world.a, guest) == []
    assert open_trackers(world.a.source.pid) == []
    await world.assert_stays(guest, world.a, world.b)
    await world.assert_crosses(guest, world.a, world.b)


async def test_a_waiting_copy_that_is_killed_does_no_harm(world: World, images: Path, link: Proxy) -> None:
    """The destination's QEMU dies in pre-copy: the guest runs on at the source, and crosses the next time."""
    guest = await boot(world, linux_spec(images))
    migration_id = await arriving(world, guest, link)
    os.kill(world.b.machine_pid(guest.id), signal.SIGKILL)
    migration = await world.ended(world.a, migration_id)
    assert migration.outcome == pb.MIGRATION_OUTCOME_FAILED
    assert left_in_process(world.a, guest) == []
    await world.assert_stays(guest, world.a, world.b)
    await world.assert_crosses(guest, world.a, world.b)


async def test_a_guest_that_is_killed_is_told_as_dead(world: World, images: Path, link: Proxy) -> None:
    """The source's QEMU dies in pre-copy: nothing arrives, and the destination holds nothing."""
    guest = await boot(world, linux_spec(images))
    migration_id = await arriving(world, guest, link)
    os.kill(world.a.machine_pid(guest.id), signal.SIGKILL)
    link.up_bytes_per_s = None
    await eventually(lambda: not world.b.holdings(guest.spec), "the destination holds nothing")
    assert (await world.machine(world.a, guest)).state == machine_pb2.MACHINE_STATE_DEAD
    assert not world.b.ledger.rights(guest.id).permitted
    assert (await world.state(world.a, migration_id)).outcome != pb.MIGRATION_OUTCOME_COMPLETED


async def test_a_guest_is_given_back_after_its_state_was_saved(
    world: World, images: Path, link: Proxy
) -> None:
    """Damage found in the pause, with QEMU in postmigrate, gives the guest back; the next crossing completes."""
    guest = await boot(world, linux_spec(images))
    link.up_bytes_per_s = SLOW
    migration_id = await world.start(
        guest, world.a, world.b, address=link.address, verify=pb.VERIFY_MODE_BYTES, downtime_limit=5.0
    )
    await world.enters(world.a, migration_id, pb.MIGRATION_PHASE_PRECOPYING)
    ram_here, ram_there = (host.record(guest.id).paths.ram for host in (world.a, world.b))
    with ram_here.open("rb") as here, ram_there.open("r+b", buffering=0) as there:
        damaged = await eventually(lambda: damage(here.fileno(), there.fileno()), "pages have arrived")
    link.up_bytes_per_s = None
    migration = await world.ended(world.a, migration_id)
    assert migration.outcome == pb.MIGRATION_OUTCOME_FAILED
    assert migration.reason.reason == "HASH_MISMATCH"
    assert 0 < migration.verification.different_pages <= damaged
    await world.assert_stays(guest, world.a, world.b)
    await world.assert_crosses(guest, world.a, world.b, verify=pb.VERIFY_MODE_BYTES, downtime_limit=5.0)


async def test_a_save_that_is_broken_off_does_not_hold_the_guest(world: World, images: Path) -> None:
    """A pause that may take no time ends wherever QEMU is in saving itself: the guest goes on, again and again."""
    guest = await boot(world, linux_spec(images))
    async with configured(world.a.source, switch_timeout_s=0.012):
        for _ in range(3):
            migration = await world.migrate(guest, world.a, world.b)
            assert migration.outcome == pb.MIGRATION_OUTCOME_FAILED, migration
            assert migration.reason.reason == "TIMED_OUT"
            await guest.wait_ticks(world.a)
    await world.assert_stays(guest, world.a, world.b)
    await world.assert_crosses(guest, world.a, world.b)


async def test_tracking_comes_and_goes_without_a_trace(world: World, images: Path) -> None:
    """Armed and disarmed again and again, a busy and then a paused guest of four processors keeps no descriptor."""
    guest = await boot(world, linux_spec(images, vcpus=4, writes=4))
    machine = world.a.directory.open(world.a.record(guest.id))
    before = descriptors(machine.pid)
    mapped = find_mapping(machine.pid, machine.ram)
    try:
        for number in range(30):
            if number == 20:
                await machine.stop()
            tracker = PagemapScanTracker(mapped)
            await asyncio.to_thread(tracker.arm)
            tracker.scan()
            tracker.disarm()
        await machine.cont(world.a.ledger.permit(guest.id))
    finally:
        await machine.close()
    await eventually(lambda: descriptors(machine.pid) == before, "all is as before")
    await guest.assert_clean(world.a)


async def test_a_source_that_is_killed_tracks_no_more(world: World, images: Path, link: Proxy) -> None:
    """The service dies with the tracking armed: its next start gives the guest back, and nothing stays armed."""
    guest = await boot(world, linux_spec(images, writes=4))
    await arriving(world, guest, link)
    await world.a.source.kill()
    link.up_bytes_per_s = None
    assert left_in_process(world.a, guest) == []
    await guest.wait_ticks(world.a)
    await world.a.source.start()

    async def settled() -> bool:
        machine = await world.machine(world.a, guest)
        return machine.right == machine_pb2.MACHINE_RIGHT_OWNED and not machine.migration_id

    await eventually_async(settled, "the machine is settled")
    await world.assert_stays(guest, world.a, world.b)
    await world.assert_crosses(guest, world.a, world.b)


def with_disks(spec: MachineSpec, folder: Path) -> MachineSpec:
    """The same with a local and a shared disk."""
    assert spec.qemu is not None
    disks = []
    for name in ("local", "shared"):
        path = folder / f"{name}.raw"
        path.write_bytes(bytes(MIB))
        disks.append(DiskSpec(path=str(path), format="raw", shared=name == "shared"))
    return replace(spec, qemu=replace(spec.qemu, disks=tuple(disks)))


async def test_a_plan_names_all_that_stands_in_the_way(world: World, images: Path, tmp_path: Path) -> None:
    """A local disk and a file outside of the roots block together; the machine runs on, and a start is refused."""
    spec = with_disks(linux_spec(images), images)
    (tmp_path / "initrd").write_bytes((images / "initrd").read_bytes())
    assert spec.qemu is not None
    spec = replace(spec, qemu=replace(spec.qemu, initrd=str(tmp_path / "initrd")))
    guest = await boot(world, spec)
    found = await plan(world, guest)
    assert set(found) == {"disk.not-shared", "file.outside-roots"}
    assert found["disk.not-shared"].object == "qemu.disks[0].path"
    assert found["file.outside-roots"].object == "qemu.initrd"
    migration = await world.migrate(guest, world.a, world.b)
    assert migration.reason.reason == "INCOMPATIBLE"
    assert all(name in migration.reason.message for name in found)
    await guest.assert_clean(world.a)


async def test_a_good_pair_has_nothing_in_the_way(world: World, images: Path) -> None:
    """A plan for a machine that can cross blocks and changes nothing; it crosses with the slow tracker too."""
    guest = await boot(world, linux_spec(images))
    assert await plan(world, guest) == {}
    await world.assert_stays(guest, world.a, world.b)
    migration = await world.assert_crosses(guest, world.a, world.b, tracker="hash", downtime_limit=5.0)
    assert migration.tracker == "hash"
