"""Operations inside a machine's process, done by processes that do one operation each.

Promise: whatever becomes of the service, an operation that was begun is finished or has changed nothing; it
leaves neither a descriptor nor a changed register in the machine. ``ptrace`` says why this is no thread of the
service.

::

    service                 standing by        surgeon                  machine
    asked(operation) ─────▶ fork ────────────▶ attach, stop one thread ▶ (0.3 ms)
                                               userfaultfd() there ────▶ fd
                                               pidfd_getfd: a copy of fd
                                               close(fd) there ────────▶
                                               restore, detach ────────▶ goes on
             ◀── SCM_RIGHTS: answer, descriptor (if there is one)

This module is that process, from its start on: it stands by, as to start an interpreter takes longer than most
operations, and ends with the service. :mod:`vmferry.memory.surgery` is the service's side.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn, TypeVar

from vmferry.errors import MachineDeadError, TrackerUnavailableError, VmferryError
from vmferry.memory.filters import harmlessly_filtered
from vmferry.memory.pagemap import clear_soft_dirty, read_entries
from vmferry.memory.ptrace import Tracee
from vmferry.memory.userfault import OPEN_FLAGS, SYS_USERFAULTFD

LIMIT_S: Final = 30
"""An operation that takes longer is given up."""
_MAX_ORDER: Final = 4096
_SYS_CLOSE: Final = 3
_SYS_MADVISE: Final = 28
_SYS_PIDFD_GETFD: Final = 438
_THREAD_TRIES: Final = 100
_MADV_POPULATE_WRITE: Final = 23
"""Since Linux 5.14."""
_SMALL_BYTES: Final = 512 * 1024
"""Firmware and tables are smaller, and what is set aside for whatever may come is larger."""
_OWN_MEMORY: Final = re.compile(
    r"^([0-9a-f]+)-([0-9a-f]+) rw-p 0+ 00:00 0 *(\[heap\])?$", re.ASCII | re.MULTILINE
)

_Result = TypeVar("_Result")

# JUSTIFICATION: Python has no binding for pidfd_getfd(2).
# SAFETY: one call with integers, touches no memory of this process.
_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.syscall.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_long, ctypes.c_long)


def main() -> None:
    """Stand by for orders until the service has ended."""
    # What is sent to the service's group, or to all processes of its unit, must not stop an operation half-way.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGHUP})
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # surgeons answer for themselves
    with socket.socket(fileno=int(sys.argv[2])) as orders:
        while True:
            order, descriptors, _, _ = socket.recv_fds(orders, _MAX_ORDER, 1, socket.MSG_CMSG_CLOEXEC)
            if not order:
                return
            with socket.socket(fileno=descriptors[0]) as channel:
                if _becomes_surgeon(channel):
                    orders.close()  # nobody stands by any more when the one that does has ended
                    _operate(order, channel)


def _becomes_surgeon(channel: socket.socket) -> bool:
    """Divide in two: one goes on standing by, and the other is told that it is to operate."""
    try:
        return os.fork() == 0
    except OSError as error:
        with suppress(OSError):  # whoever waited may have given up, and others have not
            _refuse(channel, TrackerUnavailableError(f"no process can be started for it: {error}"))
        return False


def _operate(order: bytes, channel: socket.socket) -> NoReturn:
    """Do one operation, answer with a descriptor or a refusal, and end."""
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.alarm(LIMIT_S + 1)  # who waits for the answer gives up before
        operation, *numbers = json.loads(order)
        try:
            result = _OPERATIONS[operation](*numbers)
        except VmferryError as error:
            _refuse(channel, error)
        else:
            socket.send_fds(channel, [b"{}"], [] if result is None else [result])
            if result is not None:
                os.close(result)  # before the end of the channel says that nobody else has it any more
    except BaseException:  # noqa: BLE001 - whatever it is, this process ends here, and whoever waits is told
        with suppress(OSError):
            channel.sendall(json.dumps({"broken": traceback.format_exc()}).encode())
    finally:
        os._exit(0)


def _refuse(channel: socket.socket, error: VmferryError) -> None:
    refusal = {
        "reason": error.reason,
        "message": error.message,
        "remedy": error.instance_remedy,
        "metadata": error.metadata,
    }
    channel.sendall(json.dumps(refusal).encode())


def open_userfault_in(pid: int) -> int:
    """Create a userfaultfd of another process's address space; only the copy returned here stays open."""
    with _pidfd(pid) as pidfd:
        return _in_a_thread(pid, lambda tracee: _take_userfault(tracee, pid, pidfd))


def take_own_memory(pid: int) -> None:
    """Have one thread of a process take what the process has not touched of its heap and of small pieces."""

    def take(tracee: Tracee) -> None:
        for start, length in _own_memory(pid):
            # A piece that another thread has given back meanwhile needs nothing any more.
            tracee.call(_SYS_MADVISE, start, length, _MADV_POPULATE_WRITE)

    with _pidfd(pid):
        _in_a_thread(pid, take)


def _own_memory(pid: int) -> list[tuple[int, int]]:
    """Address and length of a process's heap, and of its other private memory that lies in small pieces."""
    text = Path(f"/proc/{pid}/maps").read_text("utf-8", "surrogateescape")
    found = [(int(match[1], 16), int(match[2], 16), match[3]) for match in _OWN_MEMORY.finditer(text)]
    return [(start, end - start) for start, end, heap in found if heap or end - start <= _SMALL_BYTES]


