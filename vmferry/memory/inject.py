"""Write tracking for a process that does not track itself, such as a QEMU that is already running.

Promise: the machine's process stands still for well under a millisecond, and nothing is left in it: the
userfaultfd that is created in its context moves here at once. The kernel ends the tracking when this process
closes the descriptor or dies, so there is nothing to remember and nothing to clean up after a crash.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from vmferry.memory.surgery import operate
from vmferry.memory.userfault import register_writes


@dataclass
class Injection:
    """A range of another process's memory whose writes the kernel notes until :meth:`remove`."""

    pid: int
    address: int
    length: int
    fd: int
    """The userfaultfd of that process's address space, held by this process; -1 after :meth:`remove`."""

    def remove(self) -> None:
        """End the tracking; more than once, or after the process ended, does no harm."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def inject_write_tracking(pid: int, address: int, length: int) -> Injection:
    """Have the kernel note writes of process ``pid`` to a range of its memory.

    Raises:
        MachineDeadError: the process is gone.
        TrackerUnavailableError: it cannot be done; the process is as it was before.
    """
    injection = Injection(pid, address, length, operate("userfault", pid))
    try:
        register_writes(injection.fd, address, length)
    except BaseException:
        injection.remove()
        raise
    return injection
