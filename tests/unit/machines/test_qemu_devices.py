"""What a QEMU machine is made of besides the common: memory, serial port, buses, devices; refusals and commands."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from tests.unit.machines.qemu_specs import PATHS, SHORT
from vmferry.errors import ConfigError, InvalidArgumentError
from vmferry.machines.command import render_command
from vmferry.machines.directory import MachineDirectory
from vmferry.machines.qemu.spec import DEVICE_MODELS, NIC_MODELS
from vmferry.machines.spec import MachineSpec

HUGE = SHORT + 'memory_backing = "hugetlbfs"\n'


def disk(**values: object) -> str:
    """One of the disks of a description."""
    given = {"path": "/d", "format": "raw"} | values
    return "[[qemu.disks]]\n" + "".join(
        f"{key} = {str(value).lower() if isinstance(value, bool) else repr(value)}\n"
        for key, value in given.items()
    )


def devices(*models: str) -> str:
    """The devices of a description."""
    return "".join(f'[[qemu.devices]]\nmodel = "{model}"\n' for model in models)


@pytest.mark.parametrize(
    ("text", "field"),
    [
        (HUGE.replace("memory_mib = 64", "memory_mib = 63"), "memory_mib"),
        (HUGE + devices("virtio-balloon-pci"), "qemu.devices"),
        (SHORT + 'serial = "pty"', "qemu.serial"),
        (SHORT + "serial = 1", "qemu.serial"),
        (SHORT + devices("vfio-pci"), "qemu.devices.model"),
        (SHORT + devices("virtio-rng-pci,rng=rng0"), "qemu.devices.model"),
        (SHORT + devices("i6300esb", "i6300esb"), "qemu.devices"),
        (SHORT + devices("usb-tablet"), "qemu.devices"),
        (SHORT + devices("qemu-xhci", *["usb-kbd"] * 16), "qemu.devices"),
        (SHORT + devices("VGA") + 'id = "vga"', "qemu.devices.id"),
        (SHORT + "[[qemu.devices]]\n", "qemu.devices.model"),
        (SHORT + disk(bus="ide"), "qemu.disks.bus"),
        (SHORT + disk(bus="sata", read_only=True), "qemu.disks.read_only"),
        (SHORT + disk(bus="sata") * 7, "qemu.disks"),
        (SHORT + disk(bus="scsi") * 65, "qemu.disks"),
    ],
)
def test_what_cannot_be_or_cannot_cross_is_refused_by_name(text: str, field: str) -> None:
    """Values outside of the tables, combinations that cannot work, and more than there is room for."""
    with pytest.raises(InvalidArgumentError) as caught:
        MachineSpec.from_toml(text)
    assert caught.value.field == field
    assert caught.value.instance_remedy


def command(text: str, memory_fd: int | None = None) -> list[str]:
    """The command line of a description."""
    return render_command(MachineSpec.from_toml(text), PATHS, incoming=False, memory_fd=memory_fd)


def added(text: str) -> list[str]:
    """What a description has on its command line behind what every machine has."""
    return command(SHORT + text)[len(command(SHORT)) - 1 :]


def option(text: str, name: str, memory_fd: int | None = None) -> str:
    """The value of an option of a description's command line."""
    words = command(text, memory_fd)
    return words[words.index(name) + 1]


def test_memory_by_example() -> None:
    """A file with a name, one that the process inherits, and memory of its own; never written to at the start."""
    assert option(SHORT, "-object") == (
        "memory-backend-file,id=ram,mem-path=/r/u.ram,size=64M,share=on,prealloc=off"
    )
    assert option(HUGE, "-object") == option(SHORT, "-object")
    assert option(SHORT + 'memory_backing = "memfd"', "-object", memory_fd=7) == (
        "memory-backend-file,id=ram,mem-path=/proc/self/fd/7,size=64M,share=on,prealloc=off"
    )
    assert option(SHORT + 'memory_backing = "anonymous"', "-object") == (
        "memory-backend-ram,id=ram,size=64M,prealloc=off"
    )


