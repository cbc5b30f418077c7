"""Huge pages for tests: set aside for a while, and given back."""

from __future__ import annotations

import fcntl
import os
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
            with tempfile.TemporaryDirectory(prefix="vf-huge-") as folder, _mounted(Path(folder)):
                yield Path(folder)
        finally:
            _POOL.write_text(str(before), encoding="ascii")


@contextmanager
def _mounted(folder: Path) -> Iterator[None]:
    made = subprocess.run(
        ["mount", "-t", "hugetlbfs", "-o", "pagesize=2M", "none", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    require(made.returncode == 0, f"hugetlbfs cannot be mounted: {made.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)
