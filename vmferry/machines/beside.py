"""A second hypervisor process for a machine, beside the first one and over the same memory: for an update in place.

Promise: starting it writes to no page of the guest and executes none of its instructions; it has a folder of its own
below the machine's, with its sockets and its description, and the machine's own files say nothing of it before it is
adopted. The process that is not wanted any more is killed and not asked to quit: a hypervisor that quits removes its
sockets by the names that it gave them, which may be those of the other one by then. Every step may be repeated.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vmferry.errors import ConfigError, MachineFailedError, VmferryError
from vmferry.machines.command import render_command
from vmferry.machines.directory import MachineDirectory, MachineRecord
from vmferry.machines.launcher import spawn
from vmferry.machines.paths import MAX_SOCKET_PATH_BYTES, MachinePaths, write_whole
from vmferry.machines.port import RunState
from vmferry.machines.process import ProcessIdentity
from vmferry.machines.qmp import QmpMachine
from vmferry.machines.spec import MachineSpec
from vmferry.memory import memfd
from vmferry.memory.backings import MEMFD

FOLDER: Final = "next"
_KILL_S: Final = 5.0
_ADOPTED: Final = (
    "qmp",
    "observer",
    "serial_socket",
    "agent_socket",
    "metadata_socket",
    "spec",
    "process",
)
"""What takes the place of the old one's, in this order: the process last, so that it is known when all is done."""


@dataclass(frozen=True)
class _Beside(MachinePaths):
    """The files of a second process; what the guest and the hypervisor say goes on where it was."""

    @property
    def serial(self) -> Path:
        """What the guest wrote to its serial port."""
        return self.home.parent / "serial.log"

    @property
    def log(self) -> Path:
        """What both processes wrote to their standard output and error."""
        return self.home.parent / "machine.log"


@dataclass(frozen=True)
class NewProcess:
    """The second process, as it was found on disk."""

    spec: MachineSpec
    paths: MachinePaths
    process: ProcessIdentity

    def open(self, directory: MachineDirectory) -> QmpMachine:
        """Take hold of it; nothing is connected yet."""
        return QmpMachine(self.spec, self.paths, self.process, qmp_timeout_s=directory.qmp_timeout_s)


def paths_beside(paths: MachinePaths) -> MachinePaths:
    """Where the files of a second process lie, or would lie.

    Raises:
        ConfigError: the paths would be too long for its sockets.
    """
    found = _Beside(home=paths.home / FOLDER, ram=paths.ram)
    longest = max(len(os.fsencode(path)) for path in (found.state_socket, found.serial_socket))
    if longest > MAX_SOCKET_PATH_BYTES:
        raise ConfigError(
            f"run_dir is too long for a second process: {found.state_socket} has {longest} bytes, "
            f"and Linux allows {MAX_SOCKET_PATH_BYTES}",
            field="run_dir",
            remedy="Move the machine to a host with a shorter run_dir.",
        )
    return found


async def start_beside(
    old: MachineRecord, spec: MachineSpec, directory: MachineDirectory, *, start_timeout_s: float
) -> QmpMachine:
    """Start the second process; it waits for the guest's state.

    Raises:
        MachineFailedError: it ended or does not answer; nothing is left of it.
    """
    paths = paths_beside(old.paths)
    paths.home.mkdir(mode=0o700)
    try:
        write_whole(paths.spec, spec.to_toml())
        process = _start(old, spec, paths)
        # Recorded before it answers, so that a service killed meanwhile finds the process again.
        write_whole(paths.process, process.to_json())
        machine = NewProcess(spec, paths, process).open(directory)
        try:
            await machine.wait_ready(start_timeout_s)
            await _check_waits(machine)
        except BaseException:
            await machine.close()
            raise
    except BaseException:
        await end_beside(old.paths)
        raise
    return machine


async def _check_waits(machine: QmpMachine) -> None:
    if (state := await machine.run_state()) is not RunState.INMIGRATE:
        raise MachineFailedError(f"just started, the new process is {state}", machine=machine.spec.uuid)


def _start(old: MachineRecord, spec: MachineSpec, paths: MachinePaths) -> ProcessIdentity:
    if spec.memory_backing != MEMFD:
        return spawn(render_command(spec, paths, incoming=True), paths)
    assert old.pid is not None
    descriptor = os.open(memfd.find(old.pid, spec.uuid), os.O_RDWR | os.O_CLOEXEC)
    try:
        command = render_command(spec, paths, incoming=True, memory_fd=descriptor)
        return spawn(command, paths, inherits=(descriptor,))
    finally:
        os.close(descriptor)


def find_beside(paths: MachinePaths) -> NewProcess | None:
    """The second process that was started for a machine and is not adopted yet, alive or not."""
    beside = _Beside(home=paths.home / FOLDER, ram=paths.ram)
    try:
        process = ProcessIdentity.from_json(beside.process.read_text(encoding="utf-8"))
        return NewProcess(MachineSpec.load(beside.spec), beside, process)
    except (OSError, ValueError, VmferryError):
        return None


async def end_beside(paths: MachinePaths) -> None:
    """End the second process, if there is one, and remove what it has; the machine's memory stays.

    Raises:
        MachineFailedError: it cannot be ended; what it has stays.
    """
    found = find_beside(paths)
    for process in [found.process] if found is not None else _strays(paths.home / FOLDER):
        await _killed(process)
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(paths.home / FOLDER)


async def adopt(paths: MachinePaths) -> None:
    """Make the second process the machine's: the first one is ended, and the files are those of the second.

    Raises:
        MachineFailedError: the first one cannot be ended; nothing was moved.
    """
    new = find_beside(paths)
    if new is None:
        return
    with contextlib.suppress(OSError, ValueError):
        old = ProcessIdentity.from_json(paths.process.read_text(encoding="utf-8"))
        if not old.same_as(new.process):
            await _killed(old)
    for name in _ADOPTED:
        with contextlib.suppress(FileNotFoundError):
            getattr(new.paths, name).replace(getattr(paths, name))
    shutil.rmtree(new.paths.home)


def _strays(folder: Path) -> list[ProcessIdentity]:
    """Processes that were started there and not recorded, because the service was killed in between."""
    if not folder.exists():
        return []
    mine = os.fsencode(folder / "qmp.sock")
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdecimal() and mine in (entry / "cmdline").read_bytes():
                found.append(ProcessIdentity.of(int(entry.name)))
    return [process for process in found if process is not None]


async def _killed(process: ProcessIdentity) -> None:
    process.send_signal(signal.SIGKILL)
    if not await process.wait_ended(_KILL_S):
        raise MachineFailedError(f"process {process.pid} does not end, not even when killed", pid=process.pid)
