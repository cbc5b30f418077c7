"""Machines as processes: started, driven over QMP, found again, stopped; with the real micro-VM."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import shutil
import signal
import stat
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import vmferry
from source_svc.residents import Residents
from tests.support import wait_until
from vmferry.errors import (
    InvalidArgumentError,
    MachineBusyError,
    MachineDeadError,
    MachineExistsError,
    MachineFailedError,
    MachineNotFoundError,
    MachineNotOwnedError,
    WrongPhaseError,
)
from vmferry.handoff.gate import _SEAL, ResumePermit
from vmferry.machines import launcher, qmp
from vmferry.machines.directory import MachineDirectory
from vmferry.machines.launcher import start_machine, stop_machine
from vmferry.machines.port import RunState
from vmferry.machines.process import ProcessIdentity, boot_id
from vmferry.machines.qmp import QmpMachine
from vmferry.machines.spec import MachineSpec, new_spec
from vmferry.memory.regions import Region

Start = Callable[..., Awaitable[QmpMachine]]
MIB = 1024 * 1024
QMP_TIMEOUT_S = 5.0


def _ended(process: ProcessIdentity) -> bool:
    return not process.alive()


def permit_for(machine_id: str) -> ResumePermit:
    return ResumePermit(machine_id, 1, _SEAL)


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the machines' processes import the vmferry under test, installed or not."""
    monkeypatch.setenv("PYTHONPATH", str(Path(vmferry.__file__).parents[1]))


@pytest.fixture
def hosts() -> Iterator[Callable[[], MachineDirectory]]:
    """Make hosts: short paths, memory on tmpfs, and no process left at the end."""
    made: list[MachineDirectory] = []
    folders: list[tempfile.TemporaryDirectory[str]] = []

    def make() -> MachineDirectory:
        folders.extend(tempfile.TemporaryDirectory(prefix="vf-", dir=base) for base in ("/tmp", "/dev/shm"))
        root, ram_root = (Path(folder.name) for folder in folders[-2:])
        made.append(MachineDirectory(root / "m", ram_root / "r", qmp_timeout_s=QMP_TIMEOUT_S))
        return made[-1]

    yield make
    for host in made:
        for path in host.root.glob("*/process.json"):
            try:
                process = ProcessIdentity.from_json(path.read_text())
            except ValueError:
                continue
            process.send_signal(signal.SIGKILL)
            wait_until(partial(_ended, process), what="the end of a machine")
    for folder in folders:
        folder.cleanup()


@pytest.fixture
def host(hosts: Callable[[], MachineDirectory]) -> MachineDirectory:
    return hosts()


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    """Start machines whose connections are closed at the end."""
    machines: list[QmpMachine] = []

    async def run(host: MachineDirectory, spec: MachineSpec | None = None, **options: bool) -> QmpMachine:
        machines.append(await start_machine(spec or new_spec("web", 4, "canary"), host, **options))
        return machines[-1]

    yield run
    for machine in machines:
        await machine.close()


def proc(pid: int | str, entry: str = "") -> Path:
    return Path("/proc", str(pid), entry)


def files_of(host: MachineDirectory) -> list[Path]:
    return [path for root in (host.root, host.ram_root) for path in root.rglob("*")]


async def test_a_started_machine_waits_and_a_stopped_one_leaves_nothing(
    host: MachineDirectory, start: Start
) -> None:
    """A start gives a private, listed process that has executed nothing; a stop removes every trace, twice."""
    spec = new_spec("web", 4, "canary")
    machine = await start(host, spec)
    assert await machine.run_state() is RunState.PRELAUNCH
    assert machine.ram == Region("ram", host.ram_root / f"{spec.uuid}.ram", 4 * MIB)
    (record,) = host.list()
    assert (record.spec, record.pid, record.alive) == (spec, machine.pid, True)
    assert host.find("web") == host.find(spec.uuid) == record
    assert os.getsid(machine.pid) == machine.pid
    assert proc(machine.pid, "cwd").readlink() == Path("/")
    assert {stat.S_IMODE(path.stat().st_mode) for path in files_of(host) if path.is_file()} == {0o600}
    assert stat.S_IMODE(record.paths.home.stat().st_mode) == 0o700

    await stop_machine(machine, host)
    assert files_of(host) == []
    wait_until(lambda: not proc(machine.pid).exists(), what="the reaping of the process")
    await stop_machine(machine, host)
    assert not await machine.alive()


