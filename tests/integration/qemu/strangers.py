"""Guests that know nothing of vmferry and of each other: an initial file system around one shell script."""

from __future__ import annotations

import re
import stat
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests.integration.hosts import Guest, World
from tests.integration.services import Host, eventually
from vmferry.cli.machine import run_machine
from vmferry.machines.qemu import guest as linux
from vmferry.machines.qemu.spec import QemuSpec
from vmferry.machines.spec import MachineSpec, new_qemu_spec

BOOT_S = 60.0
_ALIVE = re.compile(r"^alive (\d+)\r?$", re.MULTILINE)
_PROLOGUE = """#!/bin/busybox sh
/bin/busybox mkdir -p /bin /proc /sys /tmp
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mount -t tmpfs tmpfs /tmp
for module in /modules/*; do insmod "$module"; done
exec </dev/null >/dev/ttyS0 2>&1
"""


@dataclass
class Stranger(Guest):
    """A guest that says ``alive N``, counting, or nothing at all."""

    speaks: bool = True

    def count(self, host: Host, word: str) -> int:
        """How often it said something on a host."""
        return self.serial(host).count(word)

    async def says(self, host: Host, word: str, times: int = 1) -> None:
        """Wait until it said something so often on a host."""
        await eventually(lambda: self.count(host, word) >= times, f"the guest says {word!r}", seconds=BOOT_S)

    async def assert_clean(self, host: Host) -> None:
        """If it speaks: it counts on, without a hole."""
        if not self.speaks:
            return
        before = self.count(host, "alive ")
        await self.says(host, "alive ", before + 2)
        numbers = alive(self.serial(host))
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
        assert "BAD" not in self.serial(host)


def alive(serial: str) -> list[int]:
    """The numbers that a guest said."""
    return [int(number) for number in _ALIVE.findall(serial)]


def stranger_initramfs(script: str, modules: Sequence[Path] = ()) -> bytes:
    """A file system whose first process mounts what is usual, and then runs a script that speaks on ttyS0."""
    init = linux.Entry("init", stat.S_IFREG | 0o755, (_PROLOGUE + script).encode())
    # The kernel unpacks one archive after the other; what comes later stays.
    return linux.initramfs(modules=modules) + linux.archive([init])


def stranger_spec(
    images: Path,
    script: str,
    *,
    memory_mib: int = 97,
    vcpus: int = 1,
    modules: Sequence[Path] = (),
    **part: Any,
) -> MachineSpec:
    """A machine that runs a script, with a kernel that says nothing."""
    name = f"odd-{uuid.uuid4().hex[:8]}"
    (images / name).write_bytes(stranger_initramfs(script, modules))
    values = {"accelerator": "tcg", "machine": "pc", "append": "quiet loglevel=0", **part}
    qemu = QemuSpec(kernel=str(images / "vmlinuz"), initrd=str(images / name), **values)
    return replace(new_qemu_spec("vm", memory_mib, vcpus, qemu), name=name)


async def run_stranger(world: World, spec: MachineSpec, *, speaks: bool = True) -> Stranger:
    """Start a machine on host a; nothing is waited for."""
    record = await run_machine(spec, world.a.config)
    guest = Stranger(record.spec, world.a, speaks=speaks)
    world.guests.append(guest)
    return guest
