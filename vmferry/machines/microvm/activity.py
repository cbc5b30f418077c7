"""Evidence of when a micro-VM's CPU executed: for tests that must prove that two copies never ran at once.

Promise: without ``VMFERRY_ACTIVITY_DIR`` in the environment nothing is written. With it, the process appends the
host's monotonic time to a file of its own there, about once a millisecond while its CPU executes and never while it
does not; what was appended survives the process, however it ends.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final

VARIABLE: Final = "VMFERRY_ACTIVITY_DIR"
_EVERY_NS: Final = 1_000_000
_ENTRY: Final = struct.Struct("=Q")


class Activity:
    """One process's evidence."""

    def __init__(self, path: Path | None) -> None:
        self._last_ns = 0
        self._file = None if path is None else path.open("ab", buffering=0)

    @classmethod
    def of(cls, machine_id: str, environment: Mapping[str, str]) -> Activity:
        """The evidence of this process for a machine, if the environment asks for it."""
        folder = environment.get(VARIABLE)
        return cls(Path(folder) / f"{machine_id}.{os.getpid()}" if folder else None)

    def beat(self, *, last: bool = False) -> None:
        """The CPU is about to execute, or has just executed; ``last`` is noted however soon it comes."""
        if self._file is None:
            return
        now_ns = time.monotonic_ns()
        if last or now_ns - self._last_ns >= _EVERY_NS:
            self._last_ns = now_ns
            self._file.write(_ENTRY.pack(now_ns))

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            self._file.close()


def read(path: Path) -> list[int]:
    """What a process appended, in nanoseconds."""
    data = path.read_bytes()
    return [time_ns for (time_ns,) in _ENTRY.iter_unpack(data[: len(data) // _ENTRY.size * _ENTRY.size])]
