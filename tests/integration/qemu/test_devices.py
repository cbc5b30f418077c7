"""A machine with every device, bus and network model that a description can name crosses, and is the same there."""

from __future__ import annotations

import asyncio
import contextlib
import stat
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.integration.hosts import MIB, World
from tests.integration.proxy import Proxy
from tests.integration.qemu.conftest import LinuxGuest, boot, linux_spec
from tests.integration.services import Host, eventually, eventually_async
from tests.support import require
from vmferry.machines.directory import MachineDirectory
from vmferry.machines.launcher import start_machine, stop_machine
from vmferry.machines.qemu import guest as linux
from vmferry.machines.qemu import probe
from vmferry.machines.qemu.spec import (
    BALLOON,
    DEVICE_MODELS,
    NIC_MODELS,
    USB_MODELS,
    DeviceSpec,
    DiskSpec,
    NicSpec,
    QemuSpec,
)
from vmferry.machines.spec import MachineSpec, new_mac
from vmferry.v1 import migration_pb2 as pb

pytestmark = [pytest.mark.timeout(300)]

MODULES = (
    "virtio_ring",
    "virtio",
    "virtio_pci_modern_dev",
    "virtio_pci_legacy_dev",
    "virtio_pci",
    "virtio_balloon",
)
"""What a guest needs for its balloon, in the order in which one needs another."""
SLOW = 8 * MIB
SEEN_S = 60.0


def qemu_spec(spec: MachineSpec, **part: Any) -> MachineSpec:
    """The same with some values changed."""
    assert spec.qemu is not None
    return replace(spec, qemu=replace(spec.qemu, **part))


def everything() -> dict[str, Any]:
    """Each device and each network model once."""
    return {
        "devices": tuple(DeviceSpec(model=model) for model in DEVICE_MODELS),
        "nics": tuple(NicSpec(backend="user", mac=new_mac(), model=model) for model in NIC_MODELS),
    }


async def pci(host: Host, guest: LinuxGuest) -> list[tuple[int, int, str, int]]:
    """Which device is where on the PCI bus of a running machine: bus, slot, name, its number of regions."""
    machine = host.directory.open(host.record(guest.id), observe=True)
    try:
        return layout(await machine._monitor.execute("query-pci"))
    finally:
        await machine.close()


def layout(buses: Any) -> list[tuple[int, int, str, int]]:
    """The same from an answer of QEMU."""
    return [
        (bus["bus"], device["slot"], device["qdev_id"], len(device["regions"]))
        for bus in buses
        for device in bus["devices"]
    ]


@pytest.mark.usefixtures("tidy")
@pytest.mark.parametrize("machine", ["q35", "pc"])
async def test_a_machine_with_everything_goes_there_and_back(
    world: World, images: Path, machine: str
) -> None:
    """On both machine types: every device is where it was, and the guest compares equal and finds itself well."""
    guest = await boot(world, qemu_spec(linux_spec(images, writes=2), machine=machine, **everything()))
    before = await pci(world.a, guest)
    named = {name for _, _, name, _ in before if name}
    assert len(named) == len(DEVICE_MODELS) - len(USB_MODELS) + len(NIC_MODELS)
    here, there = world.a, world.b
    for options in ({"verify": pb.VERIFY_MODE_BYTES, "downtime_limit": 10.0}, {}):
        await world.assert_crosses(guest, here, there, **options)
        assert await pci(there, guest) == before
        here, there = there, here


@pytest.mark.usefixtures("images")
@pytest.mark.parametrize("machine", ["q35", "pc"])
async def test_disks_on_every_bus_are_saved_and_loaded(tmp_path: Path, machine: str) -> None:
    """A second process of the same description has the same layout, and takes the state of the first one."""
    disks = []
    for number, bus in enumerate(("sata", "scsi", "virtio", "scsi", "sata")):
        path = tmp_path / f"{number}.raw"
        path.write_bytes(bytes(MIB))
        disks.append(DiskSpec(path=str(path), format="raw", bus=bus, read_only=number == 3))
    part = QemuSpec(machine=machine, accelerator="tcg", disks=tuple(disks), serial="socket", **everything())
    spec = probe.resolve(
        MachineSpec(
            name="all", uuid="0f8fad5b-d9cb-469f-a165-70867728950e", kind="qemu", memory_mib=32, qemu=part
        )
    )
    with contextlib.ExitStack() as stack:
        here, there = (stack.enter_context(_directory(tmp_path / name)) for name in ("here", "there"))
        one = await start_machine(spec, here)
        try:
            two = await start_machine(spec, there, incoming=True)
            try:
                layouts = [layout(await each._monitor.execute("query-pci")) for each in (one, two)]
                assert layouts[0] == layouts[1]
                assert {"scsi0", "sata0", "virtio-disk2"} <= {name for _, _, name, _ in layouts[0]}
                await two.load_device_state(await one.save_device_state())
            finally:
                await stop_machine(two, there)
        finally:
            await stop_machine(one, here)


@contextlib.contextmanager
def _directory(folder: Path) -> Iterator[MachineDirectory]:
    yield MachineDirectory(folder / "m", folder / "r")
    assert list((folder / "m").iterdir()) == list((folder / "r").iterdir()) == []


