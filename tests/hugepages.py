"""Huge pages for tests, of a hugetlbfs or a tmpfs: there for a while, and given back."""

from __future__ import annotations

import fcntl
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support import require
from vmferry.memory.hugepages import HUGE_PAGE_BYTES

_POOL = Path("/proc/sys/vm/nr_hugepages")


@contextmanager
def huge_folder(mib: int) -> Iterator[Path]:
    """A hugetlbfs with so much memory; whoever else wants one on this host waits meanwhile."""
    require(os.geteuid() == 0, "huge pages can only be set aside, and mounted, by root")
    require(_POOL.exists(), "this kernel has no huge pages")
    with _POOL.open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = int(_POOL.read_text(encoding="ascii"))
        wanted = before + mib * 1024 * 1024 // HUGE_PAGE_BYTES
        try:
            _POOL.write_text(str(wanted), encoding="ascii")
            require(int(_POOL.read_text(encoding="ascii")) >= wanted, f"no {mib} MiB in huge pages are free")
            with _mounted("hugetlbfs", "pagesize=2M") as folder:
                yield folder
        finally:
            _POOL.write_text(str(before), encoding="ascii")


@contextmanager
def huge_tmpfs() -> Iterator[Path]:
    """A tmpfs that has its files in huge pages wherever the kernel finds some."""
    require(os.geteuid() == 0, "file systems can only be mounted by root")
    with _mounted("tmpfs", "huge=always,size=512M") as folder:
        yield folder


@contextmanager
def small_tmpfs() -> Iterator[Path]:
    """A tmpfs without them."""
    require(os.geteuid() == 0, "file systems can only be mounted by root")
    with _mounted("tmpfs", "huge=never,size=16M") as folder:
        yield folder


def mapped_whole_bytes(pid: int) -> int:
    """How much of a tmpfs a process has mapped in huge pages as wholes."""
    smaps = Path(f"/proc/{pid}/smaps").read_text(encoding="utf-8", errors="replace")
    return sum(map(int, re.findall(r"^ShmemPmdMapped: +(\d+) kB$", smaps, re.MULTILINE))) * 1024


@contextmanager
def _mounted(kind: str, options: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vf-huge-") as folder:
        made = subprocess.run(
            ["mount", "-t", kind, "-o", options, "none", folder], capture_output=True, text=True, check=False
        )
        require(made.returncode == 0, f"{kind} cannot be mounted: {made.stderr.strip()}")
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", folder], check=True)
