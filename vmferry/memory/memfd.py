"""Memory files without a name: a machine's process inherits one, and others reach it through that process.

Promise: such a file has its size for ever (it is sealed), nothing but descriptors and mappings keeps it alive, and
the one that is found in a process is the one that was made for that machine.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Final

from vmferry.errors import (
    InsufficientMemoryError,
    MachineDeadError,
    MachineFailedError,
    TrackerUnavailableError,
)

_SEALS: Final = fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL


def make(machine_id: str, size_bytes: int) -> int:
    """Make the memory file of a machine, all zero; returns its descriptor.

    Raises:
        InsufficientMemoryError: it cannot have that size.
    """
    fd = os.memfd_create(_name(machine_id), os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size_bytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except OSError as exc:
        os.close(fd)
        raise InsufficientMemoryError(
            f"no memory file of {size_bytes} bytes can be made: {exc.strerror}"
        ) from exc
    return fd


def find(pid: int, machine_id: str) -> Path:
    """A path to the memory file of a machine, good for as long as its process lives.

    Raises:
        MachineDeadError: the process is gone.
        TrackerUnavailableError: its descriptors may not be read.
        MachineFailedError: it has no such file.
    """
    wanted = f"/memfd:{_name(machine_id)} (deleted)"
    folder = Path(f"/proc/{pid}/fd")
    try:
        for path in folder.iterdir():
            try:
                if str(path.readlink()) == wanted:
                    return path
            except FileNotFoundError:
                continue  # closed meanwhile
    except (FileNotFoundError, ProcessLookupError) as exc:
        raise MachineDeadError(f"process {pid} is gone", pid=pid) from exc
    except PermissionError as exc:
        raise TrackerUnavailableError(
            f"the descriptors of process {pid} may not be read: {exc.strerror}", pid=pid
        ) from exc
    raise MachineFailedError(f"process {pid} has no memory file of machine {machine_id}", pid=pid)


def _name(machine_id: str) -> str:
    return f"vmferry-{machine_id}.ram"
