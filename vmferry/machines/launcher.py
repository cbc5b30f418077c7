"""Starting and stopping the process of a machine.

Promise: a start gives a machine that answers and whose guest has executed nothing, or nothing at all: no
process, no file. Processes live in sessions of their own, so a service may end and come back while its
machines live on. A stop ends exactly the machine's process and leaves nothing of it.

A machine is a direct child of the service that started it, and a thread that does nothing else waits for its
end. The alternatives were worse: asyncio's subprocesses are killed together with their event loop, and an
orphan made by a double fork becomes a zombie for ever where the first process of a container is the service
itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import os
import signal
import stat
import subprocess
import threading
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Final

from vmferry.errors import (
    InsufficientMemoryError,
    MachineDeadError,
    MachineExistsError,
    MachineFailedError,
    MachineNotFoundError,
    VmferryError,
)
from vmferry.handoff.gate import ResumePermit
from vmferry.machines.command import render_command
from vmferry.machines.directory import MachineDirectory, MachineRecord
from vmferry.machines.paths import MachinePaths, write_whole
from vmferry.machines.port import RunState
from vmferry.machines.process import ProcessIdentity
from vmferry.machines.qmp import QmpMachine
from vmferry.machines.spec import MachineSpec
from vmferry.memory import memfd
from vmferry.memory.backings import HUGETLBFS, MEMFD, TMPFS
from vmferry.memory.hugepages import available_bytes
from vmferry.memory.regions import RamFile
from vmferry.together import to_the_end

DEFAULT_START_TIMEOUT_S: Final = 20.0

FILES: Final = (TMPFS, HUGETLBFS)
"""Kinds of guest memory that are files with names."""

_QUIT_S: Final = 5.0
_TERM_S: Final = 2.0
_KILL_S: Final = 5.0
_PASSED_ON: Final = ("PATH", "PYTHONPATH", "LANG", "VMFERRY_ACTIVITY_DIR")
_MIB: Final = 1024 * 1024


async def start_machine(
    spec: MachineSpec,
    directory: MachineDirectory,
    *,
    incoming: bool = False,
    ram_exists: bool = False,
    make_memory: Callable[[MachineSpec, Path], None] | None = None,
    start_timeout_s: float = DEFAULT_START_TIMEOUT_S,
) -> QmpMachine:
    """Start a machine's process; its guest waits for a permit, or for device state.

    Args:
        spec: what to start.
        directory: where it will live.
        incoming: wait for device state from elsewhere.
        ram_exists: somebody made the memory file already (it is checked, and stays if the start fails).
        make_memory: makes the memory file of a machine that has one; called for every machine.
        start_timeout_s: limit until the process takes commands.

    Raises:
        MachineExistsError: the name or the identity is taken.
        InsufficientMemoryError: there are not enough huge pages.
        ConfigError: this host has no place for its memory.
        MachineFailedError: the process ended or does not answer; with the last lines of its log.
    """
    paths = directory.claim(spec)
    made = MachineRecord(spec, paths, process=None, alive=False)
    own_ram: list[Path] = []
    try:
        if ram_exists:
            _check_ram(paths.ram, spec.memory_bytes)
        else:
            # Whatever becomes of the caller, it is known whether there is a file now.
            await to_the_end(_memory(make_memory or make_memory_file, spec, paths.ram, own_ram))
        made = MachineRecord(spec, paths, _start(spec, paths, incoming=incoming), alive=True)
        return await _ready(directory, made, incoming=incoming, start_timeout_s=start_timeout_s)
    except BaseException:
        await _undo(directory, made, remove_ram=bool(own_ram))
        raise


async def stop_machine(machine: QmpMachine, directory: MachineDirectory) -> None:
    """End a machine's process, by asking or else by force, and remove all that is left of it.

    Raises:
        MachineFailedError: the process cannot be ended; nothing was removed.
    """
    await end_process(machine)
    try:
        record = directory.find(machine.spec.uuid)
    except MachineNotFoundError:
        return
    # The same machine may have come back meanwhile, as another process.
    if machine.process.same_as(record.process):
        directory.forget(record, remove_ram=True)


async def end_process(machine: QmpMachine) -> None:
    """End a machine's process, by asking or else by force; what lies on disk of it stays.

    Raises:
        MachineFailedError: the process cannot be ended.
    """
    with contextlib.suppress(MachineDeadError, MachineFailedError, TimeoutError):
        async with asyncio.timeout(_QUIT_S):
            await machine.quit()
            await machine.process.wait_ended(_QUIT_S)
    for number, patience_s in ((signal.SIGTERM, _TERM_S), (signal.SIGKILL, _KILL_S)):
        if not machine.process.alive():
            break
        machine.process.send_signal(number)
        if await machine.process.wait_ended(patience_s):
            break
    else:
        raise MachineFailedError(
            f"machine {machine.spec.name}: process {machine.pid} does not end, not even when killed",
            machine=machine.spec.uuid,
            pid=machine.pid,
        )
    await machine.close()


async def start_anew(
    spec: MachineSpec,
    directory: MachineDirectory,
    permitted: Callable[[], AbstractAsyncContextManager[ResumePermit]],
) -> QmpMachine:
    """Start a machine again that belongs to this host and whose process is gone; its guest runs, from the beginning.

    What lies here of the one before is removed; its description stays, also if this fails.

    Raises:
        MachineExistsError: its process runs.
        MachineNotOwnedError: it does not belong to this host, or is on its way to another one.
        MachineFailedError: the hypervisor does not start.
    """
    async with permitted():
        pass  # refused before anything is changed
    with contextlib.suppress(MachineNotFoundError):
        record = directory.find(spec.uuid)
        if record.alive:
            raise MachineExistsError(f"machine {record.spec.name} runs as process {record.pid}")
        directory.forget(record, remove_ram=True)
    try:
        machine = await start_machine(spec, directory)
        try:
            async with permitted() as permit:
                await machine.cont(permit)
        except BaseException:
            await stop_machine(machine, directory)
            raise
    except BaseException:
        with contextlib.suppress(VmferryError, OSError):
            directory.claim(spec)
        raise
    return machine


async def halt_machine(machine_id: str, directory: MachineDirectory) -> None:
    """Pause the guest of a machine that must not run here, and keep it; nothing, if it has no process.

    Raises:
        MachineFailedError: the hypervisor does not stop it.
    """
    with contextlib.suppress(MachineNotFoundError, MachineDeadError):
        machine = directory.open(directory.find(machine_id))
        try:
            if await machine.run_state() is RunState.RUNNING:
                await machine.stop()
        finally:
            await machine.close()


async def discard_leftover(machine_id: str, directory: MachineDirectory) -> None:
    """Remove what is left of a machine that must not run here, and nothing if nothing is left.

    Raises:
        MachineFailedError: its process cannot be ended; nothing was removed.
    """
    try:
        record = directory.find(machine_id)
    except MachineNotFoundError:
        return
    if record.alive:
        await stop_machine(directory.open(record), directory)
    else:
        directory.forget(record, remove_ram=True)


async def _ready(
    directory: MachineDirectory, made: MachineRecord, *, incoming: bool, start_timeout_s: float
) -> QmpMachine:
    assert made.process is not None
    # Recorded before it answers, so that a service killed meanwhile finds the process again.
    write_whole(made.paths.process, made.process.to_json())
    machine = QmpMachine(made.spec, made.paths, made.process, qmp_timeout_s=directory.qmp_timeout_s)
    try:
        await machine.wait_ready(start_timeout_s)
        await _check_untouched(machine, incoming=incoming)
    except BaseException:
        await machine.close()
        raise
    return machine


async def _check_untouched(machine: QmpMachine, *, incoming: bool) -> None:
    state = await machine.run_state()
    wanted = {RunState.INMIGRATE} if incoming else {RunState.PRELAUNCH, RunState.PAUSED}
    if state not in wanted:
        raise MachineFailedError(
            f"machine {machine.spec.name}: just started, it is {state}",
            machine=machine.spec.uuid,
            state=state,
        )


async def _undo(directory: MachineDirectory, made: MachineRecord, *, remove_ram: bool) -> None:
    try:
        if made.process is not None:
            made.process.send_signal(signal.SIGKILL)
            await made.process.wait_ended(_KILL_S)
    finally:
        with contextlib.suppress(VmferryError, OSError):
            directory.forget(made, remove_ram=remove_ram)


async def _memory(
    make: Callable[[MachineSpec, Path], None], spec: MachineSpec, path: Path, made: list[Path]
) -> None:
    await asyncio.to_thread(make, spec, path)
    made.append(path)


def make_memory_file(spec: MachineSpec, path: Path) -> None:
    """Make an empty memory file for a machine whose memory is one. No page is taken before somebody writes."""
    if spec.memory_backing not in FILES:
        return
    size_bytes = spec.memory_bytes
    if spec.memory_backing == HUGETLBFS and (room := available_bytes(path.parent)) < size_bytes:
        raise InsufficientMemoryError(
            f"{spec.name} needs {spec.memory_mib} MiB in huge pages, this host has {room // _MIB} MiB to give",
            field="memory_mib",
            remedy="Have the kernel set more aside: sysctl vm.nr_hugepages=N, each of 2 MiB.",
        )
    try:
        RamFile.create(path, size_bytes).close()
    except FileExistsError as error:
        raise MachineExistsError(
            f"the memory file {path} exists already", remedy="Remove it if no machine uses it.", path=path
        ) from error


def _check_ram(path: Path, size_bytes: int) -> None:
    """Refuse a memory file that is not what a machine of this size needs."""
    try:
        found = path.lstat()
    except FileNotFoundError as error:
        raise MachineFailedError(f"the memory file {path} is missing", path=path) from error
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
        raise MachineFailedError(f"{path} is not a memory file of ours", path=path)
    if found.st_size != size_bytes:
        raise MachineFailedError(
            f"the memory file {path} has {found.st_size} bytes, and the machine needs {size_bytes}", path=path
        )


def _start(spec: MachineSpec, paths: MachinePaths, *, incoming: bool) -> ProcessIdentity:
    """Start the process, which inherits the memory of a machine whose memory has no name."""
    if spec.memory_backing != MEMFD:
        return spawn(render_command(spec, paths, incoming=incoming), paths)
    descriptor = memfd.make(spec.uuid, spec.memory_bytes)
    try:
        command = render_command(spec, paths, incoming=incoming, memory_fd=descriptor)
        return spawn(command, paths, inherits=(descriptor,))
    finally:
        os.close(descriptor)


def spawn(command: list[str], paths: MachinePaths, *, inherits: tuple[int, ...] = ()) -> ProcessIdentity:
    """Start a machine's process in a session of its own, and wait for its end beside everything else.

    Raises:
        MachineFailedError: it cannot be started.
    """
    environment = {key: os.environ[key] for key in _PASSED_ON if key in os.environ}
    # With the umask of a machine, the folders of its byte code would be shut to everybody else.
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    started_at = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
    descriptor = os.open(paths.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        child = subprocess.Popen(  # noqa: S603 - rendered from a validated spec, without a shell
            command,
            stdin=subprocess.DEVNULL,
            stdout=descriptor,
            stderr=descriptor,
            env=environment,
            cwd="/",
            umask=0o077,
            pass_fds=inherits,
            start_new_session=True,
        )
    except OSError as error:
        raise MachineFailedError(f"cannot start {command[0]}: {error.strerror}") from error
    finally:
        os.close(descriptor)
    # Until it is waited for, its number cannot pass to another process, even if it has ended already.
    identity = ProcessIdentity.of(child.pid, started_at=started_at)
    threading.Thread(target=child.wait, name=f"reap-{child.pid}", daemon=True).start()
    assert identity is not None
    return identity
