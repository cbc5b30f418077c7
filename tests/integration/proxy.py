"""A network between a source and a destination that can be slowed, silenced and cut, in user space.

Promise: bytes are passed on as they are and in order, or not at all; what the proxy does is decided by the test,
never by chance; nothing of it is left when it is closed. It cannot read what it carries, as the ends speak TLS, but
the hand-off's calls are told apart by their direction, order and size.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

_PIECE_BYTES = 64 * 1024
_BURST_S = 0.1
_CALL_BYTES = 200
"""A call about an attempt is larger, whatever else HTTP/2 says on a connection without lanes is smaller."""


@dataclass(eq=False)
class Link:
    """One connection through the proxy."""

    source: asyncio.StreamWriter
    destination: asyncio.StreamWriter
    up_bytes: int = 0
    down_bytes: int = 0
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    def reset(self) -> None:
        """Break it at both ends, as a router does that forgot it."""
        for writer in (self.source, self.destination):
            with contextlib.suppress(OSError):
                linger = struct.pack("ii", 1, 0)
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.transport.abort()


class Proxy:
    """Listens where a source is told the destination is."""

    def __init__(self, target: Callable[[], int]) -> None:
        self.port = 0
        self.links: list[Link] = []
        """Every connection there has been, oldest first; a migration's first one carries its calls."""
        self.open_links: set[Link] = set()
        self.up_bytes_per_s: float | None = None
        """How fast the source may send over all connections together; None: as fast as it goes."""
        self.cut = False
        """New connections are reset at once."""
        self.refused = 0
        """How many were."""
        self._target = target
        self._server: asyncio.Server | None = None
        self._up, self._down = asyncio.Event(), asyncio.Event()
        self._free_at = 0.0
        self._on_call: Callable[[], None] | None = None
        self._answered = False
        self._links_before = 0

    @property
    def address(self) -> str:
        """Where it listens."""
        return f"127.0.0.1:{self.port}"

    async def start(self) -> None:
        """Listen."""
        self.heal()
        self._server = await asyncio.start_server(self._carry, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        """Stop listening and break what is open."""
        assert self._server is not None
        self._server.close()
        tasks = [task for link in self.open_links for task in link.tasks]
        self.reset_all()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._server.wait_closed()

    def begin_migration(self) -> None:
        """The next new connection is the one with the calls of the next migration."""
        self._links_before = len(self.links)

    @property
    def calls(self) -> Link:
        """The connection with the calls of the migration since :meth:`begin_migration`."""
        return self.links[self._links_before]

    @property
    def lanes(self) -> list[Link]:
        """The open connections of the same migration that carry memory."""
        return [link for link in self.links[self._links_before + 1 :] if link in self.open_links]

    def silence(self, *, up: bool = True, down: bool = True) -> None:
        """Pass nothing on any more in a direction, and break nothing: a black hole."""
        for event, wanted in ((self._up, up), (self._down, down)):
            if wanted:
                event.clear()

    def let_go(self) -> None:
        """Pass on what was silenced, and what comes; unlike :meth:`heal`, nothing was lost and nothing is broken."""
        self.up_bytes_per_s = None
        self._free_at = 0.0
        self._on_call = None
        self._up.set()
        self._down.set()

    def heal(self) -> None:
        """Carry again; connections that were silenced are broken, as their ends will have noticed."""
        if not (self._up.is_set() and self._down.is_set()):
            self.reset_all()
        self.cut = False
        self.let_go()

    def reset_all(self) -> None:
        """Break every open connection."""
        for link in list(self.open_links):
            link.reset()

    def at_call_after_next_answer(self, then: Callable[[], None]) -> None:
        """Call ``then`` when the source makes the call that follows the next answer, before that call is passed on.

        While a destination holds back its answer to Seal, the call that follows is Go.
        """
        self._answered = False
        self._on_call = then

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if self.cut:
                self.refused += 1
                raise ConnectionRefusedError
            other_reader, other_writer = await asyncio.open_connection("127.0.0.1", self._target())
        except OSError:
            writer.transport.abort()
            return
        link = Link(writer, other_writer)
        self.links.append(link)
        self.open_links.add(link)
        link.tasks = [
            asyncio.create_task(self._pump(link, reader, other_writer, up=True)),
            asyncio.create_task(self._pump(link, other_reader, writer, up=False)),
        ]
        try:
            await asyncio.wait(link.tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            # A connection of gRPC has no use for one direction alone.
            for task in link.tasks:
                task.cancel()
            await asyncio.gather(*link.tasks, return_exceptions=True)
            for end in (writer, other_writer):
                end.transport.abort()
            self.open_links.discard(link)

    async def _pump(
        self, link: Link, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, up: bool
    ) -> None:
        passing = self._up if up else self._down
        with contextlib.suppress(OSError):
            while data := await reader.read(_PIECE_BYTES):
                if up:
                    await self._slow_down(len(data))
                self._note(link, len(data), up=up)
                await passing.wait()
                writer.write(data)
                await writer.drain()
                if up:
                    link.up_bytes += len(data)
                else:
                    link.down_bytes += len(data)

    async def _slow_down(self, length: int) -> None:
        rate, now = self.up_bytes_per_s, asyncio.get_running_loop().time()
        if rate is None:
            return
        # What a late wake-up cost is made up for.
        self._free_at = max(self._free_at, now - _BURST_S) + length / rate
        await asyncio.sleep(self._free_at - now)

    def _note(self, link: Link, length: int, *, up: bool) -> None:
        """Recognise the call that somebody waits for."""
        if self._on_call is None or link is not self.calls:
            return
        if not up:
            self._answered = self._answered or length >= _CALL_BYTES // 2
        elif self._answered and length >= _CALL_BYTES:
            then, self._on_call = self._on_call, None
            then()


@contextlib.asynccontextmanager
async def open_proxy(target: Callable[[], int]) -> AsyncIterator[Proxy]:
    """A proxy to whatever port ``target`` says when a connection is made; closed at the end."""
    proxy = Proxy(target)
    await proxy.start()
    try:
        yield proxy
    finally:
        await proxy.close()
