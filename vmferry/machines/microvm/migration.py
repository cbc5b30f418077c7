"""Device state in and out of the machine, over a local socket that the host's service holds the other end of.

Promise: one transfer at a time; a machine whose state left is ``postmigrate`` only when all of it was written; a
stream that cannot be loaded leaves the machine waiting for another one. RAM never takes this way.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import socket
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, Final

from vmferry.errors import InvalidArgumentError, VmferryError, WrongPhaseError
from vmferry.machines.microvm.devicestate import MAX_STREAM_BYTES
from vmferry.machines.microvm.machine import STOPPED, Machine, RunState
from vmferry.machines.state_socket import accept

_log = logging.getLogger(__name__)

_TRANSFER_LIMIT_S: Final = 60.0
"""A peer that neither reads nor writes for so long is gone."""
_BLOCK_BYTES: Final = 1 << 16


class Status(enum.StrEnum):
    """How far the latest transfer has come."""

    NONE = "none"
    SETUP = "setup"
    ACTIVE = "active"
    COMPLETED = "completed"
    FAILED = "failed"


class Migration:
    """Transfers of one machine's device state."""

    def __init__(self, machine: Machine) -> None:
        self.status = Status.NONE
        self.error = ""
        self.ignore_shared = False
        """Capability ``x-ignore-shared``: RAM is left out, for it is in a shared file."""
        self._machine = machine
        self._task: asyncio.Task[None] | None = None

    @property
    def leaving(self) -> bool:
        """Whether the device state is on its way out: the guest must not go on meanwhile."""
        return self.status in {Status.SETUP, Status.ACTIVE} and self._machine.state is not RunState.INMIGRATE

    def send(self, uri: str) -> None:
        """Begin to write the device state into the socket at ``uri``."""
        path = _path_of(uri)
        if not self.ignore_shared:
            raise WrongPhaseError(
                "this machine never sends its RAM: set the capability x-ignore-shared first"
            )
        if self.leaving:
            raise WrongPhaseError("a migration is under way already")
        if self._machine.state not in STOPPED:
            raise WrongPhaseError(f"only a paused machine can leave; this one is {self._machine.state}")
        self._begin(self._send(path))

    async def receive(self, uri: str) -> None:
        """Listen at ``uri`` for one device state; replaces a listener that has not loaded one yet."""
        path = _path_of(uri)
        if self._machine.state is not RunState.INMIGRATE:
            raise WrongPhaseError(f"the machine takes no device state while it is {self._machine.state}")
        await self.close()
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.setblocking(False)
            listener.bind(str(path))
            listener.listen(1)
        except OSError as error:
            listener.close()
            raise InvalidArgumentError(f"cannot listen at {path}: {error.strerror or error}") from error
        self._begin(self._receive(listener, path))

    async def close(self) -> None:
        """End a transfer under way."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait((self._task,))

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        self.error = ""
        self._set_status(Status.SETUP)
        self._task = asyncio.get_running_loop().create_task(self._guarded(work))

    async def _guarded(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except TimeoutError:
            self._fail(f"the other end did nothing for {_TRANSFER_LIMIT_S:g} s")
        except OSError as error:
            self._fail(f"the socket failed: {error.strerror or error}")
        except VmferryError as error:
            self._fail(str(error))
        else:
            self._set_status(Status.COMPLETED)

    async def _send(self, path: Path) -> None:
        loop = asyncio.get_running_loop()
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
            link.setblocking(False)
            async with asyncio.timeout(_TRANSFER_LIMIT_S):
                await loop.sock_connect(link, str(path))
                self._set_status(Status.ACTIVE)
                await loop.sock_sendall(link, self._machine.save())
        self._machine.saved()

    async def _receive(self, listener: socket.socket, path: Path) -> None:
        loop = asyncio.get_running_loop()
        try:
            link = await accept(listener)
        finally:
            listener.close()
            _remove(path)
        with link:
            self._set_status(Status.ACTIVE)
            stream = bytearray()
            async with asyncio.timeout(_TRANSFER_LIMIT_S):
                # One byte too many is read and then refused by the parser.
                while len(stream) <= MAX_STREAM_BYTES and (block := await loop.sock_recv(link, _BLOCK_BYTES)):
                    stream += block
            self._machine.load(bytes(stream))

    def _fail(self, reason: str) -> None:
        _log.error("migration failed: %s", reason)
        self.error = reason
        self._set_status(Status.FAILED)

    def _set_status(self, status: Status) -> None:
        self.status = status
        self._machine.emit("MIGRATION", {"status": str(status)})


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


def _path_of(uri: str) -> Path:
    scheme, _, path = uri.partition(":")
    if scheme != "unix" or not path.startswith("/"):
        raise InvalidArgumentError(f"{uri!r} is not of the form unix:/absolute/path")
    return Path(path)
