"""The network of the tests does to plain connections what its faults say: suites prove no less than they claim."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest

from tests.integration.faults import TRICKLE, Fault
from tests.integration.proxy import Proxy, open_proxy
from tests.integration.services import DEADLINE_S, eventually

RESET = b"reset"
SOON_S = 0.3
"""After which what has not come through is taken not to come."""


@dataclass
class Ends:
    """Both ends of one connection through the network."""

    source: asyncio.StreamReader
    to_destination: asyncio.StreamWriter
    destination: asyncio.StreamReader
    to_source: asyncio.StreamWriter

    async def assert_passes(self, up: bytes | None, down: bytes | None) -> None:
        """Of a word up and a word down this arrives: it, nothing (None), the end of all words (empty), or a reset."""
        for writer, word in ((self.to_destination, b"up"), (self.to_source, b"down")):
            with contextlib.suppress(OSError):
                writer.write(word)
                await writer.drain()
        assert await _heard(self.destination, up) == up
        assert await _heard(self.source, down) == down

    def close(self) -> None:
        """Break both ends."""
        for writer in (self.to_destination, self.to_source):
            writer.transport.abort()


async def _heard(reader: asyncio.StreamReader, expected: bytes | None) -> bytes | None:
    """What comes; what is expected is waited for longer than nothing is."""
    try:
        return await asyncio.wait_for(reader.read(100), SOON_S if expected is None else DEADLINE_S)
    except TimeoutError:
        return None
    except ConnectionResetError:
        return RESET


@dataclass
class Network:
    """A proxy, and a listener behind it."""

    proxy: Proxy
    accepted: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]]
    opened: list[Ends]

    async def connect(self) -> Ends:
        """Open a connection through it."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.proxy.port)
        try:
            other_reader, other_writer = await asyncio.wait_for(self.accepted.get(), DEADLINE_S)
        except TimeoutError:
            writer.transport.abort()
            raise
        ends = Ends(reader, writer, other_reader, other_writer)
        self.opened.append(ends)
        return ends


@pytest.fixture
async def network() -> AsyncIterator[Network]:
    """A network that nobody has hurt; everything is closed afterwards."""
    accepted: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted.put_nowait((reader, writer))

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    async with open_proxy(lambda: server.sockets[0].getsockname()[1]) as proxy:
        network = Network(proxy, accepted, [])
        try:
            yield network
        finally:
            for ends in network.opened:
                ends.close()
            server.close()
            await eventually(lambda: not proxy.open_links, "the network is empty")
    await server.wait_closed()


WHOLE = (b"up", b"down")
SUFFERED = {
    Fault.LOST_UP: (None, b"down"),
    Fault.LOST_DOWN: (b"up", None),
    Fault.LOST: (None, None),
    Fault.LATE_UP: (None, b"down"),
    Fault.LATE_DOWN: (b"up", None),
    Fault.BLIP: (RESET, RESET),
    Fault.CUT: (RESET, RESET),
    Fault.CLOSED_UP: (b"", b"down"),
    Fault.CLOSED_DOWN: (b"up", b""),
}


@pytest.mark.parametrize("fault", SUFFERED)
async def test_a_fault_does_what_it_says_and_is_gone_when_healed(network: Network, fault: Fault) -> None:
    """Each direction by itself, for connections that stand and for new ones; afterwards a connection is whole."""
    standing = await network.connect()
    await standing.assert_passes(*WHOLE)
    fault.strike(network.proxy)
    await standing.assert_passes(*SUFFERED[fault])
    if fault is Fault.CUT:
        reader, writer = await asyncio.open_connection("127.0.0.1", network.proxy.port)
        heard = await _heard(reader, RESET)
        writer.transport.abort()
        assert heard == RESET
    else:
        expected = SUFFERED[fault] if fault.lasts else WHOLE
        await (await network.connect()).assert_passes(*expected)
    fault.heal(network.proxy)
    await (await network.connect()).assert_passes(*WHOLE)


@pytest.mark.parametrize("fault", [Fault.LATE_UP, Fault.LATE_DOWN])
async def test_what_is_late_comes_in_the_end(network: Network, fault: Fault) -> None:
    """Nothing is lost of it, and the connection goes on."""
    ends = await network.connect()
    fault.strike(network.proxy)
    await ends.assert_passes(*SUFFERED[fault])
    fault.heal(network.proxy)
    late = ends.destination if fault is Fault.LATE_UP else ends.source
    assert await asyncio.wait_for(late.read(100), DEADLINE_S) in WHOLE
    await ends.assert_passes(*WHOLE)


@pytest.mark.parametrize("fault", [Fault.LOST_UP, Fault.LOST_DOWN, Fault.LOST, Fault.CLOSED_UP])
async def test_a_connection_that_lost_something_does_not_outlive_it(network: Network, fault: Fault) -> None:
    """Its ends would take what follows for what was lost."""
    ends = await network.connect()
    fault.strike(network.proxy)
    await ends.assert_passes(*SUFFERED[fault])
    fault.heal(network.proxy)
    for reader in (ends.source, ends.destination):
        assert await _heard(reader, RESET) in {RESET, b""}


@pytest.mark.parametrize("fault", [Fault.SLOW_UP, Fault.SLOW_DOWN])
async def test_a_trickle_is_as_fast_as_it_says_until_it_is_healed(network: Network, fault: Fault) -> None:
    """One direction is slow, the other is not, and what has not come yet comes at once when it is over."""
    ends = await network.connect()
    up = fault is Fault.SLOW_UP
    slow, to_slow = (ends.destination, ends.to_destination) if up else (ends.source, ends.to_source)
    fast, to_fast = (ends.source, ends.to_source) if up else (ends.destination, ends.to_destination)
    fault.strike(network.proxy)
    began = asyncio.get_running_loop().time()
    to_slow.write(bytes(100_000))
    to_fast.write(bytes(100_000))
    await asyncio.wait_for(fast.readexactly(100_000), DEADLINE_S)
    await asyncio.wait_for(slow.readexactly(int(TRICKLE)), DEADLINE_S)
    assert asyncio.get_running_loop().time() - began > 0.8
    fault.heal(network.proxy)
    await asyncio.wait_for(slow.readexactly(100_000 - int(TRICKLE)), DEADLINE_S)
