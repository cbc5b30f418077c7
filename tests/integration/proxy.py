"""A network between a source and a destination that can be slowed, silenced and cut, in user space.

Promise: bytes are passed on as they are and in order, or not at all; what the proxy does is decided by the test,
never by chance; nothing of it is left when it is closed. It cannot read what it carries, as the ends speak TLS, but
the hand-off's calls are told apart by their direction, order and size.

What a direction suffers holds for all connections, also for those that are made later, until it is healed.
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
_LANE_BYTES = 100_000
"""The calls of a migration are less, a chunk of memory is more."""


@dataclass(eq=False)
class Link:
    """One connection through the proxy."""

    source: asyncio.StreamWriter
    destination: asyncio.StreamWriter
    up_bytes: int = 0
    down_bytes: int = 0
    tasks: list[asyncio.Task[None]] = field(default_factory=list)
    ended: int = 0
    """In how many directions nothing more will come."""
    both_ended: asyncio.Event = field(default_factory=asyncio.Event)
    half_closed: bool = False

    def reset(self) -> None:
        """Break it at both ends, as a router does that forgot it."""
        for writer in (self.source, self.destination):
            _reset(writer)

    def half_close(self, *, up: bool) -> None:
        """Tell one end that the other one has nothing more to say."""
        self.half_closed = True
        with contextlib.suppress(OSError):
            (self.destination if up else self.source).write_eof()


@dataclass
class _Direction:
    """What the bytes of one direction meet, on all connections together."""

    bytes_per_s: float | None = None
    passing: asyncio.Event = field(default_factory=asyncio.Event)
    lost: bool = False
    """Bytes vanish."""
    ended: bool = False
    """They vanish, and the end they were meant for was told that none will come."""
    _free_at: float = 0.0

    @property
    def broken(self) -> bool:
        """A connection that lived through it has lost something, or will."""
        return self.lost or not self.passing.is_set()

    def let_go(self) -> None:
        """Pass everything on, at once."""
        self.bytes_per_s = None
        self.lost = self.ended = False
        self._free_at = 0.0
        self.passing.set()

    def step(self, length: int) -> int:
        """How much of so many bytes goes at a time; slow ones in pieces, so that they notice when that is over."""
        return length if self.bytes_per_s is None else min(length, max(1, int(self.bytes_per_s * _BURST_S)))

    async def slow_down(self, length: int) -> None:
        """Wait until it is these bytes' turn."""
        rate, now = self.bytes_per_s, asyncio.get_running_loop().time()
        if rate is None:
            return
        # What a late wake-up cost is made up for.
        self._free_at = max(self._free_at, now - _BURST_S) + length / rate
        await asyncio.sleep(self._free_at - now)