@pytest.mark.usefixtures("tidy")
async def test_the_serial_port_leads_to_a_socket_wherever_the_guest_is(world: World, images: Path) -> None:
    """What is typed there arrives, what the guest writes is there and in the file; also after a crossing."""
    guest = await boot(world, qemu_spec(linux_spec(images), serial="socket"))
    await converse(world.a, guest, "typed-at-the-source")
    await world.assert_crosses(guest, world.a, world.b)
    await converse(world.b, guest, "typed-at-the-destination")


async def converse(host: Host, guest: LinuxGuest, words: str) -> None:
    """Read a sign of life at the guest's serial port, type something, and see it echoed by the guest.

    The guest writes there, too, and may do so in the middle of the echo: then it is typed once more.
    """
    path = host.record(guest.id).paths.serial_socket
    assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0
    reader, writer = await asyncio.open_unix_connection(path)
    try:
        async with asyncio.timeout(SEEN_S):
            await reader.readuntil(b"tick n=")
            heard = b""
            while words.encode() not in heard:
                writer.write(words.encode() + b"\r")
                await writer.drain()
                heard = await reader.readuntil(b"tick n=") + await reader.readuntil(b"tick n=")
    finally:
        writer.close()
        await writer.wait_closed()
    await eventually(lambda: words in guest.serial(host), "it is in the file as well")


@pytest.fixture(scope="session")
def balloon_images(images: Path) -> Path:
    """The images, with an initial file system whose guest drives its balloon."""
    kernel = linux.newest_kernel().name.removeprefix("vmlinuz-")
    found = {path.stem: path for path in Path(f"/lib/modules/{kernel}/kernel/drivers/virtio").glob("*.ko")}
    require(set(MODULES) <= set(found), f"no modules for virtio of the kernel {kernel}")
    loads = "".join(f"/bin/busybox insmod /modules/{name}.ko || echo BAD module {name}\n" for name in MODULES)
    script = (Path(linux.__file__).parent / "init.sh").read_bytes()
    more = linux.archive(
        [
            linux.Entry("modules", stat.S_IFDIR | 0o755),
            *(
                linux.Entry(f"modules/{name}.ko", stat.S_IFREG | 0o644, found[name].read_bytes())
                for name in MODULES
            ),
            linux.Entry("check", stat.S_IFREG | 0o755, script),
            linux.Entry("init", stat.S_IFREG | 0o755, f"#!/bin/busybox sh\n{loads}exec /check\n".encode()),
        ]
    )
    # The kernel unpacks one archive after the other.
    (images / "initrd-balloon").write_bytes((images / "initrd").read_bytes() + more)
    return images / "initrd-balloon"


async def inflate(host: Host, guest: LinuxGuest, leave_mib: int) -> None:
    """Have the guest give memory back until so much is left, and wait until it has."""
    machine = host.directory.open(host.record(guest.id), observe=True)

    async def done() -> bool:
        return int((await machine._monitor.execute("query-balloon"))["actual"]) == leave_mib * MIB

    try:
        await machine._monitor.execute("balloon", {"value": leave_mib * MIB})
        await eventually_async(done, "the balloon has its size", seconds=SEEN_S)
    finally:
        await machine.close()


@pytest.mark.usefixtures("tidy")
async def test_memory_that_a_guest_gives_back_on_the_way_stays_given_back(
    world: World, images: Path, balloon_images: Path, link: Proxy
) -> None:
    """A balloon grows in the middle of pre-copy and shrinks later: memory compares equal, and the guest is well."""
    spec = linux_spec(images, writes=2, files=4, memory_mib=160)
    device = DeviceSpec(model=BALLOON)
    assert spec.qemu is not None
    # A guest that writes zeros to what it gives up would have the pages reported as written.
    append = f"{spec.qemu.append} init_on_alloc=0 init_on_free=0"
    guest = await boot(world, qemu_spec(spec, initrd=str(balloon_images), append=append, devices=(device,)))
    taken = allocated(world.a, guest)
    link.up_bytes_per_s = SLOW
    migration_id = await world.start(
        guest, world.a, world.b, address=link.address, verify=pb.VERIFY_MODE_BYTES, downtime_limit=10.0
    )
    await world.enters(world.a, migration_id, pb.MIGRATION_PHASE_PRECOPYING)
    # What is given up now was mostly sent before, as something else than zero.
    await world.reaches(
        world.a, migration_id, lambda now: now.progress.sent_bytes > 0.7 * taken, "most is sent"
    )
    link.up_bytes_per_s = MIB
    await inflate(world.a, guest, 112)
    assert allocated(world.a, guest) < taken - 8 * MIB
    link.up_bytes_per_s = None
    migration = await world.ended(world.a, migration_id)
    assert migration.outcome == pb.MIGRATION_OUTCOME_COMPLETED, migration
    assert migration.verification.different_pages == 0
    await guest.assert_clean(world.b)
    await inflate(world.b, guest, 160)
    await world.assert_crosses(guest, world.b, world.a, verify=pb.VERIFY_MODE_BYTES, downtime_limit=10.0)


def allocated(host: Host, guest: LinuxGuest) -> int:
    """How much memory a machine's file takes."""
    return host.record(guest.id).paths.ram.stat().st_blocks * 512
