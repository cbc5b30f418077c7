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
import fcntl
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
"""How long a request may take to come."""
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
        reader, writer = await asyncio.open_unix_connection(self._path)
        try:
            self._ahead = b""
            while data := self._ahead or await reader.read(_READ_BYTES):
                self._ahead = b""
                if not await self._request(data, reader, writer):
                    _LOG.info("what a guest did not take is thrown away", socket=str(self._path))
                    return
        finally:
            writer.transport.abort()

    async def _request(self, data: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Serve one request; false if its answer was not taken, or makes no sense to send."""
        connection = _Connection(writer)
        protocol = self._server()
        protocol.connection_made(connection)
        try:
            async with asyncio.timeout(UNFINISHED_S):  # from its beginning: others may be asking meanwhile
                while data:
                    protocol.data_received(data)
                    data = await self._more(reader, connection)
        except TimeoutError:
            _LOG.info("a guest did not finish what it asked", socket=str(self._path))
        finally:
            protocol.connection_lost(None)
        return not connection.broken and await _taken(writer)

    async def _more(self, reader: asyncio.StreamReader, connection: _Connection) -> bytes:
        """What comes next of a request; nothing if its answer has been given, or the link has ended."""
        # A reader that is cancelled leaves what has come in its buffer.
        reading = asyncio.create_task(reader.read(_READ_BYTES))
        ended = asyncio.create_task(connection.ended.wait())
        try:
            await asyncio.wait({reading, ended}, return_when=asyncio.FIRST_COMPLETED)
            data = reading.result() if reading.done() else b""
            if not ended.done():
                return data
            self._ahead = data  # of the request behind this one
            return b""
        finally:
            for task in (reading, ended):
                task.cancel()
            await asyncio.gather(reading, ended, return_exceptions=True)


class _Connection(asyncio.Transport):
    """What aiohttp takes for a connection."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        super().__init__({"peername": "", "sockname": ""})
        self._writer = writer
        self.ended = asyncio.Event()
        self.broken = False

    def write(self, data: Any) -> None:
        """Send."""
        if not self.ended.is_set():
            self._writer.write(data)

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


async def _taken(writer: asyncio.StreamWriter) -> bool:
    """Whether the hypervisor takes what was sent to it, in a moment."""
    deadline = asyncio.get_running_loop().time() + TAKEN_S
    while _unread(writer):
        if asyncio.get_running_loop().time() > deadline:
            return False
        await asyncio.sleep(0.005)
    return not writer.transport.is_closing()


def _unread(writer: asyncio.StreamWriter) -> int:
    """How many bytes the other end of a unix socket has not read.

    JUSTIFICATION: nothing else tells whether an answer reached a guest's connection or lies in wait for the next one.
    SAFETY: TIOCOUTQ writes one int into a buffer of that size.
    """
    link = writer.get_extra_info("socket")
    if writer.transport.is_closing():
        return 0
    answer = fcntl.ioctl(link.fileno(), termios.TIOCOUTQ, bytes(4))
    return int(struct.unpack("i", answer)[0]) + writer.transport.get_write_buffer_size()
