"""Tracking the writes of a QEMU from outside leaves it as it was, whatever it is doing and however often."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

import vmferry
from tests.integration.hosts import Bystander, World
from tests.integration.qemu.conftest import LinuxGuest, boot, linux_spec, ticker_spec
from tests.integration.qemu.leftovers import left_in_process
from tests.integration.services import descriptors, eventually
from vmferry.machines.command import render_command
from vmferry.machines.launcher import start_machine
from vmferry.machines.paths import MachinePaths
from vmferry.machines.port import RunState
from vmferry.machines.qmp import QmpMachine
from vmferry.memory.regions import RamFile, Region, find_mapping
from vmferry.memory.trackers import PagemapScanTracker

pytestmark = [pytest.mark.usefixtures("tidy"), pytest.mark.timeout(180)]

MACHINE = "pc-q35-7.2"
CYCLES = 200
KILLS = 20
# Tracks again and again until it is killed.
TRACKS = """
import sys
from vmferry.memory.inject import inject_write_tracking
pid, address, length = map(int, sys.argv[1:])
print("begin", flush=True)
while True:
    inject_write_tracking(pid, address, length).remove()
"""


@dataclass(frozen=True)
class Footprint:
    """What a process looks like from outside, as far as it may not change."""

    descriptors: list[str]
    mappings: Counter[str]
    threads: int
    tracer: str
    filtered: str

    @classmethod
    def of(cls, pid: int) -> Footprint:
        """How it looks now."""
        maps = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8", errors="replace").splitlines()
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
        facts = dict(line.split(":\t", 1) for line in status if ":\t" in line)
        # Permissions and file of each mapping; where the allocator's ends is the guest's business.
        kinds = Counter(" ".join([line.split()[1], *line.split()[5:]]) for line in maps)
        return cls(descriptors(pid), kinds, int(facts["Threads"]), facts["TracerPid"], facts["Seccomp"])


async def assert_as_before(pid: int, before: Footprint) -> None:
    """A process looks as it did; what the hypervisor itself opens for a moment is waited for."""
    await eventually(lambda: Footprint.of(pid) == before, f"the process looks as before: {before}")


def track_once(pid: int, region: Region) -> None:
    """Arm, write to nothing, scan, and disarm."""
    tracker = PagemapScanTracker(find_mapping(pid, region))
    tracker.arm()
    try:
        tracker.scan()
        tracker.count()
    finally:
        tracker.disarm()


@pytest.fixture(scope="module")
async def busy(world: World, images: Path) -> AsyncIterator[LinuxGuest]:
    """A guest of four processors that writes, for all tests of this module."""
    guest = await boot(world, linux_spec(images, vcpus=4, writes=8, memory_mib=96))
    world.bystander = Bystander(world, guest, world.a, world.b)
    yield guest
    world.bystander = None
    await world.end_guests()


@contextmanager
def asked_all_the_time(machine: QmpMachine) -> Iterator[None]:
    """Have QEMU's own threads, and the one that reads its commands, work all the time."""

    async def ask() -> None:
        while True:
            await machine.run_state()
            await asyncio.sleep(0.002)

    task = asyncio.get_running_loop().create_task(ask())
    try:
        yield
    finally:
        task.cancel()