class Proxy:
    """Listens where a source is told the destination is."""

    def __init__(self, target: Callable[[], int]) -> None:
        self.port = 0
        self.links: list[Link] = []
        """Every connection there has been, oldest first; a migration's first one carries its calls."""
        self.open_links: set[Link] = set()
        self.cut = False
        """New connections are reset at once."""
        self.refused = 0
        """How many were."""
        self._target = target
        self._server: asyncio.Server | None = None
        self._up, self._down = _Direction(), _Direction()
        self._on_call: Callable[[], None] | None = None
        self._answered = False
        self._watched: Link | None = None
        self._links_before = 0

    @property
    def address(self) -> str:
        """Where it listens."""
        return f"127.0.0.1:{self.port}"

    @property
    def up_bytes_per_s(self) -> float | None:
        """How fast the source may send over all connections together; None: as fast as it goes."""
        return self._up.bytes_per_s

    @up_bytes_per_s.setter
    def up_bytes_per_s(self, rate: float | None) -> None:
        self._up.bytes_per_s = rate

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
    def lanes(self) -> list[Link]:
        """The open connections of the same migration that carry memory."""
        return [link for link in self.links[self._links_before + 1 :] if link in self.open_links]

    def silence(self, *, up: bool = True, down: bool = True) -> None:
        """Pass nothing on any more in a direction, and break nothing: what is sent waits, and may come late."""
        for direction in self._chosen(up=up, down=down):
            direction.passing.clear()

    def lose(self, *, up: bool = True, down: bool = True) -> None:
        """Let everything vanish that is sent in a direction, and break nothing: a black hole."""
        for direction in self._chosen(up=up, down=down):
            direction.lost = True

    def half_close(self, *, up: bool = True, down: bool = True) -> None:
        """Tell the receiving end of a direction that nothing more will come; what is sent all the same vanishes."""
        for direction in self._chosen(up=up, down=down):
            direction.lost = direction.ended = True
        for link in self.open_links:
            self._end_directions(link)

    def throttle(self, bytes_per_s: float, *, up: bool = True, down: bool = True) -> None:
        """Pass on so much a second in a direction, over all connections together."""
        for direction in self._chosen(up=up, down=down):
            direction.bytes_per_s = bytes_per_s

    def cut_off(self) -> None:
        """Reset every connection, and each new one at once."""
        self.cut = True
        self.reset_all()

    def let_go(self) -> None:
        """Pass on what was silenced, and what comes; unlike :meth:`heal`, nothing is broken."""
        self._on_call = None
        for direction in (self._up, self._down):
            direction.let_go()

    def heal(self) -> None:
        """Carry again; connections that lost something, or were silenced, are broken, as their ends will notice."""
        if self._up.broken or self._down.broken:
            self.reset_all()
        self.cut = False
        self.let_go()

    def reset_all(self) -> None:
        """Break every open connection."""
        for link in list(self.open_links):
            link.reset()

    def at_call_after_next_answer(self, then: Callable[[], None]) -> None:
        """Call ``then`` when the source makes the call that follows the next answer, before that call is passed on.

        While a destination holds back its answer to Seal, the call that follows is Go. Memory has gone over the lanes
        by then, and somebody else may have connected meanwhile, such as a source that has something left to say about
        an earlier migration: the connection with the calls is the one that was answered most without carrying memory.
        """
        small = [link for link in self.links[self._links_before :] if link.up_bytes < _LANE_BYTES]
        self._watched = max(small, key=lambda link: link.down_bytes)
        self._answered = False
        self._on_call = then

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if self.cut:
                self.refused += 1
                raise ConnectionRefusedError
            other_reader, other_writer = await asyncio.open_connection("127.0.0.1", self._target())
        except OSError:
            _reset(writer)
            return
        link = Link(writer, other_writer)
        self.links.append(link)
        self.open_links.add(link)
        self._end_directions(link)
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
        with contextlib.suppress(OSError):
            while data := await reader.read(_PIECE_BYTES):
                await self._pass_on(link, data, writer, up=up)
            await self._last_words(link, writer)

    async def _pass_on(self, link: Link, data: bytes, writer: asyncio.StreamWriter, *, up: bool) -> None:
        direction, at = self._up if up else self._down, 0
        while at < len(data):
            piece = data[at : at + direction.step(len(data) - at)]
            await direction.slow_down(len(piece))
            if not at:
                self._note(link, len(data), up=up)
            at += len(piece)
            await direction.passing.wait()
            if direction.lost:
                continue
            writer.write(piece)
            await writer.drain()
            if up:
                link.up_bytes += len(piece)
            else:
                link.down_bytes += len(piece)

    async def _last_words(self, link: Link, writer: asyncio.StreamWriter) -> None:
        """One end has said all; if the connection is half closed by the network, the other one may still speak."""
        link.ended += 1
        if link.ended == len(link.tasks):
            link.both_ended.set()
        if link.half_closed:
            writer.write_eof()
            await link.both_ended.wait()

    def _chosen(self, *, up: bool, down: bool) -> list[_Direction]:
        return [direction for direction, wanted in ((self._up, up), (self._down, down)) if wanted]

    def _end_directions(self, link: Link) -> None:
        for direction, up in ((self._up, True), (self._down, False)):
            if direction.ended:
                link.half_close(up=up)

    def _note(self, link: Link, length: int, *, up: bool) -> None:
        """Recognise the call that somebody waits for."""
        if self._on_call is None or link is not self._watched:
            return
        if not up:
            self._answered = self._answered or length >= _CALL_BYTES // 2
        elif self._answered and length >= _CALL_BYTES:
            then, self._on_call = self._on_call, None
            then()


def _reset(writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        linger = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.transport.abort()


@contextlib.asynccontextmanager
async def open_proxy(target: Callable[[], int]) -> AsyncIterator[Proxy]:
    """A proxy to whatever port ``target`` says when a connection is made; closed at the end."""
    proxy = Proxy(target)
    await proxy.start()
    try:
        yield proxy
    finally:
        await proxy.close()
