"""QMP over a unix socket: greeting, negotiation, commands, events; several clients at a time.

Promise: every line gets exactly one answer, in order, with its ``id``; no line, however wrong, harms the machine or
another client. A client that sends a line above 10 MiB, or does not read its events, is disconnected.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from vmferry.errors import ConfigError
from vmferry.machines.microvm.machine import Machine
from vmferry.machines.microvm.qmp_commands import CommandError, Commands
from vmferry.machines.microvm.version import VERSION

_log = logging.getLogger(__name__)

MAX_LINE_BYTES: Final = 10 << 20
_MAX_UNREAD_BYTES: Final = 1 << 20
_GREETING: Final = {"QMP": {"version": VERSION, "capabilities": []}}
_NEGOTIATE: Final = "qmp_capabilities"


class QmpServer:
    """Serves the QMP socket of one machine."""

    def __init__(self, machine: Machine, path: Path) -> None:
        self._path = path
        self._quit = asyncio.Event()
        self._clients: dict[asyncio.Task[None], _Client] = {}
        self._commands = Commands(machine, self.quit)
        machine.listeners.append(self._broadcast)

    def quit(self) -> None:
        """Let :meth:`serve` return."""
        self._quit.set()

    async def serve(self) -> None:
        """Serve until told to quit; afterwards the socket's file is gone and all clients are disconnected."""
        # Whoever may connect owns the machine, so nobody but this user may.
        mask = os.umask(0o077)
        try:
            server = await asyncio.start_unix_server(self._serve_client, self._path, limit=MAX_LINE_BYTES)
        except OSError as error:
            message = f"cannot listen at {self._path}: {error.strerror or error}"
            raise ConfigError(message, field="qmp") from error
        finally:
            os.umask(mask)
        try:
            await self._quit.wait()
        finally:
            server.close()
            self._path.unlink(missing_ok=True)
            await self._commands.migration.close()
            for task in self._clients:
                task.cancel()
            if self._clients:
                await asyncio.wait(self._clients)

    async def _serve_client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._clients[task] = client = _Client(writer, self._commands)
        try:
            await client.serve(reader)
        except (OSError, ValueError) as error:
            _log.info("a QMP client is disconnected: %s", error)
        except asyncio.CancelledError:
            # The process is ending; a task of asyncio's own server must not end as cancelled.
            _log.debug("a QMP client is disconnected: the machine ends")
        finally:
            del self._clients[task]
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    def _broadcast(self, event: str, data: Mapping[str, Any] | None) -> None:
        seconds, microseconds = divmod(time.time_ns() // 1000, 1_000_000)
        message: dict[str, Any] = {
            "timestamp": {"seconds": seconds, "microseconds": microseconds},
            "event": event,
        }
        if data is not None:
            message["data"] = dict(data)
        for client in self._clients.values():
            client.notify(message)


class _Client:
    """One connection."""

    def __init__(self, writer: asyncio.StreamWriter, commands: Commands) -> None:
        self._writer = writer
        self._commands = commands
        self._negotiated = False

    async def serve(self, reader: asyncio.StreamReader) -> None:
        """Answer lines until the client hangs up; ValueError when a line is too long."""
        self._send(_GREETING)
        while line := await reader.readline():
            if line.strip():
                self._send(await self._answer(line))
                await self._writer.drain()

    def notify(self, event: dict[str, Any]) -> None:
        """Send an event to a client that has negotiated."""
        if not self._negotiated:
            return
        if self._writer.transport.get_write_buffer_size() > _MAX_UNREAD_BYTES:
            self._writer.transport.abort()
            return
        self._send(event)

    def _send(self, message: Mapping[str, Any]) -> None:
        self._writer.write(json.dumps(message).encode() + b"\r\n")

    async def _answer(self, line: bytes) -> dict[str, Any]:
        identity: dict[str, Any] = {}
        try:
            request = _parse(line)
            identity = {key: request[key] for key in ("id",) if key in request}
            return {"return": await self._execute(request), **identity}
        except CommandError as error:
            return {"error": {"class": error.error_class, "desc": error.description}, **identity}

    async def _execute(self, request: dict[str, Any]) -> Any:
        if unknown := sorted(request.keys() - {"execute", "arguments", "id"}):
            raise CommandError(f"QMP input member '{unknown[0]}' is unexpected")
        name, arguments = request.get("execute"), request.get("arguments", {})
        if not isinstance(name, str):
            raise CommandError("QMP input lacks member 'execute'")
        if not isinstance(arguments, dict):
            raise CommandError("QMP input member 'arguments' must be an object")
        if self._negotiated:
            return await self._commands.execute(name, arguments)
        if name != _NEGOTIATE:
            raise CommandError(f"Expecting capabilities negotiation with '{_NEGOTIATE}'", "CommandNotFound")
        self._negotiated = True
        return {}


def _parse(line: bytes) -> dict[str, Any]:
    try:
        request = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CommandError("JSON parse error") from error
    if not isinstance(request, dict):
        raise CommandError("QMP input must be a JSON object")
    return request
