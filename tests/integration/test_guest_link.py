"""The link through a hypervisor that cannot say where a connection begins or ends, with a socket in QEMU's place.

The real thing is in ``qemu/test_qemu_events.py``; what a guest that misbehaves does to the link is tried here, where
the bytes and their order are the test's.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.web_request import BaseRequest

from source_svc.guest_link import GuestLink
from tests.integration.services import eventually

ASK = b"GET /%s HTTP/1.1\r\nHost: x\r\n\r\n"


@dataclass
class Hypervisor:
    """What listens like QEMU's character device: one client at a time, the next one when that has gone."""

    path: Path
    clients: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = field(
        default_factory=asyncio.Queue
    )
    opened: list[asyncio.StreamWriter] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    """The paths that the service was asked for."""

    async def serve(self, request: BaseRequest) -> web.Response:
        """The service: answers with what was asked."""
        body = await request.read()
        self.asked.append(request.path)
        answer = web.Response(body=request.path.encode() + b":" + body)
        answer.force_close()
        return answer

    async def accepted(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """The service's next connection."""
        async with asyncio.timeout(60):
            return await self.clients.get()

    async def put(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Keep a connection for the test."""
        self.opened.append(writer)
        await self.clients.put((reader, writer))


@pytest.fixture
async def hypervisor(tmp_path: Path) -> AsyncIterator[Hypervisor]:
    """One that is listening, with a link to it."""
    made = Hypervisor(tmp_path / "metadata.sock")
    server = await asyncio.start_unix_server(made.put, made.path, limit=1 << 20)
    service = web.Server(made.serve, access_log=None)
    link = GuestLink(made.path, service)
    try:
        yield made
    finally:
        await link.close()
        await service.shutdown(0)
        server.close()
        for writer in made.opened:
            writer.close()
            await writer.wait_closed()


async def answered(reader: asyncio.StreamReader, what: bytes) -> bytes:
    """What comes back until that has come."""
    async with asyncio.timeout(60):
        came = b""
        while what not in came:
            data = await reader.read(65536)
            assert data, "the link was closed"
            came += data
    assert b"connection: close" in came.lower()
    return came


async def test_requests_follow_one_another_on_one_link(hypervisor: Hypervisor) -> None:
    """Each is answered as if it had a connection of its own, also in pieces, with a body, or two at once."""
    reader, writer = await hypervisor.accepted()
    writer.write(ASK % b"one")
    await answered(reader, b"/one:")
    writer.write((ASK % b"two")[:9])
    await writer.drain()
    await asyncio.sleep(0)
    writer.write((ASK % b"two")[9:])
    await answered(reader, b"/two:")
    writer.write(
        b"POST /three HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
    )
    await answered(reader, b"/three:abc")
    assert hypervisor.asked == ["/one", "/two", "/three"]
    assert hypervisor.clients.empty()


async def test_nonsense_costs_the_link_nothing_but_a_new_one(hypervisor: Hypervisor) -> None:
    """What is no HTTP is answered or cut off, and the next guest is served."""
    reader, writer = await hypervisor.accepted()
    writer.write(b"\x16\x03\x01\x02\x00nonsense\r\n\r\n")
    async with asyncio.timeout(60):
        came = await reader.read(65536)
    assert not came or came.startswith(b"HTTP/1.")
    if not came:
        reader, writer = await hypervisor.accepted()
    writer.write(ASK % b"well")
    await answered(reader, b"/well:")


async def test_the_beginning_of_a_request_is_not_kept_for_the_next_asker(hypervisor: Hypervisor) -> None:
    """A guest that went away in the middle of what it asked does not spoil what is asked afterwards."""
    reader, writer = await hypervisor.accepted()
    writer.write(b"POST /never HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nabc")
    await writer.drain()

    async def asks_well() -> bool:
        writer.write(ASK % b"well")
        try:
            async with asyncio.timeout(1):
                return b"/well:" in await reader.read(65536)
        except TimeoutError:
            return False

    async with asyncio.timeout(60):
        while not await asks_well():
            pass
    assert "/never" not in hypervisor.asked


async def test_an_answer_that_nobody_takes_never_reaches_the_next_asker(hypervisor: Hypervisor) -> None:
    """As QEMU does not read while its guest has no connection: the service throws it away by connecting anew."""
    reader, writer = await hypervisor.accepted()
    reader._transport.pause_reading()  # type: ignore[attr-defined]  # as QEMU does
    writer.write(ASK % b"stale")
    await eventually(lambda: "/stale" in hypervisor.asked, "the service has answered")
    again, writer = await hypervisor.accepted()
    writer.write(ASK % b"fresh")
    assert b"stale" not in await answered(again, b"/fresh:")
