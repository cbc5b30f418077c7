"""A plan tells the truth beforehand: mismatches are provoked for real between two hosts, several at once.

Each test compares everything that a plan says beyond notes, so nothing may be missing and nothing may be added.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.integration.hosts import MIB, Guest, World, configured, open_world
from tests.integration.proxy import Proxy
from tests.integration.qemu.networks import BRIDGE, other_interfaces, tap_interfaces
from tests.integration.qemu.planning import (
    Told,
    as_on,
    beyond_notes,
    by_hand,
    path_with,
    plan,
    qemu_by_path,
    run_bare,
)
from tests.integration.services import Host, Service, eventually
from tests.support import require
from vmferry.machines.launcher import discard_leftover, start_machine
from vmferry.machines.qemu.spec import DiskSpec, NicSpec, QemuSpec
from vmferry.machines.spec import new_mac, new_qemu_spec
from vmferry.security.authority import issue
from vmferry.v1 import migration_pb2 as pb

pytestmark = [pytest.mark.usefixtures("tidy"), pytest.mark.timeout(240)]

TAPS = ("vfplan0", "vfplan1", "vfplan2")


@pytest.fixture(scope="module")
def binary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The path that both hosts know QEMU by."""
    return qemu_by_path(tmp_path_factory.mktemp("bin"))


@pytest.fixture(scope="module")
async def world(images: Path, binary: Path) -> AsyncIterator[World]:
    """Hosts a and b."""
    binaries = (QemuSpec.binary, str(binary))
    async with open_world(
        image_roots=(images,), qemu_binaries=tuple(map(Path, binaries)), taps=TAPS
    ) as opened:
        guest = await run_bare(opened)
        assert beyond_notes(await plan(opened, guest)) == [], "two equal hosts differ"
        await opened.end_guests()
        yield opened


def blocks(name: str, about: str) -> tuple[str, str, str]:
    """One finding that blocks."""
    return ("blocks", name, about)


def warns(name: str, about: str) -> tuple[str, str, str]:
    """One that warns."""
    return ("warns", name, about)


async def told(world: World, guest: Guest, **how: Any) -> Told:
    """Everything that a plan from a to b says beyond notes."""
    return beyond_notes(await plan(world, guest, **how))


# What the machine is


async def test_a_paused_machine(world: World) -> None:
    """It is told as paused, not as broken or unreachable."""
    guest = await run_bare(world)
    async with by_hand(world.a, guest) as monitor:
        await monitor.execute("stop")
    items = await plan(world, guest)
    assert beyond_notes(items) == [blocks("machine.not-running", guest.spec.name)]
    assert "is paused (paused)" in items[0].message


async def test_a_dead_machine(world: World) -> None:
    """Its process was killed: that is what is said, and nothing is guessed about what it was."""
    guest = await run_bare(world)
    os.kill(world.a.machine_pid(guest.id), signal.SIGKILL)
    await eventually(lambda: not world.a.record(guest.id).alive, "the process has ended")
    assert await told(world, guest) == [blocks("machine.dead", guest.spec.name)]


async def test_a_machine_that_cannot_be_asked(world: World) -> None:
    """Somebody removed its socket: the plan says so in the words of the system, and does not call it stopped."""
    guest = await run_bare(world)
    world.a.record(guest.id).paths.observer.unlink()
    items = await plan(world, guest)
    assert beyond_notes(items) == [blocks("machine.unreachable", guest.spec.name)]
    assert "No such file" in items[0].message


async def test_a_machine_that_is_changed_by_hand(world: World) -> None:
    """A device that was plugged in is named, with its type."""
    guest = await run_bare(world)
    async with by_hand(world.a, guest) as monitor:
        await monitor.execute("device_add", {"driver": "virtio-rng-pci", "id": "extra"})
    items = await plan(world, guest)
    assert beyond_notes(items) == [blocks("machine.differs", "extra")]
    assert "extra (virtio-rng-pci)" in items[0].message


async def test_a_device_in_another_process(world: World, tmp_path: Path) -> None:
    """A disk that another process serves is found by its type, whoever plugged it in."""
    daemon = shutil.which("qemu-storage-daemon")
    require(daemon, "no qemu-storage-daemon (comes with qemu-system-x86)")
    image, path = tmp_path / "disk.raw", tmp_path / "vhost.sock"
    image.write_bytes(bytes(MIB))
    export = f"type=vhost-user-blk,id=export,addr.type=unix,addr.path={path},node-name=disk"
    command = [str(daemon), "--blockdev", f"driver=file,node-name=disk,filename={image}", "--export", export]
    process = await asyncio.create_subprocess_exec(*command)
    try:
        await eventually(path.exists, "the back end listens")
        guest = await run_bare(world)
        async with by_hand(world.a, guest) as monitor:
            address = {"type": "unix", "data": {"path": str(path)}}
            backend = {"type": "socket", "data": {"addr": address, "server": False}}
            await monitor.execute("chardev-add", {"id": "served", "backend": backend})
            await monitor.execute(
                "device_add", {"driver": "vhost-user-blk-pci", "id": "away", "chardev": "served"}
            )
        assert await told(world, guest) == [
            blocks("device.vhost-user", "away (vhost-user-blk-pci)"),
            blocks("machine.differs", "away"),
        ]
        await world.end_guests()
    finally:
        process.terminate()
        await process.wait()


