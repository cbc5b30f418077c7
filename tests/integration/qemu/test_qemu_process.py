"""One real QEMU process: what it is probed for, how it is started and driven, and what its saved state is made of."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

import vmferry
from dest_svc.admission import refusals
from tests.integration.ownmemory import heap, untouched_pages
from tests.integration.qemu.conftest import QEMU
from tests.integration.services import eventually_async, processes_with
from tests.support import require
from vmferry.config import HostConfig
from vmferry.errors import InvalidArgumentError, MachineFailedError, WrongPhaseError
from vmferry.handoff.ledger import HostLedger
from vmferry.machines import host
from vmferry.machines.directory import MachineDirectory
from vmferry.machines.launcher import start_machine, stop_machine
from vmferry.machines.port import RunState
from vmferry.machines.qemu import devicestate, probe
from vmferry.machines.qemu.spec import QemuSpec
from vmferry.machines.qmp import QmpMachine
from vmferry.machines.spec import MachineSpec, new_qemu_spec


@pytest.fixture(autouse=True)
def _qemu() -> None:
    require(QEMU.exists(), f"no {QEMU} (apt install qemu-system-x86)")


@pytest.fixture
def directory() -> Iterator[MachineDirectory]:
    """Where machines live; nothing of them may be left."""
    with (
        tempfile.TemporaryDirectory(prefix="vf-") as run,
        tempfile.TemporaryDirectory(prefix="vf-", dir="/dev/shm") as ram,
    ):
        yield MachineDirectory(Path(run) / "m", Path(ram) / "r")
        assert list((Path(run) / "m").iterdir()) == list((Path(ram) / "r").iterdir()) == []
        assert processes_with(run) == []


def open_to_others(machine: QmpMachine) -> list[Path]:
    """The files of a machine that other users could use."""
    paths = machine.paths
    files = (paths.home, paths.ram, paths.serial, paths.qmp, paths.observer)
    return [path for path in files if path.stat().st_mode & 0o077]


def filtered(pid: int) -> bool:
    """Whether a process is under a system call filter."""
    return "Seccomp:\t2" in Path(f"/proc/{pid}/status").read_text(encoding="ascii")


def bare(vcpus: int = 1, **changes: str) -> MachineSpec:
    """A machine without anything to boot."""
    part = QemuSpec(**{"accelerator": "tcg", **changes})
    return new_qemu_spec("bare", 16, vcpus, part)


@pytest.fixture
async def machine(directory: MachineDirectory) -> AsyncIterator[QmpMachine]:
    """One that was started, with two processors, and has executed nothing."""
    started = await start_machine(probe.resolve(bare(2)), directory)
    yield started
    await stop_machine(started, directory)


def test_a_description_is_resolved_to_what_this_host_has() -> None:
    """The alias becomes a versioned name, and ``auto`` an accelerator that executed guest code here."""
    spec = probe.resolve(bare(accelerator="auto"))
    assert spec.qemu is not None
    assert spec.qemu.resolved
    assert spec.qemu.machine.startswith("pc-q35-")
    assert probe.accelerator_problem(str(QEMU), spec.qemu.accelerator, spec.qemu.cpu) == ""
    assert probe.resolve(spec) == spec


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"machine": "pc-q35-99.0"}, "qemu.machine"),
        ({"cpu": "Nonesuch-v1"}, "qemu.accelerator"),
        ({"cpu": "Skylake-Server-v1"}, "qemu.accelerator"),
    ],
)
def test_what_this_host_lacks_is_refused_by_name(changes: dict[str, str], field: str) -> None:
    """An unknown machine type or CPU, and one whose features TCG cannot offer in full, are told before a start."""
    with pytest.raises(InvalidArgumentError) as caught:
        probe.resolve(bare(**changes))
    assert caught.value.field == field
    assert caught.value.instance_remedy


def test_a_binary_that_is_none_is_told(tmp_path: Path) -> None:
    """A missing binary, and one that is no QEMU, are failures with a remedy; a host then does not offer the kind."""
    other = tmp_path / "qemu"
    other.write_text("#!/bin/sh\nexit 3\n")
    other.chmod(0o755)
    for path in (tmp_path / "missing", other):
        with pytest.raises(MachineFailedError, match=str(path)):
            probe.probe_binary(str(path))
    assert [offer.kind for offer in host.kind_offers([other, tmp_path / "missing"])] == ["microvm"]


def test_the_offer_names_what_the_binary_has() -> None:
    """Version, machine types and the accelerators that work are in a host's offer."""
    _, offer = host.kind_offers([QEMU])
    assert (offer.kind, offer.binary) == ("qemu", str(QEMU))
    assert offer.version == probe.probe_binary(str(QEMU)).version_text
    assert any(name.startswith("pc-q35-") for name in offer.machine_types)
    assert "tcg" in offer.accelerators