async def test_a_guest_runs_only_with_a_permit_for_it(host: MachineDirectory, start: Start) -> None:
    """Another machine's permit is refused and changes nothing; stop and cont twice are as good as once."""
    machine = await start(host)
    with pytest.raises(MachineNotOwnedError):
        await machine.cont(permit_for(new_spec("other", 4, "canary").uuid))
    assert await machine.run_state() is RunState.PRELAUNCH
    for _ in range(2):
        await machine.cont(permit_for(machine.spec.uuid))
        assert await machine.run_state() is RunState.RUNNING
    for _ in range(2):
        await machine.stop()
        assert await machine.run_state() is RunState.PAUSED
    times = await machine.vcpu_times()
    assert times is not None
    assert times.boot_id == boot_id()
    assert times.last_stop_monotonic_ns is not None
    assert times.last_start_monotonic_ns is not None
    assert times.last_start_monotonic_ns < times.last_stop_monotonic_ns
    await machine.announce()
    await machine.send_serial("hello\n")
    with pytest.raises(InvalidArgumentError):
        await machine.send_serial("x" * (qmp.MAX_SERIAL_BYTES + 1))


async def test_device_state_goes_from_one_process_to_another(
    hosts: Callable[[], MachineDirectory], start: Start
) -> None:
    """What was saved here is loaded there and the guest goes on; each step twice is as good as once."""
    here, there = hosts(), hosts()
    source = await start(here)
    permit = permit_for(source.spec.uuid)
    await source.cont(permit)
    wait_until(lambda: source.paths.serial.stat().st_size > 0, what="the guest's first words")
    with pytest.raises(WrongPhaseError):
        await source.save_device_state()
    await source.stop()
    state = await source.save_device_state()
    assert state == await source.save_device_state()
    assert not source.paths.state_socket.exists()

    there.ram_root.mkdir()
    ram = there.paths(source.spec).ram
    shutil.copyfile(source.paths.ram, ram)
    ram.chmod(0o600)
    target = await start(there, source.spec, incoming=True, ram_exists=True)
    assert await target.run_state() is RunState.INMIGRATE
    with pytest.raises(WrongPhaseError):
        await target.cont(permit)
    for _ in range(2):
        await target.load_device_state(state)
        assert await target.run_state() is RunState.PAUSED
    with pytest.raises(WrongPhaseError):
        await target.load_device_state(state + b"x")
    await target.cont(permit)
    wait_until(lambda: target.paths.serial.stat().st_size > 0, what="the guest's words on the other side")
    assert not target.paths.state_socket.exists()
    await target.stop()
    with pytest.raises(WrongPhaseError):
        await target.load_device_state(state)

    await source.cont(permit)
    await source.stop()
    assert await source.save_device_state() != state