async def test_a_machine_that_means_something_else_elsewhere(world: World) -> None:
    """One that was started behind our back from an alias is refused: the alias has another meaning on other hosts."""
    spec = new_qemu_spec("alias", 16, 1, QemuSpec(machine="pc", accelerator="tcg"))
    guest = Guest(spec, world.a)
    world.guests.append(guest)
    machine = await start_machine(spec, world.a.directory)
    try:
        await machine.cont(world.a.ledger.birth(spec.uuid))
    finally:
        await machine.close()
    assert await told(world, guest) == [blocks("machine.unresolved", "qemu.machine")]


# Whose it is, and what else goes on


async def test_a_machine_of_another_host(world: World) -> None:
    """This host's journal says that it is gone, and the destination's that it is there: both are told."""
    guest = await run_bare(world)
    world.a.ledger.end(guest.id)
    world.b.ledger.birth(guest.id)
    try:
        assert await told(world, guest) == [
            blocks("machine.already-there", guest.id),
            blocks("machine.not-owned", guest.spec.name),
        ]
    finally:
        world.b.ledger.end(guest.id)
        await discard_leftover(guest.id, world.a.directory)


async def test_a_name_that_is_taken(world: World) -> None:
    """Another machine of that name at the destination stands in the way."""
    guest = await run_bare(world)
    await run_bare(world, world.b, name=guest.spec.name)
    assert await told(world, guest) == [blocks("machine.name-taken", guest.spec.name)]


async def test_a_machine_on_its_way(world: World, link: Proxy) -> None:
    """While it moves it is busy, and the host is full for others; its own copy is not in its way."""
    moving, waiting = await world.run(memory_mib=64), await run_bare(world)
    async with configured(world.b.dest, max_incoming=1, receive_timeout_s=30.0):
        link.up_bytes_per_s = MIB
        migration_id = await world.start(moving, world.a, world.b, address=link.address)
        await world.enters(world.a, migration_id, pb.MIGRATION_PHASE_PRECOPYING)
        full = warns("host.full", world.b.identity.uri)
        assert await told(world, moving) == [blocks("machine.busy", moving.spec.name)]
        assert await told(world, waiting) == [full]
        async with world.source(world.a) as stub:
            await stub.CancelMigration(pb.CancelMigrationRequest(id=migration_id))
        link.heal()
        await world.ended(world.a, migration_id)


async def test_trackers_that_are_insisted_on(world: World) -> None:
    """One that does not work here blocks, the slow one warns, and nothing else is chosen instead."""
    guest = await run_bare(world)
    missing = [item.object for item in await plan(world, guest) if item.id.startswith("tracker.")]
    for tracker in missing:
        assert await told(world, guest, tracker=tracker) == [blocks("tracker.unavailable", tracker)]
    assert await told(world, guest, tracker="hash") == [warns("tracker.slow", "hash")]


# What the destination has


async def test_files_that_are_not_there(world: World, images: Path, tmp_path: Path) -> None:
    """A missing, a misplaced and a wrong file and a local disk are told together, each by its field."""
    kernel, firmware, disk = images / "plan-kernel", images / "plan-firmware", images / "plan-disk.raw"
    kernel.write_bytes((images / "vmlinuz").read_bytes())
    firmware.write_bytes(bytes(128 * 1024))
    disk.write_bytes(bytes(MIB))
    (tmp_path / "initrd").write_bytes(b"nothing")
    guest = await run_bare(
        world,
        kernel=str(kernel),
        initrd=str(tmp_path / "initrd"),
        firmware=str(firmware),
        disks=(DiskSpec(path=str(disk), format="raw"),),
    )
    kernel.unlink()
    firmware.unlink()
    firmware.mkdir()
    try:
        assert await told(world, guest) == [
            blocks("disk.not-shared", "qemu.disks[0].path"),
            blocks("file.missing", "qemu.kernel"),
            blocks("file.not-regular", "qemu.firmware"),
            blocks("file.outside-roots", "qemu.initrd"),
            warns("file.unverified", "qemu.firmware"),
            warns("file.unverified", "qemu.kernel"),
        ]
    finally:
        firmware.rmdir()


