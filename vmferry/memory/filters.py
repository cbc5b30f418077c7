"""Which system call filters (seccomp) of a machine may stay in force while a call is made in its context.

Promise: a machine is called harmlessly filtered only if every filter it has is known: those that the first process
of this container has as well, which everything in the container got from its runtime, and QEMU's own sandbox, which
forbids by a list that has no call of ours. That the container's filters let the call pass is tried here, by this
process, before any machine is touched: a filter that kills would kill this process.

Suspending filters, which needs none of this, is a privilege (CAP_SYS_ADMIN) that no filtered process can use.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from vmferry.memory.userfault import open_userfault

_FIRST: Final = Path("/proc/1")
_SANDBOXED: Final = b"\0-sandbox\0on"


def harmlessly_filtered(pid: int) -> bool:
    """Whether a userfaultfd can be opened in process ``pid`` with its filters in force.

    Raises:
        TrackerUnavailableError: the filters of this container forbid it to everybody in it.
    """
    process = Path(f"/proc/{pid}")
    try:
        sandboxed = _SANDBOXED in (process / "cmdline").read_bytes()
        if _filters(process) > _filters(_FIRST) + int(sandboxed):
            return False
    except (OSError, LookupError):
        return False
    os.close(open_userfault())
    return True


def _filters(process: Path) -> int:
    """How many filters a process has; ``LookupError`` where the kernel does not say (before Linux 5.9)."""
    lines = (process / "status").read_text("utf-8", "replace").splitlines()
    values = dict(line.split(":", 1) for line in lines if ":" in line)
    return int(values["Seccomp_filters"])