async def test_the_end_of_saving_is_told_before_the_hypervisor_is_asked(
    start: Start, host: MachineDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever looks for what the devices wrote need not wait for that answer; it is told once for each save."""
    machine = await start(host)
    happened = list[str]()
    completed = machine._migration.completed

    async def ask(command: str) -> bool:
        happened.append("asked")
        return await completed(command)

    monkeypatch.setattr(machine._migration, "completed", ask)
    await machine.save_device_state(all_come=lambda: happened.append("all come"))
    assert happened[0] == "all come"
    assert happened.count("all come") == 1
    assert "asked" in happened


async def test_a_copy_is_just_loaded_until_it_runs_or_dies(
    hosts: Callable[[], MachineDirectory], start: Start
) -> None:
    """The hypervisor's word that its copy is complete counts for a moment, and only while its process lives."""
    source = await start(hosts())
    state = await source.save_device_state()
    target = await start(hosts(), source.spec, incoming=True)
    assert not target.just_loaded(60)
    await target.load_device_state(state)
    assert target.just_loaded(60)
    assert not target.just_loaded(0)
    await target.cont(permit_for(target.spec.uuid))
    assert not target.just_loaded(60)

    another = await start(hosts(), source.spec, incoming=True)
    await another.load_device_state(state)
    assert another.just_loaded(60)
    os.kill(another.pid, signal.SIGKILL)
    assert await another.process.wait_ended(10)
    assert not another.just_loaded(60)


async def test_device_state_that_is_none_is_refused_in_the_words_of_the_hypervisor(
    host: MachineDirectory, start: Start
) -> None:
    """Rubbish is a failure of the machine, told with more than 'it failed', and the guest does not run."""
    machine = await start(host, incoming=True)
    with pytest.raises(MachineFailedError, match=r"migrate-incoming failed: .+"):
        await machine.load_device_state(b"no device state at all")
    if await machine.alive():
        assert await machine.run_state() is not RunState.RUNNING


async def test_a_lost_connection_is_opened_again(host: MachineDirectory, start: Start) -> None:
    """A cut, and a close, go unnoticed by the next command."""
    machine = await start(host)
    client = machine._monitor._client
    assert client is not None
    assert client._writer is not None
    client._writer.transport.abort()
    assert await machine.run_state() is RunState.PRELAUNCH
    assert machine._monitor._client is not client
    await machine.close()
    await machine.close()
    assert await machine.run_state() is RunState.PRELAUNCH


async def test_an_answer_that_was_lost_is_asked_for_again_where_that_does_no_harm(
    host: MachineDirectory, start: Start
) -> None:
    """A question whose connection is cut before the answer is put again; typing, which would repeat, is not."""
    machine = await start(host)

    async def cut(call: Coroutine[Any, Any, object]) -> object:
        machine.process.send_signal(signal.SIGSTOP)
        wait_until(lambda: " T " in proc(machine.pid, "stat").read_text(), what="the process to stand still")
        asking = asyncio.create_task(call)
        client = machine._monitor._client
        assert client is not None
        while not client._pending:  # noqa: ASYNC110 - the queue of the client announces nothing
            await asyncio.sleep(0)
        assert client._writer is not None
        client._writer.transport.abort()
        machine.process.send_signal(signal.SIGCONT)
        return await asking

    assert await cut(machine.run_state()) is RunState.PRELAUNCH
    with pytest.raises(MachineFailedError, match=r"ringbuf-write failed: the connection was lost"):
        await cut(machine.send_serial("once"))
    assert await machine.run_state() is RunState.PRELAUNCH


async def test_a_killed_process_is_told_as_dead(host: MachineDirectory, start: Start) -> None:
    """Every command to a process that is gone raises MachineDeadError; quit, which wanted that, does not."""
    machine = await start(host)
    machine.process.send_signal(signal.SIGKILL)
    for call in (machine.run_state, machine.stop, machine.save_device_state, machine.announce):
        with pytest.raises(MachineDeadError):
            await call()
    assert not await machine.alive()
    await machine.quit()
    (record,) = host.list()
    assert not record.alive
    with pytest.raises(MachineDeadError):
        host.open(record)
    host.forget(record, remove_ram=True)
    assert files_of(host) == []


async def test_a_machine_between_two_processes_is_still_a_resident(
    host: MachineDirectory, start: Start
) -> None:
    """While an update has ended the old process and not yet recorded the new one, the machine is here."""
    machine = await start(host)
    updated = {machine.spec.uuid}
    residents = Residents(host, between=updated.__contains__)
    assert residents.look()
    machine.process.send_signal(signal.SIGKILL)
    wait_until(lambda: _ended(machine.process), what="the end of the old process")
    residents.look()
    assert set(residents.records) == updated
    updated.clear()
    assert residents.look()
    assert not residents.records


async def test_a_process_that_hangs_is_a_failure_in_time_and_no_loss(
    host: MachineDirectory, start: Start
) -> None:
    """No answer is MachineFailedError within the limit, and the machine answers again when it goes on."""
    host.qmp_timeout_s = 0.3
    machine = await start(host)
    machine.process.send_signal(signal.SIGSTOP)
    with pytest.raises(MachineFailedError, match=r"no answer within 0\.3 s"):
        await machine.run_state()
    machine.process.send_signal(signal.SIGCONT)
    host.qmp_timeout_s = QMP_TIMEOUT_S
    again = host.open(host.find("web"))
    try:
        assert await again.run_state() is RunState.PRELAUNCH
    finally:
        await again.close()


async def test_a_process_that_hangs_is_stopped_by_force(
    host: MachineDirectory, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stop does not depend on the process listening."""
    monkeypatch.setattr(launcher, "_QUIT_S", 0.05)
    monkeypatch.setattr(launcher, "_TERM_S", 0.05)
    host.qmp_timeout_s = 0.3
    machine = await start(host)
    machine.process.send_signal(signal.SIGSTOP)
    await stop_machine(machine, host)
    assert not await machine.alive()
    assert files_of(host) == []


async def test_only_the_right_process_and_machine_are_spoken_to(host: MachineDirectory, start: Start) -> None:
    """Another process behind the socket, or another machine in it, is refused before any command."""
    machine = await start(host)
    own = ProcessIdentity.of(os.getpid())
    assert own is not None
    other = dataclasses.replace(machine.spec, uuid=new_spec("other", 4, "canary").uuid)
    for spec, process, words in (
        (machine.spec, own, f"process {machine.pid} answers"),
        (other, machine.process, f"it says it is {machine.spec.uuid}"),
    ):
        stranger = QmpMachine(spec, machine.paths, process)
        try:
            with pytest.raises(MachineFailedError, match=words):
                await stranger.stop()
        finally:
            await stranger.close()


async def test_a_start_that_fails_leaves_nothing(host: MachineDirectory, start: Start) -> None:
    """A process that ends at once is told with its last words; no file and no process stays."""
    with pytest.raises(MachineFailedError, match="no-such-program") as caught:
        await start(host, new_spec("web", 4, "no-such-program"))
    assert files_of(host) == []
    wait_until(lambda: not proc(caught.value.metadata["pid"]).exists(), what="the reaping of the process")


async def test_a_start_that_is_cancelled_leaves_nothing(host: MachineDirectory) -> None:
    """Cancelling a start ends the process that was on its way and removes its files."""
    task = asyncio.create_task(start_machine(new_spec("web", 4, "canary"), host))
    record = host.root / "web" / "process.json"
    while not record.exists():
        assert not task.done()
        await asyncio.sleep(0)
    process = ProcessIdentity.from_json(record.read_text())
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not process.alive()
    assert files_of(host) == []


async def test_a_memory_file_that_was_there_stays(host: MachineDirectory, start: Start) -> None:
    """Memory that somebody else made is checked, never replaced, and outlives a start that fails."""
    spec = new_spec("web", 4, "canary")
    host.ram_root.mkdir()
    ram = host.paths(spec).ram
    with pytest.raises(MachineFailedError, match="missing"):
        await start(host, spec, incoming=True, ram_exists=True)
    ram.write_bytes(bytes(MIB))
    with pytest.raises(MachineFailedError, match="1048576 bytes"):
        await start(host, spec, incoming=True, ram_exists=True)
    with pytest.raises(MachineExistsError):
        await start(host, spec)
    assert files_of(host) == [ram]


async def test_a_name_or_identity_is_given_once(host: MachineDirectory, start: Start) -> None:
    """A second machine of the same name, or the same UUID, is refused, and the first is untouched."""
    machine = await start(host)
    before = set(files_of(host))
    for spec in (new_spec("web", 4, "canary"), dataclasses.replace(machine.spec, name="other")):
        with pytest.raises(MachineExistsError):
            await start(host, spec)
    assert set(files_of(host)) == before
    assert await machine.run_state() is RunState.PRELAUNCH
    with pytest.raises(MachineBusyError):
        host.forget(host.find("web"), remove_ram=True)


async def test_a_reused_process_number_is_not_the_machine(host: MachineDirectory, start: Start) -> None:
    """A record whose start time is another than the process's is a dead machine, and can be forgotten."""
    machine = await start(host)
    record = json.loads(machine.paths.process.read_text())
    machine.paths.process.write_text(json.dumps({**record, "start_time": record["start_time"] + 1}))
    (found,) = host.list()
    assert (found.alive, found.pid) == (False, None)
    await stop_machine(machine, host)
    # The record is of another process now, so the stop had no right to remove it.
    assert found.paths.home.exists()
    host.forget(found, remove_ram=True)
    assert files_of(host) == []


def test_a_damaged_entry_hides_nobody(host: MachineDirectory) -> None:
    """Whatever lies in the folder, the good entries are listed and each bad one is named with its reason."""
    assert host.list() == []
    good = new_spec("good", 4, "canary")
    host.claim(good)
    for name in ("damaged", "renamed", "twin"):
        host.claim(new_spec(name, 4, "canary"))
    (host.root / "damaged" / "process.json").write_text("{")
    (host.root / "renamed").rename(host.root / "elsewhere")
    (host.root / "twin" / "spec.toml").write_text(dataclasses.replace(good, name="twin").to_toml())
    (host.root / "empty").mkdir()
    (host.root / "file").touch()
    (host.root / "link").symlink_to(host.root / "good")
    assert [record.spec.name for record in host.list()] == ["good"]
    reasons = {problem.path.name: problem.reason for problem in host.problems}
    assert set(reasons) == {"damaged", "elsewhere", "twin", "empty", "file", "link"}
    assert "process.json" in reasons["damaged"]
    assert "renamed" in reasons["elsewhere"]
    assert "good" in reasons["twin"]
    assert "spec.toml" in reasons["empty"]
    with pytest.raises(MachineNotFoundError, match=r"damaged: process\.json"):
        host.find("damaged")
    with pytest.raises(MachineNotFoundError):
        host.find("nobody")


def test_a_machine_without_process_can_be_forgotten_twice(host: MachineDirectory) -> None:
    """What a crash between claim and start left is listed as not alive and goes away."""
    host.claim(new_spec("web", 4, "canary"))
    (record,) = host.list()
    assert (record.alive, record.process) == (False, None)
    for _ in range(2):
        host.forget(record, remove_ram=True)
    assert files_of(host) == []
