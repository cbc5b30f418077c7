"""The only place where a description turns into a command line.

Promise: pure; the process never runs the guest before it is told to, cannot start another program, and gets nothing
that the description does not say.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Final

from vmferry.machines.microvm.spec import MicrovmSpec
from vmferry.machines.paths import MachinePaths
from vmferry.machines.qemu.spec import DiskSpec, NicSpec, QemuSpec
from vmferry.machines.spec import MachineSpec

SANDBOX: Final = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"


def render_command(spec: MachineSpec, paths: MachinePaths, *, incoming: bool) -> list[str]:
    """The command line of a machine's process; it never runs the guest before it is told to.

    Args:
        spec: what to run.
        paths: where its files are.
        incoming: wait for device state from elsewhere.
    """
    if spec.microvm is not None:
        return _microvm(spec, spec.microvm, paths, incoming=incoming)
    assert spec.qemu is not None
    return _qemu(spec, spec.qemu, paths, incoming=incoming)


def _microvm(spec: MachineSpec, part: MicrovmSpec, paths: MachinePaths, *, incoming: bool) -> list[str]:
    command = [
        *(sys.executable, "-P", "-m", "vmferry.machines.microvm"),
        *("--name", spec.name, "--uuid", spec.uuid),
        *("--memory-mib", str(spec.memory_mib), "--ram-file", str(paths.ram)),
        *("--qmp", str(paths.qmp), "--serial-file", str(paths.serial)),
        *("--mac", part.mac),
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


def _qemu(spec: MachineSpec, part: QemuSpec, paths: MachinePaths, *, incoming: bool) -> list[str]:
    memory = f"memory-backend-file,id=ram,mem-path={_value(paths.ram)},size={spec.memory_mib}M"
    command = [
        *(part.binary, "-nodefaults", "-no-user-config", "-display", "none", "-sandbox", SANDBOX),
        *("-name", spec.name, "-uuid", spec.uuid),
        # Without preallocation, which would write to memory that another process may fill or use.
        *("-object", f"{memory},share=on,prealloc=off", "-m", f"{spec.memory_mib}M"),
        *("-machine", f"{part.machine},memory-backend=ram,usb=off,vmport=off"),
        *("-accel", part.accelerator, "-cpu", f"{part.cpu},enforce", "-smp", str(spec.vcpus)),
        *("-qmp", f"unix:{_value(paths.qmp)},server=on,wait=off"),
        *("-qmp", f"unix:{_value(paths.observer)},server=on,wait=off"),
        *("-chardev", f"file,id=serial0,path={_value(paths.serial)},append=on"),
        *("-serial", "chardev:serial0"),
    ]
    for option, text in (("-bios", part.firmware), ("-kernel", part.kernel), ("-initrd", part.initrd)):
        if text:
            command += [option, text]
    if part.append:
        command += ["-append", part.append]
    for number, disk in enumerate(part.disks):
        command += _disk(number, disk, incoming=incoming)
    for number, nic in enumerate(part.nics):
        command += _nic(number, nic)
    command += ["-S"]
    if incoming:
        command += ["-incoming", "defer"]
    return command


def _disk(number: int, disk: DiskSpec, *, incoming: bool) -> Iterator[str]:
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
    yield from ("-device", f"virtio-blk-pci,id=virtio-disk{number},drive=disk{number}")


def _nic(number: int, nic: NicSpec) -> Iterator[str]:
    tap = f",ifname={nic.tap},script=no,downscript=no,vhost=off"
    yield from ("-netdev", f"{nic.backend},id=net{number}" + (tap if nic.backend == "tap" else ""))
    # Without the ROM for booting from the network: one thing less that two hosts must have alike.
    yield from ("-device", f"{nic.model},id=nic{number},netdev=net{number},mac={nic.mac},romfile=")


def _value(value: object) -> str:
    """A value in one of QEMU's lists of options, in which commas are written twice."""
    return str(value).replace(",", ",,")
