"""What processes have used: processor time, and memory of their own.

Promise: a process that ends meanwhile counts with what it had used when it was last looked at, at most one step
before.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Final

_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")
_STEP_S: Final = 0.025
_OWN_MEMORY: Final = ("RssAnon:", "RssFile:")
"""Without what is mapped of guest memory, which is shared."""


class Usage:
    """Watches processes from its making until :meth:`stop`."""

    def __init__(self, pids: Iterable[int], services: Iterable[int] = ()) -> None:
        """Begin.

        Args:
            pids: of processes that count from now on.
            services: those of them whose memory is of interest.
        """
        self._services = tuple(services)
        self._begin = {pid: used_s(pid) for pid in pids}
        self._last = dict(self._begin)
        self._peak_kib = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="usage", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Look once more, and not again."""
        self._ended.set()
        self._thread.join()
        self._look()

    def cpu_s(self, newcomers: Iterable[int] = ()) -> float:
        """The processor time of all in seconds, with that of processes begun meanwhile."""
        return round(
            sum(self._last[pid] - self._begin[pid] for pid in self._begin)
            + sum(used_s(pid) for pid in newcomers),
            3,
        )

    @property
    def peak_mib(self) -> float | None:
        """The most memory that one of the services had of its own."""
        return round(self._peak_kib / 1024, 1) if self._services else None

    def _watch(self) -> None:
        while not self._ended.wait(_STEP_S):
            self._look()

    def _look(self) -> None:
        for pid, before in self._last.items():
            self._last[pid] = max(before, used_s(pid))
        self._peak_kib = max([self._peak_kib, *map(own_memory_kib, self._services)])


def used_s(pid: int) -> float:
    """All processor time that a process ever used, its own and the kernel's for it; 0 if there is none."""
    with contextlib.suppress(OSError):
        # The name, which stands in brackets, may hold anything.
        fields = (
            Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        )
        return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S
    return 0.0


def own_memory_kib(pid: int) -> int:
    """Memory of a process that is not shared memory; 0 if there is no such process."""
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace").splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith(_OWN_MEMORY))
    return 0