async def test_a_host_with_no_room(world: World) -> None:
    """Emptied, without memory, without that QEMU, that tap or processors enough, and soon without a certificate."""
    require(os.geteuid() == 0 and shutil.which("ip"), "making tap interfaces needs root and iproute2")
    nic = NicSpec(backend="tap", tap=TAPS[0], mac=new_mac())
    with tap_interfaces(TAPS[0]):
        guest = await run_bare(world, vcpus=2, nics=(nic,))
        b = world.b.identity.uri
        with soon_expiring(world, world.b):
            spoilt = {"draining": True, "memory_headroom_mib": 1 << 30, "qemu_binaries": (), "taps": ()}
            async with configured(world.b.dest, **spoilt):
                on_one_processor(world.b.dest)
                assert await told(world, guest) == [
                    blocks("certificate.expires", b),
                    blocks("host.draining", b),
                    blocks("hypervisor.not-allowed", "qemu.binary"),
                    blocks("machine.kind-unsupported", "qemu"),
                    blocks("memory.insufficient", b),
                    blocks("network.not-allowed", "qemu.nics[0].tap"),
                    warns("host.cpus", b),
                ]
        await world.end_guests()


@contextlib.contextmanager
def soon_expiring(world: World, host: Host) -> Iterator[None]:
    """Give a host a certificate that ends before a migration could."""
    authority, folder = world.root / "tls" / "authority", world.tls_dir(host.name)
    now = datetime.now(UTC)
    issue(authority, host.identity, folder, not_after=now + timedelta(seconds=100), force=True)
    try:
        yield
    finally:
        issue(authority, host.identity, folder, force=True)


def on_one_processor(service: Service) -> None:
    """Leave a service one processor, as a small host would have."""
    for thread in Path(f"/proc/{service.pid}/task").iterdir():
        os.sched_setaffinity(int(thread.name), {min(os.sched_getaffinity(0))})


async def test_a_host_that_is_emptied(world: World) -> None:
    """A migration there fails by the same finding, and nothing of it arrives; its machines may leave."""
    there = await world.run(world.b)
    guest = await world.run()
    async with configured(world.b.dest, draining=True):
        migration = await world.migrate(guest, world.a, world.b)
        assert migration.reason.reason == "INCOMPATIBLE"
        assert "host.draining" in migration.reason.message
        await world.assert_stays(guest, world.a, world.b)
        await world.assert_crosses(there, world.b, world.a)


async def test_networks_that_lead_elsewhere(world: World) -> None:
    """Another bridge, smaller packets, one switched off and one that is missing are told, each with its interface."""
    require(os.geteuid() == 0 and shutil.which("ip"), "making tap interfaces needs root and iproute2")
    nics = tuple(NicSpec(backend="tap", tap=tap, mac=new_mac()) for tap in TAPS)
    elsewhere = (
        f"ip tuntap add {TAPS[0]} mode tap",
        f"ip link set {TAPS[0]} mtu 1400 up",
        f"ip link add {BRIDGE} type bridge",
        f"ip tuntap add {TAPS[2]} mode tap",
        f"ip link set {TAPS[2]} master {BRIDGE}",
    )
    with tap_interfaces(*TAPS), other_interfaces(world.b.dest, *elsewhere):
        guest = await run_bare(world, nics=nics)
        await world.b.dest.restart()
        assert await told(world, guest) == [
            blocks("network.missing", "qemu.nics[1].tap"),
            blocks("network.mtu", "qemu.nics[0].tap"),
            warns("network.bridge", "qemu.nics[0].tap"),
            warns("network.down", "qemu.nics[2].tap"),
        ]
        await world.end_guests()
    await world.b.dest.restart()


async def test_a_processor_that_shows_less(world: World, binary: Path, tmp_path: Path) -> None:
    """The same model has a feature more on host a, as after an update there: the guest sees it, and would lose it."""
    adds = 'for w; do shift; case $w in *,enforce) w=$w,aes=on;; esac; set -- "$@" "$w"; done'
    with as_on(path_with(f'{adds}\nexec {QemuSpec.binary} "$@"', tmp_path)):
        guest = await run_bare(world, binary=str(binary))
    items = await plan(world, guest)
    assert beyond_notes(items) == [blocks("cpu.features-missing", guest.spec.name)]
    assert "aes (CPUID 0x1 ECX bit 25)" in items[0].message


async def test_a_processor_that_cannot_be_had(world: World, binary: Path, tmp_path: Path) -> None:
    """A model that the destination cannot offer in full, on a host that did not insist on that, is refused there."""
    drops = 'for w; do shift; case $w in *,enforce) w=${w%,enforce};; esac; set -- "$@" "$w"; done'
    with as_on(path_with(f'{drops}\nexec {QemuSpec.binary} "$@"', tmp_path)):
        guest = await run_bare(world, binary=str(binary), cpu="Skylake-Server-v1")
    assert await told(world, guest) == [blocks("accelerator.unavailable", "qemu.accelerator")]