def _in_a_thread(pid: int, work: Callable[[Tracee], _Result]) -> _Result:
    """Do something in one thread of a process, which stands still meanwhile."""
    for _ in range(_THREAD_TRIES):
        thread = _threads(pid)[0]
        try:
            with _attached(pid, thread) as tracee:
                return work(tracee)
        except ProcessLookupError:
            continue  # that thread ended meanwhile
    raise TrackerUnavailableError(f"process {pid}: its threads end as soon as they are chosen", pid=pid)


def _attached(pid: int, thread: _Thread) -> Tracee:
    """Attach to a thread; filters that cannot be suspended stay in force if they are known to do no harm."""
    try:
        return Tracee(pid, thread.tid, filtered=thread.filtered)
    except TrackerUnavailableError:
        if not thread.filtered or not harmlessly_filtered(pid):
            raise
    return Tracee(pid, thread.tid)


def _take_userfault(tracee: Tracee, pid: int, pidfd: int) -> int:
    """Open a userfaultfd in the stopped thread, copy it, close it there."""
    theirs = tracee.call(SYS_USERFAULTFD, OPEN_FLAGS)
    if theirs < 0:
        name = errno.errorcode.get(-theirs, str(-theirs))
        raise TrackerUnavailableError(
            f"userfaultfd in process {pid} failed with {name}: {os.strerror(-theirs)}", pid=pid, errno=-theirs
        )
    ours = int(_libc.syscall(_SYS_PIDFD_GETFD, pidfd, theirs, 0))
    code = ctypes.get_errno()
    tracee.call(_SYS_CLOSE, theirs)
    if ours < 0:
        raise TrackerUnavailableError(
            f"pidfd_getfd of process {pid} failed with {errno.errorcode.get(code, code)}: {os.strerror(code)}",
            pid=pid,
            errno=code,
        )
    return ours


def take_soft_dirty(pid: int, address: int, length: int) -> int:
    """Read the page map of a range and clear its soft-dirty bits, while the whole process stands still.

    Reading and clearing are two steps, and a page written between them would be lost; so no thread may run.
    Returns a memory file with eight bytes for each page, as in the page map.
    """
    try:
        with Path(f"/proc/{pid}/pagemap").open("rb", buffering=0) as pagemap, _frozen(pid):
            entries = read_entries(pagemap.fileno(), address, length)
            clear_soft_dirty(pid)
    except (ProcessLookupError, FileNotFoundError) as exc:
        raise MachineDeadError(f"process {pid} is gone", pid=pid) from exc
    except PermissionError as exc:
        raise TrackerUnavailableError(f"process {pid}: {exc}", pid=pid) from exc
    result = os.memfd_create("soft-dirty")
    with os.fdopen(os.dup(result), "wb") as file:
        file.write(entries)
    os.lseek(result, 0, os.SEEK_SET)
    return result


@contextmanager
def _frozen(pid: int) -> Iterator[None]:
    """Stop every thread of a process, those that are born meanwhile too."""
    held: dict[int, Tracee] = {}
    with ExitStack() as stack:
        while fresh := [thread for thread in _threads(pid) if thread.tid not in held]:
            for thread in fresh:
                try:
                    tracee = held[thread.tid] = Tracee(pid, thread.tid)
                    tracee.stop()
                except ProcessLookupError:
                    continue  # ended meanwhile
                stack.callback(tracee.detach)
        yield


@dataclass(frozen=True)
class _Thread:
    """What matters about one thread of a machine before touching it."""

    tid: int
    state: str
    filtered: bool


def _threads(pid: int) -> list[_Thread]:
    """The living threads of a process, those first that are likely to stop at once.

    Raises:
        MachineDeadError: there is none.
        TrackerUnavailableError: another process traces it already.
    """
    try:
        tids = sorted(int(entry.name) for entry in Path(f"/proc/{pid}/task").iterdir())
    except (FileNotFoundError, ProcessLookupError) as exc:
        raise MachineDeadError(f"process {pid} is gone", pid=pid) from exc
    found = []
    for tid in tids:
        try:
            lines = Path(f"/proc/{pid}/task/{tid}/status").read_text("utf-8", "replace").splitlines()
        except (FileNotFoundError, ProcessLookupError):
            continue
        status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
        if status["State"][0] in "ZX":
            continue
        if int(status["TracerPid"]) not in (0, os.getpid()):
            raise TrackerUnavailableError(
                f"process {pid} is already traced by process {status['TracerPid']}",
                remedy="Detach the debugger from the machine, or use the 'hash' tracker.",
                pid=pid,
                tracer=status["TracerPid"],
            )
        found.append(_Thread(tid, status["State"][0], status.get("Seccomp", "0") != "0"))
    if not found:
        raise MachineDeadError(f"process {pid} is gone", pid=pid)
    return sorted(found, key=lambda thread: (thread.state == "D", thread.tid != pid))


@contextmanager
def _pidfd(pid: int) -> Iterator[int]:
    """A descriptor that means this process and never a later one with the same number."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError as exc:
        raise MachineDeadError(f"process {pid} is gone", pid=pid) from exc
    try:
        yield fd
    finally:
        os.close(fd)


_OPERATIONS: Final[dict[str, Callable[..., int | None]]] = {
    "userfault": open_userfault_in,
    "soft-dirty": take_soft_dirty,
    "touch": take_own_memory,
}
