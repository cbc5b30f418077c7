"""The way of a guest's requests through its hypervisor: one stream of bytes without ends, served like connections.

Promise: each request is served like a connection of its own, by the same code as any other; bytes that nobody took do
not reach whoever comes next; a guest that says nonsense harms only its own link.

What a guest sends to 169.254.169.254 its hypervisor writes into one socket, and what comes back it gives to the
guest's newest connection::

    guest ──TCP──► QEMU's network stack ──► chardev ──► unix socket ──► this link ──► aiohttp
    guest ──device──────► micro-VM ───────────────────► unix socket ──► this link ──► aiohttp

Nothing on the way says that a connection was opened or closed, and none can be closed from here. Hence a connection
is what lasts from the first byte of a request to the last of its answer, every answer says ``Connection: close``, and
an answer that is not taken within a moment, because its asker is gone, is thrown away by connecting anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import socket
import struct
import termios
from pathlib import Path
from typing import Any, Final

from aiohttp import web

from vmferry.telemetry.logs import get_logger

_LOG: Final = get_logger(__name__)
_RECONNECT_S: Final = 0.2
_READ_BYTES: Final = 65536
UNFINISHED_S: Final = 3.0
"""How long the rest of a request is waited for."""
TAKEN_S: Final = 0.25
"""How long an answer may lie before its asker counts as gone."""


class GuestLink:
    """The link to one hypervisor."""

    def __init__(self, path: Path, server: web.Server) -> None:
        self._path = path
        self._server = server
        self._ahead = b""
        """What was read of the next request."""
        self._task = asyncio.create_task(self._keep(), name=f"guest-link-{path}")

    async def close(self) -> None:
        """Let go of it."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _keep(self) -> None:
        while True:
            try:
                await self._serve()
            except OSError:  # the hypervisor is not there yet, or has ended
                await asyncio.sleep(_RECONNECT_S)

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as link:
            link.setblocking(False)
            await loop.sock_connect(link, str(self._path))
            self._ahead = b""
            while data := self._ahead or await loop.sock_recv(link, _READ_BYTES):
                self._ahead = b""
                if not await self._request(link, data):
                    _LOG.info("what a guest did not take is thrown away", socket=str(self._path))
                    return

    async def _request(self, link: socket.socket, data: bytes) -> bool:
        """Serve one request; false if its answer was not taken, or makes no sense to send."""
        loop = asyncio.get_running_loop()
        connection = _Connection(link)
        protocol = self._server()
        protocol.connection_made(connection)
        try:
            async with asyncio.timeout(UNFINISHED_S) as patience:
                while data:
                    protocol.data_received(data)
                    patience.reschedule(loop.time() + UNFINISHED_S)
                    data = await self._more(link, connection)
        except TimeoutError:
            _LOG.info("a guest did not finish what it asked", socket=str(self._path))
        finally:
            protocol.connection_lost(None)
        return not connection.broken and await _taken(link)

    async def _more(self, link: socket.socket, connection: _Connection) -> bytes:
        """What comes next of a request; nothing if its answer has been given, or the link has ended."""
        loop = asyncio.get_running_loop()
        reading = asyncio.create_task(loop.sock_recv(link, _READ_BYTES))
        ended = asyncio.create_task(connection.ended.wait())
        try:
            await asyncio.wait({reading, ended}, return_when=asyncio.FIRST_COMPLETED)
            data = reading.result() if reading.done() else b""
            if ended.done():
                self._ahead = data  # of the request behind this one
                return b""
            return data
        finally:
            for task in (reading, ended):
                task.cancel()
            await asyncio.gather(reading, ended, return_exceptions=True)


class _Connection(asyncio.Transport):
    """What aiohttp takes for a connection."""

    def __init__(self, link: socket.socket) -> None:
        super().__init__({"peername": "", "sockname": ""})
        self._link = link
        self.ended = asyncio.Event()
        self.broken = False

    def write(self, data: Any) -> None:
        """Send; answers are far smaller than what a socket holds, so one that does not fit is not taken any more."""
        if self.ended.is_set() or self.broken:
            return
        try:
            sent = self._link.send(data)
        except OSError:
            sent = -1
        self.broken = sent != len(data)
        if self.broken:
            self.ended.set()

    def writelines(self, list_of_data: Any) -> None:
        """Send several pieces."""
        self.write(b"".join(list_of_data))

    def is_closing(self) -> bool:
        """Whether the answer has been given."""
        return self.ended.is_set()

    def close(self) -> None:
        """The answer has been given."""
        self.ended.set()

    def abort(self) -> None:
        """Nothing sensible was asked."""
        self.broken = True
        self.ended.set()

    def can_write_eof(self) -> bool:
        """The link stays open."""
        return False

    def pause_reading(self) -> None:
        """Requests are small; there is nothing to hold back."""

    def resume_reading(self) -> None:
        """Nothing is held back."""

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """There is no buffer."""

    def get_write_buffer_size(self) -> int:
        """There is no buffer."""
        return 0


async def _taken(link: socket.socket) -> bool:
    """Whether the hypervisor takes what was sent to it, in a moment."""
    deadline = asyncio.get_running_loop().time() + TAKEN_S
    while _unread(link):
        if asyncio.get_running_loop().time() > deadline:
            return False
        await asyncio.sleep(0.005)
    return True


def _unread(link: socket.socket) -> int:
    """How many bytes the other end of a unix socket has not read.

    JUSTIFICATION: nothing else tells whether an answer reached a guest's connection or lies in wait for the next one.
    SAFETY: TIOCOUTQ writes one int into a buffer of that size.
    """
    answer = fcntl.ioctl(link.fileno(), termios.TIOCOUTQ, bytes(4))
    return int(struct.unpack("i", answer)[0])
