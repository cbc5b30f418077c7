"""What a process has asked the kernel for and not touched, looked at from outside."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from vmferry.memory.pagemap import read_entries

_PRESENT_OR_SWAPPED: Final = 1 << 63 | 1 << 62


def untouched_pages(pid: int, address: int, length: int) -> int:
    """How many pages of a range the kernel has not found memory for yet."""
    with Path(f"/proc/{pid}/pagemap").open("rb", buffering=0) as pagemap:
        entries = memoryview(read_entries(pagemap.fileno(), address, length)).cast("Q")
    return sum(not entry & _PRESENT_OR_SWAPPED for entry in entries)


def heap(pid: int) -> tuple[int, int]:
    """Address and length of the heap."""
    for line in Path(f"/proc/{pid}/maps").read_text(encoding="utf-8", errors="replace").splitlines():
        if line.endswith("[heap]"):
            start, end = (int(part, 16) for part in line.split()[0].split("-"))
            return start, end - start
    raise AssertionError(f"process {pid} has no heap")
