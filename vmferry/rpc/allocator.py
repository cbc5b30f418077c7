"""How a service's memory is managed: buffers of a message's size are used again instead of being made anew.

By default the C library takes each larger piece of memory from the kernel, which zeroes it page by page, and gives it
back at once. A service that moves a megabyte at a time through five copies would spend a fifth of its time on that.
Kept, they are hot in the processor's caches as well. Pieces of all threads come from one place, so that what one
thread gives back another takes; this has to be said before there are threads, and gRPC starts some as soon as it is
loaded. The kernel is asked to have that place in huge pages, where it has some: what copies
megabytes all the time otherwise misses the processor's table of pages all the time, which costs twice in a virtual
machine.

A service whose loop takes messages in has that place touched before they come: where the host is a virtual machine
itself, its memory comes into being when it is touched, and a message of 2 MiB kept the loop for up to 30 ms.

Promise: nothing changes but where memory comes from, and when, and what lies unused is bounded. Where C library or
kernel have no such settings, nothing happens.
"""

from __future__ import annotations

import ctypes
import mmap
from typing import Final

_M_TRIM_THRESHOLD: Final = -1
_M_TOP_PAD: Final = -2
_M_MMAP_THRESHOLD: Final = -3
_M_ARENA_MAX: Final = -8
_OWN_MAPPING_BYTES: Final = 32 * 1024 * 1024
"""Larger pieces still come from the kernel; it is the largest value that the library takes."""
_KEPT_BYTES: Final = 128 * 1024 * 1024
"""What may lie unused at the end of the heap before it is given back by itself."""
_HUGE_BYTES: Final = 96 * 1024 * 1024
"""How much of the heap is asked for in huge pages; less than what may lie unused. None of it is touched for that."""
_PAD_BYTES: Final = 128 * 1024
"""What the library adds by itself when the heap grows."""
_LARGE_BYTES: Final = 16 * 1024 * 1024
"""More than lies free in the heap of a process that has just begun, and less than what has a mapping of its own."""
_MADV_POPULATE_WRITE: Final = 23
"""Since Linux 5.14; Python has no name for it."""
_kept = range(0)
"""Where the buffers of this process lie."""


def share_one_heap() -> None:
    """Have the memory of all threads come from one place; called before gRPC is loaded."""
    _set(ctypes.CDLL(None), _M_ARENA_MAX, 1)


def keep_buffers() -> None:
    """Have freed memory kept for the next message."""
    global _kept  # noqa: PLW0603 - a process has one heap
    library = ctypes.CDLL(None)
    if _set(library, _M_MMAP_THRESHOLD, _OWN_MAPPING_BYTES):
        _set(library, _M_TRIM_THRESHOLD, _KEPT_BYTES)
        _set(library, _M_TOP_PAD, _HUGE_BYTES)
        _kept = _grown(library)
        _advise(library, _kept, mmap.MADV_HUGEPAGE)
        _set(library, _M_TOP_PAD, _PAD_BYTES)


def touch_buffers(size_bytes: int) -> None:
    """Have up to so much of what is kept taken from the kernel now; for a thread, as it may take a while."""
    _advise(ctypes.CDLL(None), _kept[:size_bytes], _MADV_POPULATE_WRITE)


def _set(library: ctypes.CDLL, option: int, value: int) -> bool:
    """Whether the C library has such settings, and took this one."""
    # JUSTIFICATION: Python has no binding for mallopt(3), and the environment variables are read before it starts.
    # SAFETY: takes two integers and changes the settings of the allocator, which has a lock of its own.
    mallopt = getattr(library, "mallopt", None)
    return mallopt is not None and bool(mallopt(option, value))


def _grown(library: ctypes.CDLL) -> range:
    """Let the heap grow; returns what it has gained, in whole pages."""
    library.sbrk.restype = library.malloc.restype = ctypes.c_void_p
    library.sbrk.argtypes = (ctypes.c_ssize_t,)
    library.malloc.argtypes = (ctypes.c_size_t,)
    library.free.argtypes = (ctypes.c_void_p,)
    # JUSTIFICATION: where the heap ends nothing else tells, and only a piece that does not fit lets it grow.
    # SAFETY: sbrk(0) moves nothing; the piece is given back at once, and nothing was written to it.
    before = library.sbrk(0)
    library.free(library.malloc(_LARGE_BYTES))
    return range(-(-before // mmap.PAGESIZE) * mmap.PAGESIZE, library.sbrk(0))


def _advise(library: ctypes.CDLL, part: range, advice: int) -> None:
    # JUSTIFICATION: Python's madvise speaks of mappings that it made itself.
    # SAFETY: it is a part of the heap, and the advice changes no content; a kernel that does not know it refuses it.
    library.madvise(ctypes.c_void_p(part.start), ctypes.c_size_t(len(part)), advice)