@pytest.mark.parametrize(
    ("changes", "refusal", "field"),
    [
        ({"machine": "pc-q35-99.0"}, "machine.type-unsupported", "qemu.machine"),
        ({"cpu": "Skylake-Server-v1"}, "accelerator.unavailable", "qemu.accelerator"),
        ({}, "", ""),
    ],
)
def test_a_destination_refuses_what_it_cannot_run(changes: dict[str, str], refusal: str, field: str) -> None:
    """A machine type and CPU features that its QEMU lacks are found out before anything is started."""
    found = list(refusals(bare(**({"machine": "pc-q35-7.2"} | changes)), HostConfig()))
    assert [(one.id, one.field) for one in found] == ([(refusal, field)] if refusal else [])


async def test_a_started_machine_is_locked_down(machine: QmpMachine) -> None:
    """It waits, its files are closed to others, it is under a system call filter, and nothing may take its place."""
    assert await machine.run_state() is RunState.PRELAUNCH
    assert open_to_others(machine) == []
    assert filtered(machine.pid)
    facts = await machine.inspect()
    assert facts.version == probe.probe_binary(str(QEMU)).version_text
    assert facts.blockers == ()
    assert await machine.vcpu_times() is None


async def test_two_clients_do_not_wait_for_each_other(
    machine: QmpMachine, directory: MachineDirectory
) -> None:
    """While one drives the machine, another may ask it how it is."""
    assert await machine.run_state() is RunState.PRELAUNCH
    observer = directory.open(directory.find(machine.spec.uuid), observe=True)
    try:
        assert await observer.run_state() is RunState.PRELAUNCH
    finally:
        await observer.close()


async def test_device_state_is_told_apart_and_loads(machine: QmpMachine, directory: MachineDirectory) -> None:
    """The sections of a real stream are all that is in it, each once, named and versioned; its bytes load."""
    data = await machine.save_device_state()
    assert await machine.run_state() is RunState.POSTMIGRATE
    state = devicestate.parse(data)
    assert state.joined() == data
    named = {(section.name, section.instance): section.version for section in state.sections}
    assert len(named) == len(state.sections)
    assert {("timer", 0), ("cpu", 0), ("cpu", 1), ("apic", 1), ("serial", 0)} <= set(named)
    assert named["cpu", 0] >= 12
    assert all(len(section.data) > 20 for section in state.sections)

    async with waiting_twin(machine, directory) as there:
        assert await there.run_state() is RunState.INMIGRATE
        with pytest.raises(WrongPhaseError):
            await there.save_device_state()
        await there.load_device_state(data)
        assert await there.run_state() is RunState.PRELAUNCH  # as it was: it has executed nothing
        await there.announce()


async def test_a_machine_that_waits_has_taken_the_memory_to_load_with(
    machine: QmpMachine, directory: MachineDirectory
) -> None:
    """It has all of its heap beforehand, and loads."""
    data = await machine.save_device_state()
    async with waiting_twin(machine, directory) as there:
        assert untouched_pages(there.pid, *heap(there.pid)) > 0
        await quite_ready_to_load(there)
        assert untouched_pages(there.pid, *heap(there.pid)) == 0
        await there.load_device_state(data)
        assert await there.run_state() is RunState.PRELAUNCH


async def test_a_machine_that_may_not_be_touched_loads_all_the_same(
    machine: QmpMachine, directory: MachineDirectory, caplog: pytest.LogCaptureFixture
) -> None:
    """A debugger at the waiting process costs its guest time, and nothing else."""
    data = await machine.save_device_state()
    async with waiting_twin(machine, directory) as there:
        with debugged(there.pid), caplog.at_level("INFO", logger="vmferry.machines.loading"):
            await quite_ready_to_load(there)
            assert "is already traced by process" in caplog.text
            await there.load_device_state(data)
            assert await there.run_state() is RunState.PRELAUNCH


async def test_a_load_does_not_wait_for_memory_to_be_taken(
    machine: QmpMachine, directory: MachineDirectory
) -> None:
    """Whoever is quicker loads, and nobody comes near the process any more."""
    data = await machine.save_device_state()
    async with waiting_twin(machine, directory) as there:
        preparing = await there.get_ready_to_load()
        await there.load_device_state(data)
        assert preparing is not None
        assert preparing.cancelled()
        assert await there.run_state() is RunState.PRELAUNCH
        # To another hold of it, it is a machine that does not wait any more: its guest may run.
        await there.close()
        other = QmpMachine(there.spec, there.paths, there.process)
        assert await other.get_ready_to_load() is None
        await other.close()


