"""The description of a QEMU machine: what it accepts, how it refuses, how it travels, what command it becomes."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.machines.qemu_specs import PATHS, SHORT, UUID, WHOLE
from vmferry.errors import InvalidArgumentError
from vmferry.machines.command import SANDBOX, render_command
from vmferry.machines.spec import MachineSpec
from vmferry.machines.wire import spec_from_message, spec_to_message

DISK = SHORT + "[[qemu.disks]]\n"
NIC = SHORT + '[[qemu.nics]]\nmac = "52:54:00:12:34:56"\n'


@pytest.mark.parametrize(
    ("text", "field"),
    [
        (SHORT + 'device = "vfio-pci"', "qemu.device"),
        (SHORT + 'machine = "microvm"', "qemu.machine"),
        (SHORT + 'machine = "q35,accel=kvm"', "qemu.machine"),
        (SHORT + 'cpu = "host"', "qemu.cpu"),
        (SHORT + 'cpu = "max"', "qemu.cpu"),
        (SHORT + 'cpu = "Nehalem,+vmx"', "qemu.cpu"),
        (SHORT + 'accelerator = "hvf"', "qemu.accelerator"),
        (SHORT + 'memory_backing = "ramfs"', "qemu.memory_backing"),
        (SHORT + 'memory_backing = "memfd,prealloc=on"', "qemu.memory_backing"),
        (SHORT + 'kernel = "vmlinuz"', "qemu.kernel"),
        (SHORT + 'kernel = "/boot/../etc/shadow"', "qemu.kernel"),
        (SHORT + 'kernel = "/boot//vmlinuz"', "qemu.kernel"),
        (SHORT + 'initrd = "/initrd"', "qemu.initrd"),
        (SHORT + 'append = "quiet"', "qemu.append"),
        (SHORT + 'kernel = "/k"\nappend = "a\\nb"', "qemu.append"),
        (SHORT + "binary = 1", "qemu.binary"),
        (SHORT + 'binary = "qemu"', "qemu.binary"),
        (SHORT + "disks = 1", "qemu.disks"),
        (SHORT + "disks = [1]", "qemu.disks"),
        (DISK + 'format = "raw"', "qemu.disks.path"),
        (DISK + 'path = "/d"', "qemu.disks.format"),
        (DISK + 'path = "/d"\nformat = "vmdk"', "qemu.disks.format"),
        (DISK + 'path = "nbd://d"\nformat = "raw"', "qemu.disks.path"),
        (DISK + 'path = "/d"\nformat = "raw"\ncache = "none"', "qemu.disks.cache"),
        (NIC, "qemu.nics.backend"),
        (NIC + 'backend = "vhost-user"', "qemu.nics.backend"),
        (NIC + 'backend = "tap"', "qemu.nics.tap"),
        (NIC + 'backend = "tap"\ntap = "tap0,script=/x"', "qemu.nics.tap"),
        (NIC + 'backend = "user"\ntap = "tap0"', "qemu.nics.tap"),
        (NIC + 'backend = "user"\nmodel = "ne2k_pci"', "qemu.nics.model"),
        (SHORT.replace("[qemu]", "vcpus = 256\n[qemu]"), "vcpus"),
        (SHORT.replace("[qemu]", ""), "qemu"),
        (SHORT + '[microvm]\nprogram = "canary"\nmac = "52:54:00:12:34:56"', "microvm"),
    ],
)
def test_what_a_description_cannot_say_is_refused_by_name(text: str, field: str) -> None:
    """Unknown keys, wrong forms and values that could not be migrated are told by the full name of the field."""
    with pytest.raises(InvalidArgumentError) as caught:
        MachineSpec.from_toml(text)
    assert caught.value.field == field
    assert field in caught.value.message
    assert field in caught.value.instance_remedy


@pytest.mark.parametrize("text", [WHOLE, SHORT])
def test_a_description_survives_toml_and_the_wire(text: str) -> None:
    """Whatever is valid reads back equal from both, with the same digest and hash."""
    spec = MachineSpec.from_toml(text)
    for again in (MachineSpec.from_toml(spec.to_toml()), spec_from_message(spec_to_message(spec))):
        assert again == spec
        assert again.digest() == spec.digest()
        assert hash(again) == hash(spec)


def test_a_description_that_is_not_resolved_says_so() -> None:
    """An alias or ``auto`` means something else on another host."""
    named: dict[str, bool] = {}
    for machine in ("q35", "pc-q35-7.2"):
        for accelerator in ("auto", "tcg"):
            spec = MachineSpec.from_toml(SHORT + f'machine = "{machine}"\naccelerator = "{accelerator}"')
            assert spec.qemu is not None
            named[f"{machine} {accelerator}"] = spec.qemu.resolved
    assert [name for name, resolved in named.items() if resolved] == ["pc-q35-7.2 tcg"]


def test_every_file_of_the_host_is_named() -> None:
    """Nothing that QEMU would open for the guest is left out of what a destination checks."""
    spec = MachineSpec.from_toml(WHOLE)
    assert spec.qemu is not None
    assert spec.qemu.host_files() == {
        "qemu.kernel": "/images/vmlinuz",
        "qemu.initrd": "/images/initrd",
        "qemu.firmware": "/images/bios.bin",
        "qemu.disks[0].path": "/images/root,1.raw",
        "qemu.disks[1].path": "/images/data.qcow2",
    }


def command(text: str, *, incoming: bool = False) -> list[str]:
    """The command line of a description."""
    return render_command(MachineSpec.from_toml(text), PATHS, incoming=incoming)


def common(memory: int, machine: str, accelerator: str, vcpus: int) -> list[str]:
    """What every command line begins with."""
    return [
        *("/usr/bin/qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none"),
        *("-sandbox", SANDBOX, "-name", "web-1", "-uuid", UUID),
        *("-object", f"memory-backend-file,id=ram,mem-path=/r/u.ram,size={memory}M,share=on,prealloc=off"),
        *("-m", f"{memory}M", "-machine", f"{machine},memory-backend=ram,usb=off,vmport=off"),
        *("-accel", accelerator, "-cpu", "Nehalem-v1,enforce", "-smp", str(vcpus)),
        *("-qmp", "unix:/m,,1/web-1/qmp.sock,server=on,wait=off"),
        *("-qmp", "unix:/m,,1/web-1/watch.sock,server=on,wait=off"),
        *("-chardev", "file,id=serial0,path=/m,,1/web-1/serial.log,append=on", "-serial", "chardev:serial0"),
    ]


def test_the_command_line_by_example() -> None:
    """A description becomes exactly this command line; commas in paths cannot become options."""
    assert command(WHOLE) == [
        *common(256, "pc-q35-7.2", "tcg", 2),
        *("-bios", "/images/bios.bin", "-kernel", "/images/vmlinuz", "-initrd", "/images/initrd"),
        *("-append", "console=ttyS0 quiet"),
        "-blockdev",
        (
            '{"driver": "raw", "file": {"cache": {"direct": false, "no-flush": false}, '
            '"driver": "file", "drop-cache": true, "filename": "/images/root,1.raw", "locking": "on"}, '
            '"node-name": "disk0", "read-only": false}'
        ),
        *("-device", "virtio-blk-pci,id=virtio-disk0,drive=disk0"),
        "-blockdev",
        (
            '{"driver": "qcow2", "file": {"cache": {"direct": false, "no-flush": false}, '
            '"driver": "file", "drop-cache": true, "filename": "/images/data.qcow2", "locking": "on"}, '
            '"node-name": "disk1", "read-only": true}'
        ),
        *("-device", "virtio-blk-pci,id=virtio-disk1,drive=disk1"),
        *("-netdev", "user,id=net0"),
        *("-device", "virtio-net-pci,id=nic0,netdev=net0,mac=52:54:00:12:34:56,romfile="),
        *("-netdev", "tap,id=net1,ifname=tap-web,script=no,downscript=no,vhost=off"),
        *("-device", "virtio-net-pci,id=nic1,netdev=net1,mac=52:54:00:12:34:57,romfile="),
        "-S",
    ]


def test_the_channel_of_an_agent_is_behind_everything_else() -> None:
    """So that all else is where it is in a machine without one; the host's end is a socket of the machine's."""
    without = command(WHOLE)
    assert command(WHOLE.replace("[qemu]", "[qemu]\nagent = true")) == [
        *without[:-1],
        *("-chardev", "socket,id=agent,path=/m,,1/web-1/agent.sock,server=on,wait=off"),
        *("-device", "virtio-serial-pci,id=agent-bus,max_ports=2"),
        "-device",
        "virtserialport,id=agent-port,bus=agent-bus.0,nr=1,chardev=agent,name=org.qemu.guest_agent.0",
        "-S",
    ]


def test_an_arriving_machine_waits_for_its_state() -> None:
    """The smallest description, waiting; every command line holds the sandbox that forbids other programs."""
    tail = ["-S", "-incoming", "defer"]
    spec: dict[str, Any] = {"memory": 64, "machine": "q35", "accelerator": "auto", "vcpus": 1}
    assert command(SHORT, incoming=True) == [*common(**spec), *tail]
    assert "spawn=deny" in SANDBOX
    assert "elevateprivileges=deny" in SANDBOX
