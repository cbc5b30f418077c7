"""Asynchronous write protection with userfaultfd: the kernel notes writes itself and stops nobody.

Promise: a range registered here is tracked exactly as long as the descriptor is open, in whichever process: when
its last holder closes it or dies, the kernel takes every protection away. Nothing has to be cleaned up.

A descriptor belongs to the address space of the process that *created* it, so registering through it tracks
that process, also when it is held elsewhere. A micro-VM tracks itself with :func:`track_own_range`; for another
process see ``inject``.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from typing import Final

from vmferry.errors import MachineDeadError, TrackerUnavailableError

SYS_USERFAULTFD: Final = 323
USER_MODE_ONLY: Final = 1
"""Lets an unprivileged process have one; in asynchronous mode writes by the kernel are noted all the same."""
OPEN_FLAGS: Final = os.O_CLOEXEC | os.O_NONBLOCK | USER_MODE_ONLY

UFFDIO_API: Final = 0xC018AA3F
UFFDIO_REGISTER: Final = 0xC020AA00
API_VERSION: Final = 0xAA
FEATURE_WP_HUGETLBFS_SHMEM: Final = 1 << 12
FEATURE_WP_UNPOPULATED: Final = 1 << 13
FEATURE_WP_ASYNC: Final = 1 << 15
REGISTER_MODE_WP: Final = 2

API_ARGUMENT: Final = struct.Struct("=QQQ")
"""``struct uffdio_api``: api, features, ioctls."""
REGISTER_ARGUMENT: Final = struct.Struct("=QQQQ")
"""``struct uffdio_register``: start, length, mode, ioctls."""

_FEATURES: Final = FEATURE_WP_ASYNC | FEATURE_WP_UNPOPULATED | FEATURE_WP_HUGETLBFS_SHMEM

# JUSTIFICATION: glibc has no function for userfaultfd(2).
# SAFETY: one call with a constant number and one integer, touches no memory of this process.
_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.syscall.argtypes = (ctypes.c_long, ctypes.c_long)


def open_userfault() -> int:
    """A new userfaultfd of this process."""
    fd = int(_libc.syscall(SYS_USERFAULTFD, OPEN_FLAGS))
    if fd < 0:
        code = ctypes.get_errno()
        raise TrackerUnavailableError(
            f"userfaultfd: {os.strerror(code)} ({errno.errorcode.get(code, code)})", errno=code
        )
    return fd


def register_writes(fd: int, address: int, length: int) -> None:
    """Register a range of the address space that ``fd`` belongs to; nothing is protected before the first scan.

    Raises:
        MachineDeadError: that address space is gone.
        TrackerUnavailableError: the kernel cannot do it, or another userfaultfd holds the range.
    """
    _call(fd, UFFDIO_API, API_ARGUMENT.pack(API_VERSION, _FEATURES, 0), "UFFDIO_API for asynchronous mode")
    _call(
        fd, UFFDIO_REGISTER, REGISTER_ARGUMENT.pack(address, length, REGISTER_MODE_WP, 0), "UFFDIO_REGISTER"
    )


def track_own_range(address: int, length: int) -> int:
    """Have writes of this process to a range of its own memory noted; returns the descriptor to keep open."""
    fd = open_userfault()
    try:
        register_writes(fd, address, length)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _call(fd: int, request: int, argument: bytes, name: str) -> None:
    """One ioctl, with errors a user can act on."""
    try:
        # JUSTIFICATION: userfaultfd is driven by ioctl only.
        # SAFETY: the buffer has the size encoded in the request (asserted by a test) and outlives the call.
        fcntl.ioctl(fd, request, bytearray(argument), True)
    except OSError as exc:
        if exc.errno == errno.ESRCH:
            raise MachineDeadError("the process whose memory was to be tracked is gone") from exc
        hint = {
            errno.EBUSY: ": another userfaultfd holds this memory",
            errno.EINVAL: ": this kernel does not offer it for this memory (Linux 6.7 or newer is needed)",
        }.get(exc.errno or 0, "")
        raise TrackerUnavailableError(
            f"{name} failed with {errno.errorcode.get(exc.errno or 0, exc.errno)}{hint}", errno=exc.errno
        ) from exc
