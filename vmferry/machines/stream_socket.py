"""The two ends of the private socket through which a hypervisor's own migration stream goes.

Promise: bytes go through in order and unchanged, and no faster than the other side takes them; the socket's name is
gone as soon as both ends have met, and always in the end.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import fcntl
import socket
import termios
from pathlib import Path

from vmferry.machines.state_socket import accept, connected


class StreamSource:
    """The end that reads what a hypervisor sends."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._listener: socket.socket | None = None
        self._link: socket.socket | None = None

    def listen(self) -> None:
        """Wait for the hypervisor at the path."""
        _forget(self._path)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.setblocking(False)
        self._listener.bind(str(self._path))
        self._listener.listen(1)

    async def accept(self) -> None:
        """Wait until the hypervisor has come."""
        assert self._listener is not None, "listening"
        self._link = await accept(self._listener)
        self._stop_listening()

    @property
    def waiting_bytes(self) -> int:
        """What the hypervisor has sent and nobody has read yet."""
        if self._link is None:
            return 0
        found = array.array("i", [0])
        fcntl.ioctl(self._link, termios.FIONREAD, found)
        return found[0]

    async def read(self, limit: int) -> bytes:
        """At least one byte, and as many up to ``limit`` as are there; none when the hypervisor has hung up."""
        assert self._link is not None, "accepted"
        pieces = [await asyncio.get_running_loop().sock_recv(self._link, limit)]
        size = len(pieces[0])
        with contextlib.suppress(BlockingIOError):
            while pieces[-1] and size < limit:
                pieces.append(self._link.recv(limit - size))
                size += len(pieces[-1])
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def close(self) -> None:
        """Hang up; safe to call twice. Nobody may be reading."""
        self._stop_listening()
        if self._link is not None:
            self._link.close()

    def _stop_listening(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None
            _forget(self._path)


class StreamSink:
    """The end that writes what a hypervisor is to take in."""

    def __init__(self) -> None:
        self._link: socket.socket | None = None

    async def connect(self, path: Path) -> None:
        """Go to the hypervisor that listens at ``path``; the name is not needed any more afterwards."""
        try:
            self._link = await connected(path)
        finally:
            _forget(path)

    async def write(self, data: bytes | bytearray | memoryview) -> None:
        """Return when all of it is on its way; raises OSError when the hypervisor has hung up."""
        assert self._link is not None, "connected"
        await asyncio.get_running_loop().sock_sendall(self._link, data)

    def end(self) -> None:
        """Say that this was all; the connection stays, so that its end is never taken for a fault."""
        assert self._link is not None, "connected"
        with contextlib.suppress(OSError):
            self._link.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Hang up; safe to call twice. Nobody may be writing."""
        if self._link is not None:
            self._link.close()


def _forget(path: Path) -> None:
    path.unlink(missing_ok=True)
