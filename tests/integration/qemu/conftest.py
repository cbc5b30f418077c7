"""Real QEMU machines with a Linux guest that checks itself, on the hosts that all integration tests use."""

from __future__ import annotations

import asyncio
import os
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.integration.hosts import Guest, World, open_world
from tests.integration.qemu import firmware
from tests.integration.services import Host, eventually
from tests.support import require
from vmferry.cli.machine import end_machine
from vmferry.machines.qemu import guest, probe
from vmferry.machines.qemu.guest import verdict
from vmferry.machines.qemu.spec import NicSpec, QemuSpec
from vmferry.machines.spec import MachineSpec, new_mac, new_qemu_spec

QEMU = Path(QemuSpec.binary)
BOOT_S = 60.0
SPEAKS_S = 60.0
OLD_CPU = "pentium3"
"""All that the smallest guest needs; nested KVM does not always have more."""


@dataclass
class LinuxGuest(Guest):
    """A Linux guest of a test, wherever it is."""

    last_tick: int = 0
    """The last sign of life that was seen anywhere."""

    def verdict(self, host: Host) -> verdict.Verdict:
        """What it said on a host."""
        return verdict.verdict(self.serial(host))

    async def wait_ticks(self, host: Host, count: int = 3) -> None:
        """Wait for so many more signs of life."""
        seen = len(self.verdict(host).ticks)
        await eventually(
            lambda: len(self.verdict(host).ticks) >= seen + count, "the guest ticks", seconds=SPEAKS_S
        )

    async def assert_clean(self, host: Host) -> None:
        """It counts on from where it was, without a hole, and all its files are what they were."""
        await self.wait_ticks(host)
        now = self.verdict(host).ticks[-1].number
        assert now > self.last_tick
        await eventually(
            lambda: self.verdict(host).checked_after(now), "the guest reads all its files", seconds=SPEAKS_S
        )
        found = self.verdict(host)
        assert found.ok, (found.faults, self.serial(host)[-2000:])
        self.last_tick = found.ticks[-1].number


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a kernel and an initial file system; the tests are left out where they cannot be had."""
    require(QEMU.exists(), f"no {QEMU} (apt install qemu-system-x86)")
    kernels = [path for path in Path("/boot").glob("vmlinuz*") if os.access(path, os.R_OK)]
    require(kernels, "no kernel in /boot that can be read (apt install linux-image-cloud-amd64)")
    require(guest.BUSYBOX.exists(), f"no {guest.BUSYBOX} (apt install busybox-static)")
    folder = tmp_path_factory.mktemp("images")
    (folder / "vmlinuz").write_bytes(guest.newest_kernel().read_bytes())
    (folder / "initrd").write_bytes(guest.initramfs())
    (folder / "ticker.rom").write_bytes(firmware.image())
    return folder


@pytest.fixture(scope="session")
def card_modules(images: Path) -> list[Path]:
    """The modules by which the kernel in the folder of images drives a network card."""
    found = guest.modules_of(guest.newest_kernel(), ("virtio_pci", "virtio_net"))
    require(found, "the modules of the kernel in /boot are not installed (they come with its package)")
    return found


@pytest.fixture(scope="package")
async def world(images: Path) -> AsyncIterator[World]:
    """Hosts a and b for all tests with QEMU, which let in what lies in the folder of images."""
    async with open_world(image_roots=(images,), downtime_limit_ms=1000) as opened:
        yield opened


def linux_spec(
    images: Path, *, vcpus: int = 1, files: int = 8, writes: int = 0, nics: int = 0, memory_mib: int = 128
) -> MachineSpec:
    """A description of the self-checking guest."""
    part = QemuSpec(
        accelerator="tcg",
        kernel=str(images / "vmlinuz"),
        initrd=str(images / "initrd"),
        append=guest.append(files, writes),
        nics=tuple(NicSpec(backend="user", mac=new_mac()) for _ in range(nics)),
    )
    return replace(new_qemu_spec("vm", memory_mib, vcpus, part), name=f"lin-{uuid.uuid4().hex[:8]}")


def ticker_spec(images: Path, *, machine: str = "q35", vcpus: int = 1, memory_mib: int = 16) -> MachineSpec:
    """A description of the smallest guest that checks itself, which is up at once."""
    part = QemuSpec(accelerator="tcg", machine=machine, firmware=str(images / "ticker.rom"))
    return replace(new_qemu_spec("vm", memory_mib, vcpus, part), name=f"tic-{uuid.uuid4().hex[:8]}")


def ticker_in_stream(images: Path, accelerator: str, *, memory_mib: int = 64) -> MachineSpec:
    """The same, to be streamed: while it runs under ``kvm``, while it is paused under ``tcg``."""
    if accelerator == "kvm":
        problem = probe.accelerator_problem(str(QEMU), "kvm", OLD_CPU)
        require(not problem, f"KVM runs no guest here: {problem}")
    part = QemuSpec(accelerator=accelerator, cpu=OLD_CPU, firmware=str(images / "ticker.rom"))
    return replace(new_qemu_spec("vm", memory_mib, 1, part), name=f"tic-{uuid.uuid4().hex[:8]}")


async def boot(world: World, spec: MachineSpec, host: Host | None = None) -> LinuxGuest:
    """Run a machine, and wait until its guest is ready and speaks."""
    host = host or world.a
    linux = await _boot_once(world, spec, host)
    if linux is None:
        # An emulated kernel with four CPUs on two cores was once seen to stand still before vmferry had touched it.
        linux = await _boot_once(world, replace(spec, name=f"{spec.name}-2", uuid=str(uuid.uuid4())), host)
    assert linux is not None, "the guest has not booted, twice"
    assert linux.verdict(host).ready
    linux.last_tick = linux.verdict(host).ticks[-1].number
    return linux


async def _boot_once(world: World, spec: MachineSpec, host: Host) -> LinuxGuest | None:
    record = await host.run(spec)
    linux = LinuxGuest(record.spec, host)
    world.guests.append(linux)
    deadline = time.monotonic() + BOOT_S
    while time.monotonic() < deadline:
        if len(linux.verdict(host).ticks) > 2:
            return linux
        await asyncio.sleep(0.02)
    print(f"{spec.name} did not boot; it said:", record.paths.serial.read_text(errors="replace")[-2000:])
    world.guests.remove(linux)
    await end_machine(spec.name, host.config)
    return None
