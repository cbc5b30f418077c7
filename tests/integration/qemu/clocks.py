"""Guests that watch their clocks, pauses of a known length, and hosts whose clocks are wrong."""

from __future__ import annotations

import asyncio
import re
import signal
import stat
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Final

from tests.integration.hosts import Guest
from tests.integration.qemu.conftest import LinuxGuest, linux_spec
from tests.integration.services import Host, Service, eventually
from tests.support import require
from vmferry import failpoints
from vmferry.machines.qemu import guest as linux
from vmferry.machines.qemu.guest import Entry
from vmferry.machines.qemu.guest.agent import AGENT, agent_entries, agent_modules
from vmferry.machines.spec import MachineSpec
from vmferry.v1.clock_pb2 import ClockReport

WATCH: Final = Path(__file__).with_name("clockwatch.c")
_LINE: Final = re.compile(r"clock n=(\d+) ns=(\d+) back=(\d+) worst=(\d+)")
_WRONG: Final = """
import time
_time, _time_ns = time.time, time.time_ns
time.time = lambda: _time() + {seconds}
time.time_ns = lambda: _time_ns() + {seconds} * 10**9
"""
NEAR_US: Final = 150_000
"""How near a clock comes on a computer that has far more to do than this: an agent may be kept waiting for long."""


def watching_initrd(images: Path) -> Path:
    """A file system with the agent of this computer, and a program that watches the clock; made once."""
    path = images / "initrd-clock"
    if not path.exists():
        require(AGENT.exists(), f"no {AGENT} (apt install qemu-guest-agent)")
        program = images / "clockwatch"
        compiled = ["gcc", "-static", "-O1", "-o", str(program), str(WATCH)]
        subprocess.run(compiled, check=True, capture_output=True)
        watch = [
            Entry("extra", stat.S_IFDIR | 0o755),
            Entry("extra/watch", stat.S_IFREG | 0o755, program.read_bytes()),
        ]
        modules = agent_modules(linux.newest_kernel())
        path.write_bytes(linux.initramfs(modules=modules) + linux.archive([*agent_entries(), *watch]))
    return path


def watching_spec(images: Path, *, agent: bool = True) -> MachineSpec:
    """A description of a guest that watches its clock, with a channel for its agent or without one."""
    spec = linux_spec(images, files=2, memory_mib=160)
    assert spec.qemu is not None
    initrd = str(watching_initrd(images))
    return replace(spec, qemu=replace(spec.qemu, initrd=initrd, agent=agent))


def steps_back(guest: LinuxGuest, host: Host) -> tuple[int, int] | None:
    """How often, and how far, the guest has ever seen its time of day step back; it says so where it is now."""
    _, _, back, worst = _LINE.findall(guest.serial(host))[-1]
    return (int(back), int(worst)) if int(back) else None


async def watches_on(guest: LinuxGuest, host: Host) -> None:
    """Wait until it has looked at its clock again for a while."""
    seen = len(_LINE.findall(guest.serial(host)))
    await eventually(
        lambda: len(_LINE.findall(guest.serial(host))) >= seen + 2, "the guest watches its clock", seconds=60
    )


async def holds(service: Service, seconds: float) -> None:
    """Wait until a service has stopped itself, and let it go on after so long."""
    await eventually(lambda: service.status("State").startswith("T"), "the service stands there", seconds=60)
    await asyncio.sleep(seconds)  # the length of the pause is what is asked for
    service.signal(signal.SIGCONT)


async def arm(service: Service, what: str) -> None:
    """Start a service anew with failpoints, or without any."""
    service.environment.pop(failpoints.VARIABLE, None)
    if what:
        service.environment[failpoints.VARIABLE] = what
    await service.restart()


async def live_wrong(service: Service, folder: Path, seconds: int) -> None:
    """Start a service, and what it starts, with a time of day that is off by so much."""
    await asyncio.to_thread(_write_wrong_clock, folder, seconds)
    service.environment["PYTHONPATH"] = str(folder)
    await service.restart()


def _write_wrong_clock(folder: Path, seconds: int) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(_WRONG.format(seconds=seconds))


def assert_put_right(clock: ClockReport, pause_s: float) -> None:
    """It was behind by the pause, measured, and is right."""
    assert clock.measured, clock
    assert clock.offset_before_us <= -pause_s * 1e6 + NEAR_US, clock
    assert clock.method in {"guest-agent", "clock-device"}, clock
    assert abs(clock.offset_after_us) < NEAR_US, clock


def monotonic_canary(guest: Guest, host: Host) -> bool:
    """Whether the canary has seen no step back."""
    return "kind=time" not in guest.serial(host)
