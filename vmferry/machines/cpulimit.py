"""A limit on the processor time of one machine, through the cgroup (version 2) that its process has for itself.

Promise: nothing is assumed: only a group in which the machine's process is alone, and whose limit was written once
with the value that it had, is used; no group is made and no process is moved, since whoever started the machine has
them in order. What a limit was before is in the machine's folder for as long as it is another, so that whoever comes
next can restore it (:func:`restore`).
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vmferry.machines.paths import write_whole
from vmferry.telemetry.logs import get_logger

MOUNTED_AT: Final = (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified"))
RECORD: Final = "cpu-limit.json"
_PERIOD_US: Final = 20_000
"""Short, so that the hypervisor answers in time even if it has little of it."""
_LEAST_QUOTA_US: Final = 1_000
"""The kernel's own least."""
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

    @classmethod
    def find(
        cls,
        pid: int,
        home: Path,
        vcpus: int,
        *,
        mounted_at: tuple[Path, ...] = MOUNTED_AT,
        processes: Path = Path("/proc"),
    ) -> CpuLimit | None:
        """The limit of the process's own group; ``None`` if it has none that can be written."""
        try:
            entries = (processes / str(pid) / "cgroup").read_text(encoding="ascii").splitlines()
            name = next(entry for entry in entries if entry.startswith("0::")).removeprefix("0::/")
        except (OSError, StopIteration):
            return None
        for root in mounted_at:
            found = _usable(root / name, pid) if name else None
            if found is not None:
                quota, period = found.split()
                most = float(min(vcpus, os.cpu_count() or 1))
                cpus = most if quota == "max" else min(most, int(quota) / int(period))
                return cls(root / name / "cpu.max", found, home, cpus)
        return None

    def take(self, percent: int) -> None:
        """Leave the machine so much less of its processors."""
        write_whole(self.home / RECORD, json.dumps({"file": str(self.file), "before": self.before}) + "\n")
        quota = max(_LEAST_QUOTA_US, round(self.cpus * _PERIOD_US * (100 - percent) / 100))
        _write(self.file, f"{quota} {_PERIOD_US}")

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


def _usable(group: Path, pid: int) -> str | None:
    """The limit of a group that holds this process and nothing else, if it can be written."""
    try:
        if (group / "cgroup.procs").read_text(encoding="ascii").split() != [str(pid)]:
            return None
        if any(child.is_dir() for child in group.iterdir()):
            return None
        found = (group / "cpu.max").read_text(encoding="ascii").strip()
        _write(group / "cpu.max", found)
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
