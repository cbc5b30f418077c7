"""What a QEMU machine is made of, beyond what every machine has.

Promise: only what is typed here reaches a command line. What would differ between two hosts, or could not be
migrated, is refused by name: CPU models that mean "whatever this host has", devices that are not in a table here.

The default CPU model is ``Nehalem-v1``: the baseline x86-64-v2 that today's distributions ask for, which TCG and
every KVM host can offer in full. The version is part of its name, so it means the same CPU with any machine type,
and it is started with ``enforce``: a host that lacks one of its features refuses to start it, instead of letting the
guest find out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import ClassVar, Final

from vmferry.machines.fields import (
    ADDED_IN_2,
    ADDED_IN_3,
    ADDED_IN_4,
    WIDENED_IN_2,
    check_choice,
    check_pattern,
    check_types,
    invalid,
)
from vmferry.machines.microvm.spec import MAC_FORM, UNICAST_MAC
from vmferry.memory.backings import ANONYMOUS, HUGETLBFS, MEMFD, TMPFS

AUTO: Final = "auto"
ACCELERATORS: Final = ("kvm", "tcg")
IMAGE_FORMATS: Final = ("raw", "qcow2")
MACHINE_ALIASES: Final = ("q35", "pc")
"""Names that mean another machine type with every release; resolved when a machine is first run."""
MEMORY_BACKINGS: Final = (TMPFS, HUGETLBFS, MEMFD, ANONYMOUS)
SERIAL_FILE: Final = "file"
SERIAL_SOCKET: Final = "socket"
VIRTIO: Final = "virtio"
SCSI: Final = "scsi"
SATA: Final = "sata"
NIC_MODELS: Final = ("virtio-net-pci", "e1000e", "e1000", "rtl8139")
USB_CONTROLLER: Final = "qemu-xhci"
USB_MODELS: Final = ("usb-tablet", "usb-kbd")
BALLOON: Final = "virtio-balloon-pci"
WATCHDOG: Final = "i6300esb"
DEVICE_MODELS: Final = (
    "virtio-rng-pci",
    BALLOON,
    "virtio-serial-pci",
    "virtio-keyboard-pci",
    WATCHDOG,
    "pvpanic-pci",
    "VGA",
    USB_CONTROLLER,
    *USB_MODELS,
)
"""Devices that need nothing of their host, and whose state was seen to cross."""
MAX_PATH_CHARS: Final = 1024
MAX_APPEND_CHARS: Final = 2048

_SATA_PORTS: Final = 6
_MAX_SCSI: Final = 64
_MAX_DEVICES: Final = 16

_MACHINE = re.compile(r"q35|pc|pc-(q35|i440fx)-[0-9]{1,2}\.[0-9]{1,2}")
_CPU = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_TAP = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,14}")
_HOSTS_OWN_CPU: Final = frozenset({"host", "max", "base"})


@dataclass(frozen=True, kw_only=True)
class DiskSpec:
    """One of ``[[qemu.disks]]``."""

    TABLE: ClassVar[str] = "qemu.disks."

    path: str
    format: str
    """``raw`` or ``qcow2``; never guessed from the content, which the guest controls."""
    read_only: bool = False
    shared: bool = False
    """Whether other hosts see the same file at the same path."""
    bus: str = field(default=VIRTIO, metadata=ADDED_IN_2)
    """How the guest sees it: ``virtio``, ``scsi`` or ``sata``."""

    def __post_init__(self) -> None:
        check_types(self, self.TABLE)
        check_path(self.TABLE + "path", self.path)
        check_choice(self.TABLE + "format", self.format, ("raw", "qcow2"))
        check_choice(self.TABLE + "bus", self.bus, (VIRTIO, SCSI, SATA))
        if self.bus == SATA and self.read_only:
            fault = "a SATA disk cannot be write-protected"
            raise invalid(self.TABLE + "read_only", fault, "use another bus, or remove it")


@dataclass(frozen=True, kw_only=True)
class NicSpec:
    """One of ``[[qemu.nics]]``."""

    TABLE: ClassVar[str] = "qemu.nics."

    backend: str
    """``user``: QEMU's own network stack; ``tap``: the host's interface named by ``tap``."""
    mac: str
    tap: str = ""
    model: str = field(default="virtio-net-pci", metadata=WIDENED_IN_2)
    metadata: bool = field(default=False, metadata=ADDED_IN_3)
    """Whether the host's metadata service answers on it, at 169.254.169.254: the user backend's network is then
    169.254.169.0/24."""

    def __post_init__(self) -> None:
        check_types(self, self.TABLE)
        check_choice(self.TABLE + "backend", self.backend, ("user", "tap"))
        check_pattern(self.TABLE + "mac", self.mac, UNICAST_MAC, MAC_FORM)
        check_choice(self.TABLE + "model", self.model, NIC_MODELS)
        if self.backend == "tap":
            check_pattern(self.TABLE + "tap", self.tap, _TAP, "the name of a tap interface")
        elif self.tap:
            raise invalid(self.TABLE + "tap", "is for the tap backend only", "remove it")
        if self.metadata and self.backend != "user":
            raise invalid(self.TABLE + "metadata", "is for the user backend only", "remove it")


@dataclass(frozen=True, kw_only=True)
class DeviceSpec:
    """One of ``[[qemu.devices]]``."""

    TABLE: ClassVar[str] = "qemu.devices."

    model: str

    def __post_init__(self) -> None:
        check_types(self, self.TABLE)
        check_choice(self.TABLE + "model", self.model, DEVICE_MODELS)


@dataclass(frozen=True, kw_only=True)
class QemuSpec:
    """The ``[qemu]`` table; invalid values raise InvalidArgumentError naming the field."""

    TABLE: ClassVar[str] = "qemu."

    machine: str = "q35"
    """Machine type. An alias becomes the versioned name when the machine is first run, and stays that."""
    cpu: str = "Nehalem-v1"
    accelerator: str = AUTO
    """``kvm``, ``tcg``, or ``auto``: the best that works where the machine is first run, and stays that."""
    kernel: str = ""
    initrd: str = ""
    append: str = ""
    firmware: str = ""
    """Firmware image; empty: the one that QEMU brings."""
    disks: tuple[DiskSpec, ...] = ()
    nics: tuple[NicSpec, ...] = ()
    memory_backing: str = field(default=TMPFS, metadata=WIDENED_IN_2)
    """What guest memory is: a file in the host's ram_dir (``tmpfs``) or huge_dir (``hugetlbfs``), a shared-memory
    file without a name (``memfd``), or memory of QEMU's own (``anonymous``)."""
    binary: str = "/usr/bin/qemu-system-x86_64"
    serial: str = field(default=SERIAL_FILE, metadata=ADDED_IN_2)
    """Where the first serial port leads: a file, or also a socket in the machine's folder."""
    devices: tuple[DeviceSpec, ...] = field(default=(), metadata=ADDED_IN_2)
    agent: bool = field(default=False, metadata=ADDED_IN_4)
    """Whether the guest has a channel for QEMU's guest agent, by which its clock is put right after a pause."""

    def __post_init__(self) -> None:
        check_types(self, self.TABLE)
        check_pattern(self.TABLE + "machine", self.machine, _MACHINE, "such as q35 or pc-q35-7.2")
        check_pattern(self.TABLE + "cpu", self.cpu, _CPU, "the name of a CPU model, without options")
        if self.cpu in _HOSTS_OWN_CPU:
            fault = f"{self.cpu!r} means another CPU on every host, so the machine could not leave this one"
            raise invalid(self.TABLE + "cpu", fault, "name a model, such as Nehalem-v1")
        check_choice(self.TABLE + "accelerator", self.accelerator, (AUTO, *ACCELERATORS))
        check_choice(self.TABLE + "memory_backing", self.memory_backing, MEMORY_BACKINGS)
        check_choice(self.TABLE + "serial", self.serial, (SERIAL_FILE, SERIAL_SOCKET))
        for key, value in self.host_files().items():
            check_path(key, value)
        check_path(self.TABLE + "binary", self.binary)
        self._check_boot()
        self._check_buses()
        self._check_nics()
        self._check_devices()

    def _check_boot(self) -> None:
        for key in ("initrd", "append"):
            if getattr(self, key) and not self.kernel:
                raise invalid(f"{self.TABLE}{key}", "is of no use without a kernel", "name the kernel too")
        if len(self.append) > MAX_APPEND_CHARS or not self.append.isprintable():
            remedy = f"at most {MAX_APPEND_CHARS} printable characters"
            raise invalid(self.TABLE + "append", "too long or not printable", remedy)

    def _check_buses(self) -> None:
        for bus, most in ((SATA, _SATA_PORTS), (SCSI, _MAX_SCSI)):
            found = sum(disk.bus == bus for disk in self.disks)
            if found > most:
                fault = f"{found} disks are on the bus {bus}, which has room for {most}"
                raise invalid(self.TABLE + "disks", fault, "use another bus for the others")

    def _check_nics(self) -> None:
        if sum(nic.metadata for nic in self.nics) > 1:
            fault = "the metadata service answers on more than one interface"
            raise invalid(self.TABLE + "nics", fault, "leave metadata to one of them")

    def _check_devices(self) -> None:
        key = self.TABLE + "devices"
        models = [device.model for device in self.devices]
        if len(models) > _MAX_DEVICES:
            raise invalid(key, f"{len(models)} devices are too many", f"at most {_MAX_DEVICES}")
        twice = [model for model in models if model not in USB_MODELS and models.count(model) > 1]
        if twice:
            raise invalid(key, f"{twice[0]} is there more than once", "name it once")
        if set(models) & set(USB_MODELS) and USB_CONTROLLER not in models:
            raise invalid(key, "USB devices have nothing to be plugged into", f"name {USB_CONTROLLER} too")
        if self.memory_backing == HUGETLBFS and BALLOON in models:
            fault = f"{BALLOON} gives back single pages, which huge pages do not have"
            raise invalid(key, fault, "use another memory_backing, or remove it")

    @property
    def balloon(self) -> bool:
        """Whether the guest can give memory back while it runs."""
        return any(device.model == BALLOON for device in self.devices)

    @property
    def resolved(self) -> bool:
        """Whether it means the same on every host."""
        return self.accelerator != AUTO and self.machine not in MACHINE_ALIASES

    def host_files(self) -> dict[str, str]:
        """The files of the host that the guest is given, by the names of the fields that name them."""
        named = {key: getattr(self, key) for key in ("kernel", "initrd", "firmware")}
        found = {self.TABLE + key: path for key, path in named.items() if path}
        return found | {
            f"{self.TABLE}disks[{number}].path": disk.path for number, disk in enumerate(self.disks)
        }


def check_path(key: str, value: str) -> None:
    """Refuse a path that is not absolute and plain."""
    path = PurePosixPath(value)
    plain = value.isprintable() and len(value) <= MAX_PATH_CHARS and str(path) == value
    if not plain or not path.is_absolute() or ".." in path.parts:
        raise invalid(key, f"{value!r} has the wrong form", "it must be an absolute path without '..'")
