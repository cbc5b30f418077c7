"""The only place where a description turns into a command line.

Promise: pure; the process never runs the guest before it is told to, cannot start another program, and gets nothing
that the description does not say.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from vmferry.machines.microvm.spec import MicrovmSpec
from vmferry.machines.paths import MachinePaths
from vmferry.machines.qemu.spec import (
    SATA,
    SCSI,
    SERIAL_SOCKET,
    USB_CONTROLLER,
    USB_MODELS,
    VIRTIO,
    WATCHDOG,
    DiskSpec,
    NicSpec,
    QemuSpec,
)
from vmferry.machines.spec import MachineSpec
from vmferry.memory.backings import ANONYMOUS

AGENT_CHARDEV: Final = "agent"
"""What QEMU calls the host's end of the channel for the guest's agent."""
AGENT_CHANNEL: Final = "org.qemu.guest_agent.0"
"""The name of the port by which every agent finds its channel."""
METADATA_ADDRESS: Final = "169.254.169.254"
METADATA_NETWORK: Final = "169.254.169.0/24"
SANDBOX: Final = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"


@dataclass(frozen=True)
class _Bus:
    """How a disk is plugged in."""

    device: str
    controller: str = ""
    """What comes once, before the first disk of this kind."""
    plug: str = ""


_BUSES: Final = {
    VIRTIO: _Bus("virtio-blk-pci"),
    SCSI: _Bus("scsi-hd", "virtio-scsi-pci,id=scsi0", ",bus=scsi0.0,scsi-id={place}"),
    SATA: _Bus("ide-hd", "ich9-ahci,id=sata0", ",bus=sata0.{place}"),
}


def render_command(
    spec: MachineSpec, paths: MachinePaths, *, incoming: bool, memory_fd: int | None = None
) -> list[str]:
    """The command line of a machine's process; it never runs the guest before it is told to.

    Args:
        spec: what to run.
        paths: where its files are.
        incoming: wait for device state from elsewhere.
        memory_fd: a memory file without a name that the process inherits, if its memory is one.
    """
    if spec.microvm is not None:
        return _microvm(spec, spec.microvm, paths, incoming=incoming)
    assert spec.qemu is not None
    return _qemu(spec, spec.qemu, paths, incoming=incoming, memory_fd=memory_fd)


def device_ids(command: Sequence[str]) -> list[str]:
    """The ids of all devices that a command line asks for, as QEMU knows them afterwards."""
    found = []
    nameless = 0
    for option, text in itertools.pairwise(command):
        if option != "-device":
            continue
        if text.startswith("{"):
            name = json.loads(text).get("id")
        else:
            values = (part.removeprefix("id=") for part in text.split(",") if part.startswith("id="))
            name = next(values, None)
        if name is None:
            name = f"device[{nameless}]"
            nameless += 1
        found.append(name)
    return found


def _microvm(spec: MachineSpec, part: MicrovmSpec, paths: MachinePaths, *, incoming: bool) -> list[str]:
    command = [
        *(sys.executable, "-P", "-m", "vmferry.machines.microvm"),
        *("--name", spec.name, "--uuid", spec.uuid),
        *("--memory-mib", str(spec.memory_mib), "--ram-file", str(paths.ram)),
        *("--qmp", str(paths.qmp), "--serial-file", str(paths.serial)),
        *("--mac", part.mac),
        *(("--metadata", str(paths.metadata_socket)) if part.metadata else ()),
    ]
    if part.netdev:
        command += ["--netdev", part.netdev]
    command += ["--program", part.program]
    for key, value in part.params.items():
        command += ["--param", f"{key}={value}"]
    command += ["--self-track", "on" if part.self_track else "off", "-S"]
    if incoming:
        command += ["--incoming", "defer"]
    return command


def _qemu(
    spec: MachineSpec, part: QemuSpec, paths: MachinePaths, *, incoming: bool, memory_fd: int | None
) -> list[str]:
    command = [
        *(part.binary, "-nodefaults", "-no-user-config", "-display", "none", "-sandbox", SANDBOX),
        *("-name", spec.name, "-uuid", spec.uuid),
        *("-object", _memory(spec, part, paths, memory_fd), "-m", f"{spec.memory_mib}M"),
        *("-machine", f"{part.machine},memory-backend=ram,usb=off,vmport=off"),
        *("-accel", part.accelerator, "-cpu", f"{part.cpu},enforce", "-smp", str(spec.vcpus)),
        *("-qmp", f"unix:{_value(paths.qmp)},server=on,wait=off"),
        *("-qmp", f"unix:{_value(paths.observer)},server=on,wait=off"),
        *("-chardev", _serial(part, paths)),
        *("-serial", "chardev:serial0"),
    ]
    for option, text in (("-bios", part.firmware), ("-kernel", part.kernel), ("-initrd", part.initrd)):
        if text:
            command += [option, text]
    if part.append:
        command += ["-append", part.append]
    for number, disk in enumerate(part.disks):
        place = sum(other.bus == disk.bus for other in part.disks[:number])
        command += _disk(number, disk, place, incoming=incoming)
    for number, nic in enumerate(part.nics):
        command += _nic(number, nic, paths)
    command += _devices([device.model for device in part.devices])
    if part.agent:
        command += _agent(paths)
    command += ["-S"]
    if incoming:
        command += ["-incoming", "defer"]
    return command


def _memory(spec: MachineSpec, part: QemuSpec, paths: MachinePaths, memory_fd: int | None) -> str:
    if part.memory_backing == ANONYMOUS:
        return f"memory-backend-ram,id=ram,size={spec.memory_mib}M,prealloc=off"
    # A memfd is opened by path too: newer releases of QEMU send memory of their own memory-backend-memfd
    # through the stream of device state, and leave out only what they opened by a path.
    path = paths.ram if memory_fd is None else f"/proc/self/fd/{memory_fd}"
    # Without preallocation, which would write to memory that another process may fill or use.
    return f"memory-backend-file,id=ram,mem-path={_value(path)},size={spec.memory_mib}M,share=on,prealloc=off"


def _serial(part: QemuSpec, paths: MachinePaths) -> str:
    if part.serial == SERIAL_SOCKET:
        socket = f"socket,id=serial0,path={_value(paths.serial_socket)},server=on,wait=off"
        return f"{socket},logfile={_value(paths.serial)},logappend=on"
    return f"file,id=serial0,path={_value(paths.serial)},append=on"


def _disk(number: int, disk: DiskSpec, place: int, *, incoming: bool) -> Iterator[str]:
    # Through the page cache: write tracking does not see what a disk transfers into guest memory past it. QEMU drops
    # what is cached of an image when it takes the image over, and so sees what another host wrote.
    file: dict[str, object] = {"driver": "file", "filename": disk.path, "locking": "on", "drop-cache": True}
    file["cache"] = {"direct": False, "no-flush": False}
    node: dict[str, object] = {
        "driver": disk.format,
        "node-name": f"disk{number}",
        "read-only": disk.read_only,
        "file": file,
    }
    if incoming and disk.format == "qcow2":
        node["backing"] = None  # whatever file of this host the image may name
    yield from ("-blockdev", json.dumps(node, sort_keys=True))
    bus = _BUSES[disk.bus]
    if bus.controller and place == 0:
        yield from ("-device", bus.controller)
    plug = bus.plug.format(place=place)
    yield from ("-device", f"{bus.device},id={disk.bus}-disk{number},drive=disk{number}{plug}")


def _devices(models: Sequence[str]) -> Iterator[str]:
    # Those that others are plugged into come first, wherever they were named.
    for number, model in sorted(enumerate(models), key=lambda item: item[1] in USB_MODELS):
        name = "usb" if model == USB_CONTROLLER else f"device{number}"
        if model == WATCHDOG:
            # What the hardware would do; the default of QEMU, said so that it stays that.
            yield from ("-action", "watchdog=reset")
        plug = ",bus=usb.0" if model in USB_MODELS else ""
        yield from ("-device", f"{model},id={name}{plug}")


def _agent(paths: MachinePaths) -> Iterator[str]:
    # Behind all others, so that a machine with it has everything else where one without it has it.
    socket = f"socket,id={AGENT_CHARDEV},path={_value(paths.agent_socket)},server=on,wait=off"
    yield from ("-chardev", socket)
    yield from ("-device", "virtio-serial-pci,id=agent-bus,max_ports=2")
    port = f"virtserialport,id=agent-port,bus=agent-bus.0,nr=1,chardev={AGENT_CHARDEV},name={AGENT_CHANNEL}"
    yield from ("-device", port)


def _nic(number: int, nic: NicSpec, paths: MachinePaths) -> Iterator[str]:
    options = f",ifname={nic.tap},script=no,downscript=no,vhost=off" if nic.backend == "tap" else ""
    if nic.metadata:
        # A guest can be forwarded only within its own network, so the well-known address must be in that. The
        # hypervisor listens and the service connects: so the service can begin anew whenever it has to.
        socket = f"path={_value(paths.metadata_socket)},server=on,wait=off"
        yield from ("-chardev", f"socket,id=metadata,{socket}")
        options = f",net={METADATA_NETWORK},guestfwd=tcp:{METADATA_ADDRESS}:80-chardev:metadata"
    yield from ("-netdev", f"{nic.backend},id=net{number}{options}")
    # Without the ROM for booting from the network: one thing less that two hosts must have alike.
    yield from ("-device", f"{nic.model},id=nic{number},netdev=net{number},mac={nic.mac},romfile=")


def _value(value: object) -> str:
    """A value in one of QEMU's lists of options, in which commas are written twice."""
    return str(value).replace(",", ",,")
