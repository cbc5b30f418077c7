"""Linux guests with disks on shared storage cross, and their file systems stay whole; other disks stay."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.integration.hosts import World
from tests.integration.proxy import Proxy
from tests.integration.qemu.conftest import LinuxGuest, boot
from tests.integration.qemu.crossings import SLOW, damage, plan
from tests.integration.qemu.disks import (
    assert_on_disk,
    disk_spec,
    done,
    locked,
    locks,
    make_image,
    missing_tools,
    seeing,
    tool,
    writes,
)
from tests.integration.services import Host, eventually, eventually_async
from tests.support import require
from vmferry.cli.machine import end_machine
from vmferry.errors import MachineFailedError
from vmferry.machines.launcher import start_machine, stop_machine
from vmferry.machines.qemu import guest
from vmferry.machines.qemu.guest import verdict
from vmferry.machines.qemu.probe import resolve
from vmferry.machines.qemu.spec import DiskSpec
from vmferry.v1 import compatibility_pb2, machine_pb2
from vmferry.v1 import migration_pb2 as pb

pytestmark = [pytest.mark.usefixtures("tidy", "images_with_modules"), pytest.mark.timeout(300)]


@pytest.fixture(scope="session")
def images_with_modules(images: Path) -> None:
    """In the folder of images, an initial file system with what the guest's kernel needs for a disk."""
    require(not missing_tools(), f"no {', '.join(missing_tools())} (apt install e2fsprogs qemu-utils)")
    kernel = guest.newest_kernel()
    modules = guest.modules_of(kernel, guest.DISK_MODULES)
    (images / "initrd-disk").write_bytes(guest.initramfs(modules=modules))


@pytest.fixture
async def store(images: Path, world: World) -> AsyncIterator[Path]:
    """A folder for a test's images; nothing but these may be left in it."""
    folder = images / "store"
    folder.mkdir()
    yield folder
    await world.end_guests()
    left = hidden_in(folder)
    shutil.rmtree(folder)
    assert left == []


def hidden_in(folder: Path) -> list[str]:
    """Beacons, and whatever else hides in a folder."""
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


async def findings(world: World, linux: LinuxGuest) -> dict[str, compatibility_pb2.CompatibilityItem]:
    """What blocks, after the store was looked at."""
    found = await plan(world, linux)
    assert linux.spec.qemu is not None
    assert hidden_in(Path(linux.spec.qemu.disks[0].path).parent) == []
    return found


def assert_locked_by(world: World, linux: LinuxGuest, host: Host, disk: DiskSpec) -> None:
    """The machine's process on this host has taken the disk for itself."""
    assert locks(host.machine_pid(linux.id), Path(disk.path)) >= 2


@pytest.mark.parametrize("form", ["raw", "qcow2"])
async def test_a_written_file_system_survives_crossings(
    world: World, images: Path, store: Path, tmp_path: Path, form: str
) -> None:
    """A guest writes, syncs and reads back all the way; then its file system is whole and nothing is missing."""
    disk = make_image(store / f"disk.{form}", form)
    linux = await boot(world, disk_spec(images, disk))
    here, there = world.a, world.b
    last = await writes(linux, here)
    for _ in range(4):
        await world.assert_crosses(linux, here, there)
        here, there = there, here
        assert_locked_by(world, linux, here, disk)
        now = await writes(linux, here)
        assert now.number > last.number
        last = now
    with here.record(linux.id).paths.serial.open(encoding="ascii", errors="replace") as said:
        await end_machine(linux.id, here.config)
        written = verdict.verdict(said.read()).written
    assert_on_disk(disk, written, tmp_path)


async def test_a_cancelled_crossing_keeps_the_disk(
    world: World, images: Path, store: Path, link: Proxy
) -> None:
    """While a copy waits elsewhere the source alone has the disk; given back, its guest writes on."""
    disk = make_image(store / "disk.raw")
    linux = await boot(world, disk_spec(images, disk))
    link.up_bytes_per_s = SLOW
    migration_id = await world.start(linux, world.a, world.b, address=link.address)
    await world.enters(world.a, migration_id, pb.MIGRATION_PHASE_PRECOPYING)
    assert locks(world.b.machine_pid(linux.id), Path(disk.path)) == 0
    assert_locked_by(world, linux, world.a, disk)
    async with world.source(world.a) as stub:
        await stub.CancelMigration(pb.CancelMigrationRequest(id=migration_id))
    await world.ended(world.a, migration_id)
    await world.assert_stays(linux, world.a, world.b)
    await writes(linux, world.a)


