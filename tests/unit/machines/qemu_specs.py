"""Descriptions of a QEMU machine, a short one and one that says all, and the paths of it."""

from __future__ import annotations

from pathlib import Path

from vmferry.machines.paths import MachinePaths

UUID = "0f8fad5b-d9cb-469f-a165-70867728950e"
WHOLE = f"""
name = "web-1"
uuid = "{UUID}"
kind = "qemu"
memory_mib = 256
vcpus = 2

[qemu]
machine = "pc-q35-7.2"
accelerator = "tcg"
kernel = "/images/vmlinuz"
initrd = "/images/initrd"
append = "console=ttyS0 quiet"
firmware = "/images/bios.bin"

[[qemu.disks]]
path = "/images/root,1.raw"
format = "raw"
shared = true

[[qemu.disks]]
path = "/images/data.qcow2"
format = "qcow2"
read_only = true

[[qemu.nics]]
backend = "user"
mac = "52:54:00:12:34:56"

[[qemu.nics]]
backend = "tap"
tap = "tap-web"
mac = "52:54:00:12:34:57"
"""
SHORT = f'name = "web-1"\nuuid = "{UUID}"\nkind = "qemu"\nmemory_mib = 64\n[qemu]\n'
PATHS = MachinePaths(home=Path("/m,1/web-1"), ram=Path("/r/u.ram"))
