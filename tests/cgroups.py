"""Cgroups of tests, of whichever version this computer has its processors in.

Promise: a group is empty again and removed at the end; what was in it goes on in the group above.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support import require
from vmferry.machines.cpulimit import MOUNTED_AT, V1_MOUNTED_AT


@dataclass(frozen=True)
class Group:
    """A group that limits processor time."""

    folder: Path
    limit: Path

    def said(self) -> str:
        """The limit."""
        return self.limit.read_text(encoding="ascii").strip()

    def add(self, pid: int) -> None:
        """Move a process into it."""
        (self.folder / "cgroup.procs").write_text(str(pid), encoding="ascii")

    def times_held_back(self) -> int:
        """How often the kernel has let it wait because it had used up its time."""
        lines = (self.folder / "cpu.stat").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("nr_throttled"))


@contextlib.contextmanager
def cpu_group() -> Iterator[Group]:
    """A new group below the root of all."""
    require(os.geteuid() == 0, "only root can make cgroups")
    group = _made()
    require(group, "no cgroup of this computer limits processor time")
    assert group is not None
    try:
        yield group
    finally:
        for pid in (group.folder / "cgroup.procs").read_text(encoding="ascii").split():
            with contextlib.suppress(ProcessLookupError):
                (group.folder.parent / "cgroup.procs").write_text(pid, encoding="ascii")
        group.folder.rmdir()


def _made() -> Group | None:
    for roots, limit in ((V1_MOUNTED_AT, "cpu.cfs_quota_us"), (MOUNTED_AT, "cpu.max")):
        for root in roots:
            folder = root / f"vmferry-test-{secrets.token_hex(4)}"
            if not (root / "cgroup.procs").exists():
                continue
            with contextlib.suppress(OSError):
                folder.mkdir()
                if (folder / limit).exists():
                    return Group(folder, folder / limit)
                folder.rmdir()
    return None
