"""How a service's memory is managed: buffers of a message's size are used again instead of being made anew.

By default the C library takes each larger piece of memory from the kernel, which zeroes it page by page, and gives it
back at once. A service that moves a megabyte at a time through five copies would spend a fifth of its time on that.
Kept, they are hot in the processor's caches as well. Pieces of all threads come from one place, so that what one
thread gives back another takes.

Promise: nothing changes but where memory comes from, and what lies unused is bounded. Where the C library has no such
settings, nothing happens.
"""

from __future__ import annotations

import ctypes
from typing import Final

_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_M_ARENA_MAX: Final = -8
_OWN_MAPPING_BYTES: Final = 32 * 1024 * 1024
"""Larger pieces still come from the kernel; it is the largest value that the library takes."""
_KEPT_BYTES: Final = 128 * 1024 * 1024
"""What may lie unused at the end of the heap before it is given back by itself."""


def keep_buffers() -> None:
    """Have freed memory kept for the next message; called before threads are started."""
    library = ctypes.CDLL(None)
    # JUSTIFICATION: Python has no binding for mallopt(3), and the environment variables are read before it starts.
    # SAFETY: takes two integers and changes the settings of the allocator, which has a lock of its own.
    if (mallopt := getattr(library, "mallopt", None)) is not None:
        mallopt(_M_MMAP_THRESHOLD, _OWN_MAPPING_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
        mallopt(_M_ARENA_MAX, 1)
