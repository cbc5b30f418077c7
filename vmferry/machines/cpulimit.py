"""A limit on the processor time of one machine, through the cgroup that its process has for itself.

Of version 2 (``cpu.max``), or of version 1 where the host has its processors there (``cpu.cfs_quota_us``).

Promise: nothing is assumed: only a group in which the machine's process is alone, and whose limit was written once
with the value that it had, is used; no group is made and no process is moved, since whoever started the machine has
them in order. What a limit was before is in the machine's folder for as long as it is another, so that whoever comes
next can restore it (:func:`restore`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vmferry.machines.paths import write_whole
from vmferry.telemetry.logs import get_logger

MOUNTED_AT: Final = (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified"))
V1_MOUNTED_AT: Final = (Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup/cpu,cpuacct"))
RECORD: Final = "cpu-limit.json"
_PERIOD_US: Final = 20_000
"""Short, so that the hypervisor answers in time even if it has little of it."""
_V2_FILE: Final = "cpu.max"
_V1_FILE: Final = "cpu.cfs_quota_us"
_V1_PERIOD: Final = "cpu.cfs_period_us"
_LEAST_QUOTA_US: Final = 1_000
"""The kernel's own least."""
_UNLIMITED: Final = ("max", "-1")
_LOG: Final = get_logger(__name__)


@dataclass(frozen=True)
class CpuLimit:
    """The limit of one machine's group."""

    file: Path
    before: str
    """What the file said when it was found."""
    home: Path
    """The machine's folder."""
    cpus: float
    """How many processors the machine may use."""
    period_us: int = _PERIOD_US
    """In which it may use its part of them."""

    @classmethod
    def find(
        cls,
        pid: int,
        home: Path,
        vcpus: int,
        *,
        mounted_at: tuple[Path, ...] = MOUNTED_AT,
        v1_mounted_at: tuple[Path, ...] = V1_MOUNTED_AT,
        processes: Path = Path("/proc"),
    ) -> CpuLimit | None:
        """The limit of the process's own group; ``None`` if it has none that can be written."""
        try:
            entries = (processes / str(pid) / "cgroup").read_text(encoding="ascii").splitlines()
        except OSError:
            return None
        most = float(min(vcpus, os.cpu_count() or 1))
        for name, roots, file in _groups(entries, mounted_at, v1_mounted_at):
            for root in roots:
                found = _usable(root / name, file, pid)
                if found is None:
                    continue
                quota, period = found.split() if file == _V2_FILE else (found, _v1_period(root / name))
                cpus = most if quota in _UNLIMITED else min(most, int(quota) / int(period))
                period_us = _PERIOD_US if file == _V2_FILE else int(period)
                return cls(root / name / file, found, home, cpus, period_us)
        return None

    def take(self, percent: int) -> None:
        """Leave the machine so much less of its processors."""
        write_whole(self.home / RECORD, json.dumps({"file": str(self.file), "before": self.before}) + "\n")
        quota = max(_LEAST_QUOTA_US, round(self.cpus * self.period_us * (100 - percent) / 100))
        _write(self.file, f"{quota} {self.period_us}" if self.file.name == _V2_FILE else f"{quota}")

    def give_back(self) -> None:
        """Leave it what it had before."""
        restore(self.home)


def restore(home: Path) -> bool:
    """Undo the limit that the record in a machine's folder tells of; whether there was one."""
    record = home / RECORD
    try:
        told = json.loads(record.read_text(encoding="utf-8"))
        _write(Path(told["file"]), str(told["before"]))
    except FileNotFoundError as error:
        if error.filename == str(record):
            return False  # as it is nearly always; else the group has gone, and its limit with it
    except (OSError, ValueError, KeyError, TypeError) as error:
        _LOG.error("a processor limit cannot be restored", record=str(record), detail=str(error))
        return True
    record.unlink(missing_ok=True)
    return True


def restore_all(machines: Path) -> None:
    """Undo the limits of all machines whose folders are in this one."""
    for record in machines.glob(f"*/{RECORD}"):
        restore(record.parent)


def _groups(
    entries: Iterable[str], v2: tuple[Path, ...], v1: tuple[Path, ...]
) -> Iterator[tuple[str, tuple[Path, ...], str]]:
    """The groups of a process that may limit it: name, where it may be mounted, and the file that says the limit."""
    for entry in sorted(entries):
        number, _, rest = entry.partition(":")
        controllers, _, name = rest.partition(":/")
        if name and number == "0":
            yield name, v2, _V2_FILE
        elif name and "cpu" in controllers.split(","):
            yield name, v1, _V1_FILE


def _v1_period(group: Path) -> str:
    return (group / _V1_PERIOD).read_text(encoding="ascii").strip()


def _usable(group: Path, file: str, pid: int) -> str | None:
    """The limit of a group that holds this process and nothing else, if it can be written."""
    try:
        if (group / "cgroup.procs").read_text(encoding="ascii").split() != [str(pid)]:
            return None
        if any(child.is_dir() for child in group.iterdir()):
            return None
        found = (group / file).read_text(encoding="ascii").strip()
        _write(group / file, found)
    except OSError:
        return None
    return found


def _write(file: Path, text: str) -> None:
    descriptor = os.open(
        file, os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC
    )  # which never makes a file that is not there
    try:
        os.write(descriptor, text.encode("ascii"))
    finally:
        os.close(descriptor)
