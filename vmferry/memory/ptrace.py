"""System calls in the context of another process, by ptrace, without leaving a trace in it.

Promise: a thread that was stopped here goes on exactly where it was, and a system call it was waiting in is
restarted by the kernel as after any stop (``epoll_wait`` and its like are not: they return EINTR, as after
SIGCONT). Only the one thread is stopped; the others run on.

Used in a process of its own only (``surgeon``): the thread that seizes must be the one that waits; a thread that
waits for the end of a child would steal the child's stops from a tracer in the same process; and a tracer that is
killed while a thread has foreign registers takes that thread with it.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import math
import os
import re
import signal
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, Self

from vmferry.errors import TrackerUnavailableError

_CONT: Final = 7
_DETACH: Final = 17
_SYSCALL: Final = 24
_GETREGSET: Final = 0x4204
_SETREGSET: Final = 0x4205
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
_CODE_SEGMENT_64: Final = 0x33
_NOT_IN_SYSCALL: Final = 2**64 - 1
_ALL_SIGNALS: Final = b"\xff" * 8

REGISTERS: Final = (
    *("r15", "r14", "r13", "r12", "bp", "bx", "r11", "r10", "r9", "r8", "ax", "cx", "dx", "si", "di"),
    *("orig_ax", "ip", "cs", "flags", "sp", "ss", "fs_base", "gs_base", "ds", "es", "fs", "gs"),
)
"""``struct user_regs_struct`` of x86-64."""
REGISTER_SET: Final = struct.Struct(f"={len(REGISTERS)}Q")
_ARGUMENTS: Final = ("di", "si", "dx", "r10", "r8", "r9")
_VECTOR: Final = struct.Struct("=QQ")
"""``struct iovec``."""
_RSEQ: Final = struct.Struct("=QIIII")
"""``struct ptrace_rseq_configuration``: address, size, signature, flags, padding."""
_RSEQ_SECTION: Final = struct.Struct("=IIQQQ")
"""``struct rseq_cs``: version, flags, start, length, abort."""
_RSEQ_TRIES: Final = 100
_STOP_TIMEOUT_SECONDS: Final = 5.0
_END_TIMEOUT_SECONDS: Final = 0.1
_POLL_SECONDS: Final = 20e-6
_POLLS_PER_LOOK: Final = 16

_BEFORE_SYSCALL: Final = re.compile(rb"\xb8..\x00\x00(?=\x0f\x05)", re.DOTALL)
"""``mov eax, NUMBER`` before ``syscall``: with it, those two bytes cannot be part of another instruction."""

# JUSTIFICATION: Python has no binding for ptrace(2).
# SAFETY: every pointer passed is to a buffer of the size its request wants, held until the call has returned.
_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)


class Tracee:
    """One thread of another process; as a context manager, stopped and ready for :meth:`call`.

    ``ProcessLookupError`` from any method means that the thread is gone.
    """

    def __init__(self, pid: int, tid: int, *, filtered: bool = False) -> None:
        """Attach without stopping the thread.

        ``filtered`` says that seccomp filters the thread's system calls. The filter is then suspended while
        attached, because it might answer an unexpected call by killing the machine.
        """
        self._pid = pid
        self._tid = tid
        self._stop_again = False
        options = _OPTION_SYSGOOD | (_OPTION_SUSPEND_SECCOMP if filtered else 0)
        try:
            self._request(_SEIZE, 0, options)
        except ProcessLookupError:
            raise
        except OSError as exc:
            if _is_ending(tid):
                raise ProcessLookupError(errno.ESRCH, "the thread is gone") from exc
            what = "suspending its system call filter (seccomp)" if filtered else "attaching to it"
            raise TrackerUnavailableError(
                f"process {pid}: {what} by ptrace failed with {errno.errorcode.get(exc.errno or 0, exc.errno)}",
                remedy="Run the service with CAP_SYS_PTRACE (and CAP_SYS_ADMIN for filtered processes), "
                "and see that nothing else traces the machine.",
                pid=pid,
                errno=exc.errno,
            ) from exc

    def stop(self) -> None:
        """Stop the thread at a point where a system call can be restarted; signals on the way are delivered."""
        self._request(_INTERRUPT)
        deadline = time.monotonic() + _STOP_TIMEOUT_SECONDS
        while (status := self._wait(deadline)) >> 16 != _EVENT_STOP:
            self._request(_CONT, 0, os.WSTOPSIG(status))

    def detach(self) -> None:
        """Let the stopped thread go, if it still lives."""
        with suppress(ProcessLookupError):
            self._request(_DETACH)

    def __enter__(self) -> Self:
        """Stop the thread, note its state, and hold its signals back until it has its state again."""
        try:
            self._instruction = _find_syscall_instruction(self._tid)
        except ProcessLookupError:
            self._collect()
            raise
        self.stop()
        try:
            self._leave_restartable_sequence()
            self._saved = self._get_registers()
            self._check_mode()
            self._mask = ctypes.create_string_buffer(len(_ALL_SIGNALS))
            self._request(_GETSIGMASK, len(_ALL_SIGNALS), ctypes.addressof(self._mask))
            self._set_mask(ctypes.create_string_buffer(_ALL_SIGNALS, len(_ALL_SIGNALS)))
        except BaseException:
            self.detach()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Give the thread its state back and let it go.

        The kernel restarts an interrupted system call on the way out of a signal stop, so the thread is brought
        to one first: it last stopped at the end of a call of ours.
        """
        try:
            self._request(_INTERRUPT)
            self._resume_until(_CONT, event=True)
            self._set_registers(self._saved)
            self._set_mask(self._mask)
            if self._stop_again:
                os.kill(self._pid, signal.SIGSTOP)
            self.detach()
        except ProcessLookupError:
            return  # it died, and took its state with it

    def call(self, number: int, *arguments: int) -> int:
        """Make one system call in the thread; returns what the kernel returned, a negative number for an error."""
        entered = self._saved | dict(zip(_ARGUMENTS, arguments, strict=False))
        self._set_registers(entered | {"ip": self._instruction, "ax": number, "orig_ax": _NOT_IN_SYSCALL})
        self._resume_until(_SYSCALL, event=False)
        at_entry = self._get_registers()
        if (at_entry["orig_ax"], at_entry["ip"]) != (number, self._instruction + 2):
            raise TrackerUnavailableError(
                f"process {self._pid}: its vDSO has no usable instruction", pid=self._pid
            )
        self._resume_until(_SYSCALL, event=False)
        result = self._get_registers()["ax"]
        return result - 2**64 if result >> 63 else result

    def _check_mode(self) -> None:
        if self._saved["cs"] != _CODE_SEGMENT_64:
            raise TrackerUnavailableError(f"process {self._pid} does not run 64-bit code", pid=self._pid)

    def _resume_until(self, request: int, *, event: bool) -> None:
        """Let the thread run to its next stop: the one of an interrupt, or else one at a system call.

        With all other signals held back, SIGSTOP alone can come in between; it is sent again at the end.
        """
        while True:
            self._request(request)
            status = self._wait()
            is_event = status >> 16 == _EVENT_STOP
            is_call = os.WSTOPSIG(status) == _SYSCALL_STOP
            if is_event if event else is_call:
                return
            if not is_event and not is_call:
                self._stop_again |= os.WSTOPSIG(status) == signal.SIGSTOP

    def _wait(self, deadline: float = math.inf) -> int:
        """The status of the next stop.

        Polls, because a wait could last for ever: a thread that hangs in the kernel does not stop, and the first
        thread of a process that was killed does not report its end before all others are gone.
        """
        ended = False
        for attempt in itertools.count(1):
            try:
                found, status = os.waitpid(self._tid, _WALL | os.WNOHANG)
            except ChildProcessError as exc:
                raise ProcessLookupError(errno.ESRCH, "the thread is gone") from exc
            if found and os.WIFSTOPPED(status):
                return status
            if found or ended:
                raise ProcessLookupError(errno.ESRCH, "the thread is gone")
            # Looked at before the next wait, not after this one, so that an end is also collected.
            ended = attempt % _POLLS_PER_LOOK == 0 and _is_zombie(self._tid)
            if time.monotonic() > deadline:
                break
            time.sleep(_POLL_SECONDS)
        raise TrackerUnavailableError(
            f"process {self._pid}: thread {self._tid} cannot be stopped, it hangs in the kernel",
            pid=self._pid,
        )

    def _collect(self) -> None:
        """Take note of the thread's end: until its tracer has done so, its process cannot end."""
        deadline = time.monotonic() + _STOP_TIMEOUT_SECONDS
        with suppress(ProcessLookupError, TrackerUnavailableError):
            while True:
                self._wait(deadline)

    def _leave_restartable_sequence(self) -> None:
        """See that the thread is not inside a restartable sequence (rseq).

        The kernel aborts such a sequence if it sees the thread interrupted inside it; with our registers in
        between it would not, and the sequence would wrongly complete.
        """
        for _ in range(_RSEQ_TRIES):
            if not self._in_restartable_sequence():
                return
            self._request(_CONT)
            time.sleep(0.0005)
            self.stop()
        raise TrackerUnavailableError(
            f"process {self._pid} does not leave a restartable sequence", pid=self._pid
        )

    def _in_restartable_sequence(self) -> bool:
        setup = ctypes.create_string_buffer(_RSEQ.size)
        try:
            self._request(_RSEQ_CONFIGURATION, _RSEQ.size, ctypes.addressof(setup))
        except ProcessLookupError:
            raise
        except OSError:
            return False  # a kernel before 5.13 cannot say; glibc itself has no such sequence
        address = int(_RSEQ.unpack(setup.raw)[0])
        section = int.from_bytes(_read_memory(self._tid, address + 8, 8), "little") if address else 0
        if not section:
            return False
        _, _, start, length, _ = _RSEQ_SECTION.unpack(_read_memory(self._tid, section, _RSEQ_SECTION.size))
        return bool(start <= self._get_registers()["ip"] < start + length)

    def _get_registers(self) -> dict[str, int]:
        buffer = ctypes.create_string_buffer(REGISTER_SET.size)
        self._register_request(_GETREGSET, buffer)
        return dict(zip(REGISTERS, REGISTER_SET.unpack(buffer.raw), strict=True))

    def _set_registers(self, registers: dict[str, int]) -> None:
        values = REGISTER_SET.pack(*(registers[name] for name in REGISTERS))
        self._register_request(_SETREGSET, ctypes.create_string_buffer(values, REGISTER_SET.size))

    def _register_request(self, request: int, buffer: ctypes.Array[ctypes.c_char]) -> None:
        vector = ctypes.create_string_buffer(
            _VECTOR.pack(ctypes.addressof(buffer), REGISTER_SET.size), _VECTOR.size
        )
        self._request(request, _NT_PRSTATUS, ctypes.addressof(vector))

    def _set_mask(self, mask: ctypes.Array[ctypes.c_char]) -> None:
        self._request(_SETSIGMASK, len(_ALL_SIGNALS), ctypes.addressof(mask))

    def _request(self, request: int, address: int = 0, data: int = 0) -> None:
        if _libc.ptrace(request, self._tid, address, data) < 0:
            code = ctypes.get_errno()
            if code == errno.ESRCH:
                self._collect()
            raise OSError(code, os.strerror(code))