async def damaged_on_the_way(world: World, linux: LinuxGuest, link: Proxy) -> str:
    """Start a migration that will be given back after the source's hypervisor has let its disks go."""
    link.up_bytes_per_s = SLOW
    migration_id = await world.start(
        linux, world.a, world.b, address=link.address, verify=pb.VERIFY_MODE_BYTES, downtime_limit=5.0
    )
    await world.enters(world.a, migration_id, pb.MIGRATION_PHASE_PRECOPYING)
    ram_here, ram_there = (host.record(linux.id).paths.ram for host in (world.a, world.b))
    with ram_here.open("rb") as here, ram_there.open("r+b", buffering=0) as there:
        await eventually(lambda: damage(here.fileno(), there.fileno()), "pages have arrived")
    link.up_bytes_per_s = None
    return migration_id


async def paused_at(world: World, linux: LinuxGuest, host: Host) -> None:
    """Wait until a host's guest is its own, and stands."""

    async def stands() -> bool:
        machine = await world.machine(host, linux)
        right, state = machine_pb2.MACHINE_RIGHT_OWNED, machine_pb2.MACHINE_STATE_PAUSED
        return (machine.right, machine.state) == (right, state)

    await eventually_async(stands, "the guest is paused where it belongs")


async def test_a_guest_is_given_back_once_its_disk_is_free(
    world: World, images: Path, store: Path, link: Proxy
) -> None:
    """A lock that is held elsewhere in the give-back keeps the guest paused, and told; it goes on when that ends."""
    disk = make_image(store / "disk.raw")
    linux = await boot(world, disk_spec(images, disk))
    with locked(Path(disk.path)):
        migration_id = await damaged_on_the_way(world, linux, link)
        told = await world.reaches(
            world.a, migration_id, lambda now: now.reason.reason == "MACHINE_FAILED", "the lock is told"
        )
        assert "lock" in told.reason.message
        assert told.phase != pb.MIGRATION_PHASE_ENDED
        assert told.outcome == pb.MIGRATION_OUTCOME_UNSPECIFIED
        assert told.owner == world.a.identity.uri
        await paused_at(world, linux, world.a)
        await eventually(lambda: not world.b.holdings(linux.spec), "the other host holds nothing")
    ended = await world.ended(world.a, migration_id)
    assert (ended.outcome, ended.reason.reason) == (pb.MIGRATION_OUTCOME_FAILED, "HASH_MISMATCH")
    await world.assert_stays(linux, world.a, world.b)
    assert_locked_by(world, linux, world.a, disk)
    await writes(linux, world.a)
    await world.assert_crosses(linux, world.a, world.b)


@pytest.mark.parametrize("end", ["stopped", "killed"])
async def test_a_guest_is_given_back_by_the_next_start(
    world: World, images: Path, store: Path, link: Proxy, end: str
) -> None:
    """The source service ends while its guest waits for its disk: the next one tries on, until it works."""
    disk = make_image(store / "disk.raw")
    linux = await boot(world, disk_spec(images, disk))
    with locked(Path(disk.path)):
        migration_id = await damaged_on_the_way(world, linux, link)
        await world.reaches(
            world.a, migration_id, lambda now: now.reason.reason == "MACHINE_FAILED", "the lock is told"
        )
        await (world.a.source.stop() if end == "stopped" else world.a.source.kill())
        await world.a.source.start()
        await paused_at(world, linux, world.a)
    await writes(linux, world.a)
    await world.assert_stays(linux, world.a, world.b)
    await world.assert_crosses(linux, world.a, world.b)


async def test_a_guest_goes_on_at_the_destination_once_its_disk_is_free(
    world: World, images: Path, store: Path
) -> None:
    """A destination that owns the machine and does not get its disk tries on, and the source waits for its answer."""
    disk = make_image(store / "disk.raw")
    linux = await boot(world, disk_spec(images, disk))
    with locked(Path(disk.path)):
        migration_id = await world.start(linux, world.a, world.b)
        await world.reaches(
            world.a, migration_id, lambda now: now.outcome == pb.MIGRATION_OUTCOME_UNKNOWN, "the wait is told"
        )
        await paused_at(world, linux, world.b)
        assert locks(world.a.machine_pid(linux.id), Path(disk.path)) == 0
    ended = await world.ended(world.a, migration_id)
    assert ended.outcome == pb.MIGRATION_OUTCOME_COMPLETED
    assert world.a.holdings(linux.spec) == []
    assert_locked_by(world, linux, world.b, disk)
    await linux.assert_clean(world.b)
    await writes(linux, world.b)