@contextmanager
def started(command: list[str], stdout: int = subprocess.DEVNULL) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a group of its own, all of which is killed at the end."""
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        env=os.environ | {"PYTHONPATH": str(Path(vmferry.__file__).parents[1])},
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize("state", ["never run", "running", "paused", "stopped by a signal"])
async def test_a_machine_is_as_before_in_every_state(world: World, images: Path, state: str) -> None:
    """It stays in its state, goes on from there, and holds nothing more than before; all under its filter."""
    spec = ticker_spec(images, machine=MACHINE, vcpus=2)
    guest = LinuxGuest(spec, world.a)
    world.guests.append(guest)
    machine = await start_machine(spec, world.a.directory)
    try:
        permit = world.a.ledger.birth(spec.uuid)
        if state != "never run":
            await machine.cont(permit)
            await guest.wait_ticks(world.a)
        if state == "paused":
            await machine.stop()
        wanted = await machine.run_state()
        before = Footprint.of(machine.pid)
        assert before.filtered == "2"
        if state == "stopped by a signal":
            machine.process.send_signal(signal.SIGSTOP)
            await eventually(lambda: _is_stopped(machine.pid), "it is stopped")
        for _ in range(5):
            await asyncio.to_thread(track_once, machine.pid, machine.ram)
        if state == "stopped by a signal":
            assert _is_stopped(machine.pid)
            machine.process.send_signal(signal.SIGCONT)
        await assert_as_before(machine.pid, before)
        assert await machine.run_state() is wanted
        await machine.cont(permit)
        assert await machine.run_state() is RunState.RUNNING
        await guest.assert_clean(world.a)
        assert left_in_process(world.a, guest) == []
    finally:
        machine.process.send_signal(signal.SIGCONT)
        await machine.close()


def _is_stopped(pid: int) -> bool:
    return "State:\tT" in Path(f"/proc/{pid}/status").read_text(encoding="ascii")


async def test_a_machine_without_a_filter_is_as_before(images: Path) -> None:
    """The control: a QEMU started by hand, without a sandbox."""
    spec = ticker_spec(images, machine=MACHINE)
    with tempfile.TemporaryDirectory(prefix="vf-", dir="/dev/shm") as folder:
        paths = MachinePaths(Path(folder), Path(folder) / "ram")
        RamFile.create(paths.ram, spec.memory_mib * 1024 * 1024).close()
        command = render_command(spec, paths, incoming=False)
        at = command.index("-sandbox")
        del command[at : at + 2]
        command.remove("-S")
        with started(command) as process:

            def said() -> int:
                return paths.serial.read_bytes().count(b"tick") if paths.serial.exists() else 0

            await eventually(lambda: said() > 2, "the guest ticks")
            before = Footprint.of(process.pid)
            assert before.filtered == "0"
            for _ in range(5):
                await asyncio.to_thread(
                    track_once, process.pid, Region("ram", paths.ram, spec.memory_mib * 1024 * 1024)
                )
            await assert_as_before(process.pid, before)
            ticks = said()
            await eventually(lambda: said() > ticks + 2, "the guest ticks on")
            assert b"bad=1" not in paths.serial.read_bytes()


async def test_two_hundred_trackers_leave_nothing(world: World, busy: LinuxGuest) -> None:
    """A busy guest of four processors ticks on between them; neither process holds anything more afterwards."""
    machine = world.a.directory.open(world.a.record(busy.id), observe=True)
    try:
        with asked_all_the_time(machine):
            await busy.wait_ticks(world.a)
            before, own = Footprint.of(machine.pid), len(descriptors(os.getpid()))
            for number in range(CYCLES):
                await asyncio.to_thread(track_once, machine.pid, machine.ram)
                if number % 20 == 0:
                    await busy.wait_ticks(world.a, 1)
        await assert_as_before(machine.pid, before)
        await eventually(lambda: len(descriptors(os.getpid())) <= own, "nothing stays open here")
        assert left_in_process(world.a, busy) == []
    finally:
        await machine.close()
    await busy.assert_clean(world.a)


async def test_a_tracker_that_is_killed_at_any_moment_leaves_nothing(world: World, busy: LinuxGuest) -> None:
    """Its whole process group dies, again and again: the guest ticks on, and its process is as before."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    rng = random.Random(seed)
    machine = world.a.directory.open(world.a.record(busy.id), observe=True)
    mapped = find_mapping(machine.pid, machine.ram)
    before = Footprint.of(machine.pid)
    numbers = map(str, (machine.pid, mapped.address, machine.ram.size_bytes))
    command = [sys.executable, "-c", TRACKS, *numbers]
    for _ in range(KILLS):
        with started(command, stdout=subprocess.PIPE) as tracker:
            assert tracker.stdout is not None
            assert await asyncio.to_thread(tracker.stdout.readline) == b"begin\n"
            await asyncio.sleep(
                rng.uniform(0, 0.1)
            )  # the moment of the kill is the random input, nothing is awaited
        await busy.wait_ticks(world.a, 1)
    await assert_as_before(machine.pid, before)
    assert left_in_process(world.a, busy) == []
    await busy.assert_clean(world.a)
