"""The guest agent of a QEMU machine: three questions about its clock, asked over a socket of the host's.

Promise: a guest is never trusted and never waited for longer than the caller allows. What it says is read up to a
limit, must be an answer to what was asked, and is a number within bounds or an error; no words of it are repeated to
anybody. Every use begins with ``guest-sync-delimited``, so that what an earlier caller left unread is thrown away.

Of the clients that exist, the one of qemu.qmp cannot read the byte 0xFF that ends what is to be thrown away, queues
whatever comes without a question, and takes lines of up to 10 MiB; libvirt's is a daemon. Hence this one.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from vmferry.errors import MachineFailedError

_MAX_LINE_BYTES: Final = 4096
_MAX_UNREAD_BYTES: Final = 1 << 20
"""What may lie unread from before; a guest that sends more does not speak to anybody."""
_SENTINEL: Final = b"\xff"
_MAX_TIME_NS: Final = (1 << 63) - 1


class AgentError(MachineFailedError):
    """The agent did not do what it was asked for."""


class AgentRefusedError(AgentError):
    """It understood the question, and said that it cannot."""


@dataclass(frozen=True)
class Reading:
    """The guest's time of day, read somewhere between two instants of the host's."""

    guest_ns: int
    asked_ns: int
    answered_ns: int

    @property
    def least_ns(self) -> int:
        """How much less than the host's it was at least; negative: how much it was behind, at most."""
        return self.guest_ns - self.answered_ns

    @property
    def most_ns(self) -> int:
        """Guest minus host, at most."""
        return self.guest_ns - self.asked_ns

    @property
    def took_ns(self) -> int:
        """How long the question took."""
        return self.answered_ns - self.asked_ns

    @property
    def offset_us(self) -> int:
        """Guest minus host, in the middle of what is possible."""
        return round((self.least_ns + self.most_ns) / 2000)


class Agent:
    """A conversation with an agent; the caller limits its time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def synchronise(self) -> None:
        """Throw away what was left unread, and find out that somebody answers."""
        number = secrets.randbelow(1 << 31)
        # The byte makes the agent forget half a question that an earlier caller may have left.
        self._writer.write(_SENTINEL)
        await self._send("guest-sync-delimited", {"id": number})
        unread = 0
        while True:
            unread += await self._skip_to_sentinel(_MAX_UNREAD_BYTES - unread)
            with contextlib.suppress(AgentError):
                if await self._answer() == number:
                    return

    async def read_clock(self) -> Reading:
        """What its clock says."""
        asked_ns = time.time_ns()
        await self._send("guest-get-time")
        found = await self._answer()
        answered_ns = time.time_ns()
        if type(found) is not int or not 0 < found <= _MAX_TIME_NS:
            raise AgentError("the guest's agent gave a time without sense")
        return Reading(found, asked_ns, answered_ns)

    async def set_clock(self, lead_ns: int) -> None:
        """Give it the time that this host will have in a moment, when the agent has come to it.

        Raises:
            AgentRefusedError: it says that something failed; the clock may be set nevertheless.
        """
        await self._send("guest-set-time", {"time": time.time_ns() + lead_ns})
        await self._answer()

    async def _send(self, command: str, arguments: Mapping[str, Any] | None = None) -> None:
        message = {"execute": command} | ({"arguments": arguments} if arguments else {})
        try:
            self._writer.write(json.dumps(message).encode() + b"\n")
            await self._writer.drain()
        except OSError as error:
            raise AgentError("the guest's channel was closed") from error

    async def _skip_to_sentinel(self, limit: int) -> int:
        """Read until behind the byte that no JSON has; how much that was."""
        skipped = 0
        while skipped < limit:
            data = await self._read_until(_SENTINEL)
            skipped += len(data)
            if data.endswith(_SENTINEL):
                return skipped
        raise AgentError("the guest's agent sends without end, and no answer")

    async def _answer(self) -> Any:
        line = await self._read_until(b"\n")
        if not line.endswith(b"\n"):
            raise AgentError("the guest's agent sends lines that are too long")
        try:
            message = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise AgentError("the guest's agent answers with what is no JSON") from error
        if not isinstance(message, dict) or ("return" in message) == ("error" in message):
            raise AgentError("the guest's agent gave an answer without sense")
        if "error" in message:
            raise AgentRefusedError("the guest's agent refused")
        return message["return"]

    async def _read_until(self, end: bytes) -> bytes:
        """What comes up to an end, or as much as a line may have."""
        try:
            return await self._reader.readuntil(end)
        except asyncio.LimitOverrunError:
            return await self._reader.readexactly(_MAX_LINE_BYTES)
        except (asyncio.IncompleteReadError, OSError) as error:
            raise AgentError("the guest's channel was closed") from error


@contextlib.asynccontextmanager
async def conversation(path: Path) -> AsyncIterator[Agent]:
    """Speak to the agent behind a socket, which serves one caller at a time; it is free again afterwards.

    Raises:
        AgentError: nothing listens there.
    """
    try:
        reader, writer = await asyncio.open_unix_connection(path, limit=_MAX_LINE_BYTES)
    except OSError as error:
        raise AgentError("the socket of the guest's channel cannot be reached") from error
    try:
        yield Agent(reader, writer)
    finally:
        writer.transport.abort()
