"""Memory files on hugetlbfs: what is different about them.

Promise: a file counts as one only if its file system says so. Such a file cannot be written with ``pwrite``, so it is
written through a mapping of one huge page at a time, whose memory the kernel sets aside before it is touched: a host
that has no huge page left gives an error, never a signal.

Only huge pages of 2 MiB are supported: the kernel's scan for written pages can protect no others.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from vmferry.errors import ConfigError

HUGE_PAGE_BYTES: Final = 2 * 1024 * 1024

_MAGIC: Final = 0x958458F6
_POOL: Final = Path(f"/sys/kernel/mm/hugepages/hugepages-{HUGE_PAGE_BYTES // 1024}kB")


class _Statfs(ctypes.Structure):
    """``struct statfs`` of x86-64."""

    _fields_ = (
        ("type", ctypes.c_long),
        ("block_bytes", ctypes.c_long),
        ("rest", ctypes.c_long * 13),
    )


# JUSTIFICATION: os.statvfs leaves out which file system it is about.
# SAFETY: the structure has the 120 bytes that the call fills, and outlives it.
_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.fstatfs.argtypes = (ctypes.c_int, ctypes.POINTER(_Statfs))


def file_page_bytes(fd: int) -> int:
    """The size of an open file's huge pages; 0 if it is on any other file system."""
    found = _Statfs()
    if _libc.fstatfs(fd, ctypes.byref(found)):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return int(found.block_bytes) if found.type & 0xFFFFFFFF == _MAGIC else 0


def path_page_bytes(path: Path) -> int:
    """The same by path."""
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        return file_page_bytes(fd)
    finally:
        os.close(fd)


def check_folder(folder: Path) -> None:
    """Refuse a folder for memory files, which need not exist yet, that is not on hugetlbfs.

    Raises:
        ConfigError: it is on another file system, or its huge pages have another size.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    size = path_page_bytes(existing)
    if size != HUGE_PAGE_BYTES:
        fault = f"has huge pages of {size} bytes" if size else "is not on hugetlbfs"
        raise ConfigError(
            f"huge_dir: {folder} {fault}",
            field="huge_dir",
            remedy=f"Mount one there: mount -t hugetlbfs -o pagesize={HUGE_PAGE_BYTES >> 20}M none {folder}",
        )


def available_bytes(folder: Path) -> int:
    """What new memory files in a folder on hugetlbfs could have: free huge pages that nobody was promised.

    The kernel promises a file's pages when a process maps it, before it touches them.
    """
    free, promised = (
        int((_POOL / name).read_text(encoding="ascii")) for name in ("free_hugepages", "resv_hugepages")
    )
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    limit = os.statvfs(existing)
    # A mount without a limit of its own says nothing at all.
    most = limit.f_bavail * limit.f_frsize if limit.f_blocks else free * HUGE_PAGE_BYTES
    return max(0, min((free - promised) * HUGE_PAGE_BYTES, most))


def write_spans(fd: int, page_bytes: int, spans: Iterable[tuple[int, int]], data: memoryview) -> None:
    """Write ``data`` to offset and length of each span, one behind the other; the spans ascend."""
    window: mmap.mmap | None = None
    mapped = -1
    position = 0
    try:
        for start, length in spans:
            offset, end = start, start + length
            while offset < end:
                number, inside = divmod(offset, page_bytes)
                if window is None or number != mapped:
                    if window is not None:
                        window.close()
                    window = mmap.mmap(fd, page_bytes, offset=number * page_bytes)
                    mapped = number
                count = min(end - offset, page_bytes - inside)
                window[inside : inside + count] = data[position : position + count]
                offset, position = offset + count, position + count
    finally:
        if window is not None:
            window.close()