def _find_syscall_instruction(tid: int) -> int:
    """The address of a ``syscall`` instruction in the code that the kernel itself maps into each process."""
    with _gone_if_absent():
        lines = Path(f"/proc/{tid}/maps").read_text("utf-8", "surrogateescape").splitlines()
    for line in lines:
        if line.endswith(" [vdso]"):
            start, end = (int(part, 16) for part in line.split()[0].split("-"))
            match = _BEFORE_SYSCALL.search(_read_memory(tid, start, end - start))
            if match:
                return start + match.end()
    if _is_ending(tid):
        raise ProcessLookupError(errno.ESRCH, "the thread is gone")
    raise TrackerUnavailableError(f"process {tid} has no system call instruction in its vDSO", pid=tid)


def _read_memory(tid: int, address: int, size: int) -> bytes:
    with _gone_if_absent(), Path(f"/proc/{tid}/mem").open("rb", buffering=0) as memory:
        memory.seek(address)
        data = memory.read(size)
    if len(data) != size:
        raise ProcessLookupError(errno.ESRCH, "the thread is gone")
    return data


def _is_ending(tid: int) -> bool:
    """Whether a thread ends about now: meanwhile its memory is in pieces, and nobody may attach to it."""
    deadline = time.monotonic() + _END_TIMEOUT_SECONDS
    while not (ended := _is_zombie(tid)) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    return ended


def _is_zombie(tid: int) -> bool:
    """Whether a thread has ended, be it that nobody took note yet."""
    try:
        stat = Path(f"/proc/{tid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return True
    return stat[stat.rindex(b")") + 2 :][:1] in b"ZX"


@contextmanager
def _gone_if_absent() -> Iterator[None]:
    """A thread without an entry in /proc is gone."""
    try:
        yield
    except FileNotFoundError as exc:
        raise ProcessLookupError(errno.ESRCH, "the thread is gone") from exc