@asynccontextmanager
async def waiting_twin(machine: QmpMachine, directory: MachineDirectory) -> AsyncIterator[QmpMachine]:
    """A process of the same description on another host, as it were, that waits for the machine's device state."""
    twin = MachineDirectory(directory.root.with_name("twin"), directory.ram_root.with_name("twin"))
    there = await start_machine(machine.spec, twin, incoming=True)
    try:
        yield there
    finally:
        await stop_machine(there, twin)


async def quite_ready_to_load(machine: QmpMachine) -> None:
    """Have a machine that waits get ready, to the end of it."""
    preparing = await machine.get_ready_to_load()
    assert preparing is not None
    await preparing


@contextmanager
def debugged(pid: int) -> Iterator[None]:
    """Have another process trace one, which runs on."""
    text = f"from vmferry.memory.ptrace import Tracee; Tracee({pid}, {pid}); print('traces', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", text],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(Path(vmferry.__file__).parents[1])},
        start_new_session=True,
    ) as tracer:
        try:
            assert tracer.stdout is not None
            assert tracer.stdout.readline() == b"traces\n"
            yield
        finally:
            tracer.kill()


@pytest.mark.parametrize("taken_bytes", [0, 1, 100_000])
async def test_a_save_that_is_broken_off_does_not_hold_the_machine(
    machine: QmpMachine, directory: MachineDirectory, tmp_path: Path, taken_bytes: int
) -> None:
    """The service that took the state dies in the middle of it: the next one has the guest go on."""
    path = machine.paths.state_socket
    await machine._migration.prepare_device_state()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen(1)
        await machine._monitor.execute("migrate", {"uri": f"unix:{path}"})
        link, _ = listener.accept()
        with link:
            while taken_bytes > 0:
                taken_bytes -= len(link.recv(taken_bytes))
    await machine.close()
    path.unlink()
    other = directory.open(directory.find(machine.spec.uuid))
    try:
        await other.cont(HostLedger(tmp_path).birth(machine.spec.uuid))
        assert await other.run_state() is RunState.RUNNING
        await other.stop()
        assert devicestate.parse(await other.save_device_state()).sections
    finally:
        await other.close()


async def test_a_guest_that_goes_on_is_not_saved_any_more(machine: QmpMachine, tmp_path: Path) -> None:
    """A save that takes long is ended first: QEMU would stop the guest again when it comes to its end."""
    path = machine.paths.state_socket
    await machine._migration.prepare_device_state()
    await machine._monitor.execute("migrate-set-parameters", {"max-bandwidth": 1000})
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen(1)
        await machine._monitor.execute("migrate", {"uri": f"unix:{path}"})

        async def saves() -> bool:
            return await machine._migration.status() == "active"

        await eventually_async(saves, "QEMU is in the middle of it")
        await machine.cont(HostLedger(tmp_path).birth(machine.spec.uuid))
        assert await machine.run_state() is RunState.RUNNING
        assert await machine._migration.status() == "cancelled"
    path.unlink()


@pytest.mark.parametrize("damage", ["cut", "end", "section", "start", "foreign"])
async def test_a_damaged_state_is_refused(machine: QmpMachine, damage: str) -> None:
    """A stream that is cut short, or is not what its description says, never counts as a machine's state."""
    data = await machine.save_device_state()
    state = devicestate.parse(data)
    without = b"".join(section.data for section in state.sections[1:])
    damaged = {
        "cut": data[:-1],
        "end": data[: -len(state.description)],
        "section": state.preamble + without + state.description,
        "start": data[1:],
        "foreign": b"",
    }
    with pytest.raises(devicestate.StateFormatError):
        devicestate.parse(damaged[damage])


async def test_state_that_is_none_ends_the_copy_and_is_told(directory: MachineDirectory) -> None:
    """QEMU does not survive state it cannot read; that is a failure in its own words, and leaves nothing."""
    there = await start_machine(probe.resolve(bare()), directory, incoming=True)
    try:
        with pytest.raises(MachineFailedError, match="ended while loading"):
            await there.load_device_state(b"not the state of a machine" * 10)
    finally:
        await stop_machine(there, directory)


async def test_a_start_that_fails_tells_why(directory: MachineDirectory) -> None:
    """What QEMU says to its log is in the error, and nothing is left."""
    spec = probe.resolve(bare())
    assert spec.qemu is not None
    spec = replace(spec, qemu=replace(spec.qemu, kernel="/nonexistent/vmlinuz"))
    with pytest.raises(MachineFailedError, match="nonexistent"):
        await start_machine(spec, directory)