def test_the_serial_port_by_example() -> None:
    """A socket leads there and back, and all that the guest writes is in the file as well."""
    assert option(SHORT + 'serial = "file"', "-chardev") == (
        "file,id=serial0,path=/m,,1/web-1/serial.log,append=on"
    )
    assert option(SHORT + 'serial = "socket"', "-chardev") == (
        "socket,id=serial0,path=/m,,1/web-1/serial.sock,server=on,wait=off,"
        "logfile=/m,,1/web-1/serial.log,logappend=on"
    )


def test_buses_by_example() -> None:
    """A controller comes once, before its first disk; places follow the order of the disks."""
    words = added(
        disk()
        + disk(bus="scsi")
        + disk(bus="sata")
        + disk(bus="scsi", read_only=True)
        + disk(bus="virtio")
        + disk(bus="sata")
    )
    assert [word for option, word in pairwise(words) if option == "-device"] == [
        "virtio-blk-pci,id=virtio-disk0,drive=disk0",
        "virtio-scsi-pci,id=scsi0",
        "scsi-hd,id=scsi-disk1,drive=disk1,bus=scsi0.0,scsi-id=0",
        "ich9-ahci,id=sata0",
        "ide-hd,id=sata-disk2,drive=disk2,bus=sata0.0",
        "scsi-hd,id=scsi-disk3,drive=disk3,bus=scsi0.0,scsi-id=1",
        "virtio-blk-pci,id=virtio-disk4,drive=disk4",
        "ide-hd,id=sata-disk5,drive=disk5,bus=sata0.1",
    ]


@pytest.mark.parametrize("model", NIC_MODELS)
def test_network_interfaces_by_example(model: str) -> None:
    """Each model is started without the ROM for booting from the network."""
    assert added(f'[[qemu.nics]]\nbackend = "user"\nmac = "52:54:00:12:34:56"\nmodel = "{model}"') == [
        *("-netdev", "user,id=net0"),
        *("-device", f"{model},id=nic0,netdev=net0,mac=52:54:00:12:34:56,romfile="),
        "-S",
    ]


def test_devices_by_example() -> None:
    """Each has a name; what is plugged into another comes behind it; the watchdog does what hardware would do."""
    assert added(devices("usb-tablet", "virtio-rng-pci", "i6300esb", "qemu-xhci", "usb-tablet")) == [
        *("-device", "virtio-rng-pci,id=device1"),
        *("-action", "watchdog=reset", "-device", "i6300esb,id=device2"),
        *("-device", "qemu-xhci,id=usb"),
        *("-device", "usb-tablet,id=device0,bus=usb.0", "-device", "usb-tablet,id=device4,bus=usb.0"),
        "-S",
    ]


def test_every_device_has_a_name() -> None:
    """Otherwise two hosts could tell apart what is the same."""
    words = added(devices(*DEVICE_MODELS) + disk() + disk(bus="scsi") + disk(bus="sata"))
    named = [word for option, word in pairwise(words) if option == "-device"]
    ids = [part for word in named for part in word.split(",") if part.startswith("id=")]
    assert len(set(ids)) == len(named) == len(DEVICE_MODELS) + 5


def test_only_anonymous_memory_is_private() -> None:
    """Everything that depends on reading memory from outside asks this."""
    shared = {
        backing: MachineSpec.from_toml(SHORT + f'memory_backing = "{backing}"').shared_memory
        for backing in ("tmpfs", "hugetlbfs", "memfd", "anonymous")
    }
    assert [backing for backing, can in shared.items() if not can] == ["anonymous"]


def test_memory_in_huge_pages_lies_in_its_own_folder(tmp_path: Path) -> None:
    """A host without such a folder, or with one that is somewhere else, refuses by the name of the setting."""
    spec = MachineSpec.from_toml(HUGE)
    assert MachineDirectory(tmp_path, Path("/r"), Path("/h")).paths(spec).ram == Path(f"/h/{spec.uuid}.ram")
    for huge_root in (None, tmp_path / "not-yet-there"):
        with pytest.raises(ConfigError) as caught:
            MachineDirectory(tmp_path / "m", tmp_path / "r", huge_root).claim(spec)
        assert caught.value.field == "huge_dir"
    assert not list(tmp_path.iterdir())