async def test_other_files_of_the_same_names_are_found_out(
    world: World, images: Path, store: Path, tmp_path: Path
) -> None:
    """With another folder mounted there, a disk that is a copy and an initrd that differs both block."""
    require(os.geteuid() == 0, "mounting needs root")
    disk = make_image(store / "disk.raw")
    linux = await boot(world, disk_spec(images, disk))
    assert await findings(world, linux) == {}
    other = tmp_path / "images"
    shutil.copytree(images, other)
    with (other / "initrd-disk").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\1")
    async with seeing(world.b.dest, f"mount --bind {other} {images}"):
        found = await findings(world, linux)
        assert set(found) == {"disk.identity", "file.differs"}
        assert found["disk.identity"].object == "qemu.disks[0].path"
        assert "file number" in found["disk.identity"].message
        assert "beacon" in found["disk.identity"].message
        assert found["file.differs"].object == "qemu.initrd"
        migration = await world.migrate(linux, world.a, world.b)
        assert migration.reason.reason == "INCOMPATIBLE"
    await world.assert_stays(linux, world.a, world.b)
    await world.assert_crosses(linux, world.a, world.b)


async def test_a_source_that_cannot_show_its_disk_says_so(world: World, images: Path, store: Path) -> None:
    """Where no beacon can be made, the report says why; where the path leads elsewhere by now, that too."""
    require(os.geteuid() == 0, "mounting needs root")
    disk = make_image(store / "disk.raw")
    linux = await boot(world, disk_spec(images, disk))
    async with seeing(world.a.source, f"mount --bind {store} {store}; mount -o remount,ro,bind {store}"):
        (found,) = (await findings(world, linux)).values()
        assert found.id == "disk.identity"
        assert "Read-only file system" in found.message
    moved = store / "moved.raw"
    shutil.move(disk.path, moved)
    shutil.copy(moved, disk.path)
    assert set(await findings(world, linux)) == {"disk.replaced"}
    shutil.move(moved, disk.path)
    await world.assert_crosses(linux, world.a, world.b)


async def test_an_equal_disk_that_is_only_read_may_cross(
    world: World, images: Path, store: Path, tmp_path: Path
) -> None:
    """Its content is compared, and a copy on the other host will do; an image that needs another one will not."""
    require(os.geteuid() == 0, "mounting needs root")
    disk = make_image(store / "disk.raw")
    media = store / "media.raw"
    media.write_bytes(os.urandom(100_000) + bytes(2400))
    spec = disk_spec(images, disk, DiskSpec(path=str(media), format="raw", read_only=True))
    linux = await boot(world, spec)
    other = tmp_path / "media.raw"
    shutil.copy(media, other)
    async with seeing(world.b.dest, f"mount --bind {other} {media}"):
        assert await findings(world, linux) == {}
        other.write_bytes(media.read_bytes()[:-1] + b"\1")
        assert set(await findings(world, linux)) == {"file.differs"}
    await world.assert_crosses(linux, world.a, world.b)

    overlay = store / "overlay.qcow2"
    backing = make_image(store / "base.raw")
    done(tool("qemu-img", "create", "-q", "-f", "qcow2", "-b", backing.path, "-F", "raw", str(overlay)))
    second = await boot(world, disk_spec(images, replace(disk, path=str(overlay), format="qcow2")))
    found = await findings(world, second)
    assert set(found) == {"disk.image"}
    assert "backing file" in found["disk.image"].message


async def test_a_copy_that_opened_another_file_is_refused(world: World, images: Path, store: Path) -> None:
    """An image that names another file behind the back of the check does not bring it to the guest."""
    image = store / "disk.qcow2"
    option = f"data_file={store}/data.raw"
    done(tool("qemu-img", "create", "-q", "-f", "qcow2", "-o", option, str(image), "1M"))
    base = make_image(store / "base.raw")
    overlay = store / "overlay.qcow2"
    done(tool("qemu-img", "create", "-q", "-f", "qcow2", "-b", base.path, "-F", "raw", str(overlay)))
    for path, words in ((image, "data.raw"), (overlay, "")):
        spec = resolve(disk_spec(images, DiskSpec(path=str(path), format="qcow2", shared=True)))
        machine = await start_machine(spec, world.b.directory, incoming=True)
        try:
            if words:
                with pytest.raises(MachineFailedError, match=words):
                    await machine.check_images()
            else:
                await machine.check_images()  # it was told to do without
        finally:
            await stop_machine(machine, world.b.directory)
