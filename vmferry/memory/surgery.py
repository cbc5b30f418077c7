"""Has operations done inside machines' processes.

Promise: an operation is answered within 30 s, with what came of it or with why it was not done. A process stands by
for them (:mod:`vmferry.memory.surgeon`) from the first one on, so that a machine on its way does not wait for an
interpreter to start; it is started anew if somebody has killed it, and ends with this process, however that ends.
"""

from __future__ import annotations

import atexit
import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Final

from vmferry.errors import InternalError, MachineDeadError, TrackerUnavailableError
from vmferry.memory.surgeon import LIMIT_S

_MAX_ANSWER: Final = 65536
_ENDS_S: Final = 5.0
_BOOT: Final = "import sys; sys.path.insert(0, sys.argv[1]); from vmferry.memory.surgeon import main; main()"


def operate(operation: str, pid: int, *numbers: int) -> int:
    """Have a surgeon do ``operation`` on process ``pid``; returns the descriptor that is its result.

    Raises:
        MachineDeadError: the process is gone.
        TrackerUnavailableError: it cannot be done; the message says why.
    """
    (descriptor,) = _asked(operation, pid, *numbers)
    return descriptor


def touch_own_memory(pid: int) -> None:
    """Have a process take memory now that it has asked the kernel for, and would take when it touches it first.

    That is its heap, and pieces up to 512 KiB without a name; nothing of its guest's. What they hold stays as it is.

    Raises:
        MachineDeadError: the process is gone.
        TrackerUnavailableError: it cannot be done; the message says why.
    """
    _asked("touch", pid)


class _StandBy:
    """The process that begins operations. Threads may order at the same time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._orders: socket.socket | None = None

    def order(self, text: bytes, channel: socket.socket) -> None:
        """Have an operation begun that answers over a channel."""
        with self._lock:
            orders = self._orders or self._start()
            try:
                socket.send_fds(orders, [text], [channel.fileno()])
            except OSError:  # somebody has killed it
                self._end()
                socket.send_fds(self._start(), [text], [channel.fileno()])

    def close(self) -> None:
        """End it; operations that were begun are finished."""
        with self._lock:
            self._end()

    def _start(self) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        package_parent = str(Path(__file__).resolve().parents[2])
        try:
            with theirs:
                self._process = subprocess.Popen(  # noqa: S603 (our own interpreter and module, no shell)
                    # Isolated and without site: it starts sooner, and no environment changes what it runs.
                    [sys.executable, "-I", "-S", "-c", _BOOT, package_parent, str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    cwd="/",
                    start_new_session=True,  # what is sent to the service's group must not stop it half-way
                )
        except BaseException:
            ours.close()
            raise
        self._orders = ours
        return ours

    def _end(self) -> None:
        if self._orders is not None:
            self._orders.close()
            self._orders = None
        if self._process is not None:
            try:
                self._process.wait(_ENDS_S)
            except subprocess.TimeoutExpired:  # it was stopped by somebody
                self._process.kill()
                self._process.wait()
            self._process = None


_STAND_BY: Final = _StandBy()
atexit.register(_STAND_BY.close)


def _asked(operation: str, pid: int, *numbers: int) -> list[int]:
    """Have a surgeon do something; returns the descriptors that came of it, which nobody else has any more."""
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            _STAND_BY.order(json.dumps([operation, pid, *numbers]).encode(), theirs)
        ours.settimeout(LIMIT_S)
        descriptors: list[int] = []
        try:
            answer, descriptors, _, _ = socket.recv_fds(ours, _MAX_ANSWER, 1, socket.MSG_CMSG_CLOEXEC)
            # What is tracked is so until the last of its descriptors is closed, the surgeon's own included.
            ours.recv(1)
        except OSError as exc:
            for descriptor in descriptors:
                os.close(descriptor)
            raise TrackerUnavailableError(f"operating on process {pid} was given up: {exc}", pid=pid) from exc
    told = json.loads(answer or '{"broken": "its process was killed"}')
    if not told:
        return descriptors
    if broken := told.get("broken"):
        raise InternalError(f"the operation on process {pid} broke down: {broken}", pid=pid)
    kind = MachineDeadError if told["reason"] == MachineDeadError.reason else TrackerUnavailableError
    raise kind(told["message"], remedy=told["remedy"], **told["metadata"])
