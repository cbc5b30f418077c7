"""Device state as bytes: the two ends of the private socket through which a hypervisor hands it over.

Promise: nothing is read beyond the limit, nothing counts as complete before the hypervisor closed its end,
and the socket's file is gone afterwards, whatever happened.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Final

MAX_STATE_BYTES: Final = 64 * 1024 * 1024
"""Device state of a machine with dozens of devices is a few MiB; more is a fault."""

_BLOCK_BYTES: Final = 256 * 1024


class StateTooLargeError(Exception):
    """The hypervisor sent more than MAX_STATE_BYTES."""


@contextlib.asynccontextmanager
async def receiving(path: Path) -> AsyncIterator[asyncio.Task[bytes]]:
    """Listen at ``path``; the task ends with all that the first caller sent.

    The task raises StateTooLargeError when that is more than MAX_STATE_BYTES.
    """
    with temporary(path), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.setblocking(False)
        listener.bind(str(path))
        listener.listen(1)
        task = asyncio.create_task(_accept_and_read(listener))
        try:
            yield task
        finally:
            task.cancel()
            await asyncio.wait((task,))


async def _accept_and_read(listener: socket.socket) -> bytes:
    loop = asyncio.get_running_loop()
    with await accept(listener) as link:
        found = bytearray()
        while block := await loop.sock_recv(link, _BLOCK_BYTES):
            found += block
            if len(found) > MAX_STATE_BYTES:
                raise StateTooLargeError
    return bytes(found)


async def accept(listener: socket.socket) -> socket.socket:
    """The next caller's connection.

    Whoever is cancelled meanwhile has taken none. The event loop's own way may take one all the same, if the caller
    comes in the same moment, and complains in the log that nobody wants it.
    """
    while True:
        try:
            link, _ = listener.accept()
        except BlockingIOError:
            await _readable(listener)
        else:
            link.setblocking(False)
            return link


async def _readable(listener: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    called = asyncio.Event()
    loop.add_reader(listener, called.set)
    try:
        await called.wait()
    finally:
        loop.remove_reader(listener)


async def connected(path: Path) -> socket.socket:
    """A connection to the listener at ``path``."""
    link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        link.setblocking(False)
        await asyncio.get_running_loop().sock_connect(link, str(path))
    except BaseException:
        link.close()
        raise
    return link


async def send_all(link: socket.socket, data: bytes) -> None:
    """Send ``data`` and say that this is all; the caller keeps the connection until it has been taken in.

    A hypervisor that finds a fault hangs up early; what it found, it says when asked.
    """
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        await asyncio.get_running_loop().sock_sendall(link, data)
        link.shutdown(socket.SHUT_WR)


@contextlib.contextmanager
def temporary(path: Path) -> Iterator[None]:
    """Make sure that nothing is at ``path``, neither before nor after."""
    path.unlink(missing_ok=True)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
