"""Which process a machine is, in a way that a reused process number cannot deceive.

Promise: a process counts as the machine's only if its number, the time it started and the boot it started in
all agree with the record; nothing is ever signalled or called alive on its number alone.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
# Positions after the command name of /proc/PID/stat, which may itself hold blanks and brackets
# (proc_pid_stat(5)).
_STATE_AFTER_NAME: Final = 0
_START_TIME_AFTER_NAME: Final = 19


@dataclass(frozen=True)
class ProcessIdentity:
    """One process of one boot of this host."""

    pid: int
    start_time: int
    """Clock ticks after boot, field 22 of /proc/PID/stat."""
    boot_id: str
    started_at: str = ""
    """Wall-clock time of the start, for people; no part of the identity."""

    @classmethod
    def of(cls, pid: int, *, started_at: str = "") -> ProcessIdentity | None:
        """The identity of the process that has this number now; ``None`` if there is none."""
        stat = _read_stat(pid)
        if stat is None:
            return None
        return cls(pid, int(stat[_START_TIME_AFTER_NAME]), boot_id(), started_at)

    @classmethod
    def from_json(cls, text: str) -> ProcessIdentity:
        """Read what :meth:`to_json` wrote.

        Raises:
            ValueError: it is something else.
        """
        value: Any = json.loads(text)
        if not isinstance(value, dict) or set(value) != {"pid", "start_time", "boot_id", "started_at"}:
            raise ValueError("not a process record")
        found = cls(**value)
        numbers = type(found.pid) is int and type(found.start_time) is int and found.pid > 1
        if not numbers or not isinstance(found.boot_id, str) or not isinstance(found.started_at, str):
            raise ValueError("a process record with values of the wrong kind")
        return found

    def to_json(self) -> str:
        """The identity as a JSON object."""
        return json.dumps(asdict(self), indent=2) + "\n"

    def same_as(self, other: ProcessIdentity | None) -> bool:
        """Whether both name the same process."""
        mine = (self.pid, self.start_time, self.boot_id)
        return other is not None and mine == (other.pid, other.start_time, other.boot_id)

    def alive(self) -> bool:
        """Whether exactly this process still runs; one that has ended but is not yet reaped does not."""
        stat = _read_stat(self.pid)
        if stat is None or stat[_STATE_AFTER_NAME] in "ZXx":
            return False
        return int(stat[_START_TIME_AFTER_NAME]) == self.start_time and boot_id() == self.boot_id

    def age_s(self) -> float:
        """How long ago it was started, if it is of this boot."""
        return time.clock_gettime(time.CLOCK_BOOTTIME) - self.start_time / os.sysconf("SC_CLK_TCK")

    def send_signal(self, number: signal.Signals) -> bool:
        """Signal exactly this process; ``False`` if it has ended.

        The descriptor is opened first and the identity checked afterwards, so that the number cannot change
        hands between the check and the signal.
        """
        try:
            descriptor = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return False
        try:
            if not self.alive():
                return False
            signal.pidfd_send_signal(descriptor, number)
        except ProcessLookupError:
            return False
        finally:
            os.close(descriptor)
        return True

    async def wait_ended(self, timeout_s: float) -> bool:
        """Wait until the process has ended; ``False`` if it still runs after ``timeout_s``."""
        try:
            descriptor = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return True
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        loop.add_reader(descriptor, ended.set)
        try:
            if self.alive():
                async with asyncio.timeout(timeout_s):
                    await ended.wait()
        except TimeoutError:
            return not self.alive()
        finally:
            loop.remove_reader(descriptor)
            os.close(descriptor)
        return True


@functools.cache
def boot_id() -> str:
    """What tells this boot of the host from every other."""
    return _BOOT_ID.read_text(encoding="ascii").strip()


def _read_stat(pid: int) -> list[str] | None:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:  # noqa: PTH123 - a guest's pause waits for it
            found = file.read()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return found.rpartition(b")")[2].decode("ascii").split()
