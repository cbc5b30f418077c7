"""System calls in the context of another process, by ptrace, without leaving a trace in it.

Promise: after :meth:`Tracee.release` the thread goes on exactly where it was, and a system call it was waiting in is
restarted by the kernel as after any stop (``epoll_wait`` and its like are not: they return EINTR, as after SIGCONT).
Only the one thread is stopped; the others run on.

Used in a process of its own only (``surgeon``): the thread that seizes must be the one that waits, another thread
that waits for a child could steal its stops, and a tracer that dies while a thread has foreign registers kills it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import signal
import struct
import time
from pathlib import Path
from typing import Final, Self

from vmferry.errors import MachineDeadError, TrackerUnavailableError

_PEEK_POKE_REGSET: Final = (0x4204, 0x4205)
_CONT: Final = 7
_DETACH: Final = 17
_SYSCALL: Final = 24
_SEIZE: Final = 0x4206
_INTERRUPT: Final = 0x4207
_GETSIGMASK: Final = 0x420A
_SETSIGMASK: Final = 0x420B
_RSEQ_CONFIGURATION: Final = 0x420F

_OPTION_SYSGOOD: Final = 1
_OPTION_SUSPEND_SECCOMP: Final = 1 << 21
_EVENT_STOP: Final = 128
_SYSCALL_STOP: Final = signal.SIGTRAP | 0x80
_WALL: Final = 0x40000000
_NT_PRSTATUS: Final = 1
_USER_CODE_64: Final = 0x33
_NO_SYSCALL: Final = 2**64 - 1

REGISTERS: Final = (
    "r15 r14 r13 r12 bp bx r11 r10 r9 r8 ax cx dx si di orig_ax ip cs flags sp ss fs_base gs_base ds es fs gs"
).split()

# ``mov eax, NUMBER; syscall``: with the instruction before it, two bytes cannot be the middle of another one.
_SYSCALL_IN_VDSO: Final = re.compile(rb"\xb8..\x00\x00\x0f\x05", re.DOTALL)
_RSEQ: Final = struct.Struct("=QIIII")

# JUSTIFICATION: Python has no binding for ptrace(2).
# SAFETY: every pointer passed below is to a ctypes object of the size the request wants, alive during the call.
_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)


class Registers(ctypes.Structure):
    """``struct user_regs_struct`` of x86-64."""

    _fields_ = [(name, ctypes.c_uint64) for name in REGISTERS]  # noqa: RUF012 (ctypes wants a list)


class _Vector(ctypes.Structure):
    """``struct iovec``."""

    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]  # noqa: RUF012 (ctypes wants a list)
