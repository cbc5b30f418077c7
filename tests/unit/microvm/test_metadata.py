"""The micro-VM's device that leads to the metadata service."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.integration.services import eventually
from vmferry.errors import DeviceStateError
from vmferry.machines.microvm.metadata import PORT_METADATA, PORT_METADATA_STATUS, Metadata
from vmferry.machines.microvm.ports import PortBus


def device(tmp_path: Path) -> tuple[PortBus, Metadata]:
    """One, and the bus it is on."""
    bus = PortBus()
    return bus, Metadata(bus, tmp_path / "metadata.sock")


def came(bus: PortBus) -> bytes:
    """What the guest reads until nothing waits."""
    found = bytearray()
    while bus.read(PORT_METADATA_STATUS, 1):
        found.append(bus.read(PORT_METADATA, 1))
    return bytes(found)


async def test_bytes_go_both_ways_and_the_newest_service_counts(tmp_path: Path) -> None:
    """Nothing leaves before it is delivered; a service that comes anew gets what comes then."""
    bus, metadata = device(tmp_path)
    await metadata.listen()
    old, old_writer = await asyncio.open_unix_connection(tmp_path / "metadata.sock")
    reader, writer = await asyncio.open_unix_connection(tmp_path / "metadata.sock")
    try:
        assert await old.read() == b""
        for byte in b"ask":
            bus.write(PORT_METADATA, byte)
        bus.write(PORT_METADATA_STATUS, 0)
        assert await reader.readexactly(3) == b"ask"
        writer.write(b"told" + bytes(2 * Metadata.MOST_BYTES))
        await writer.drain()
        await eventually(lambda: len(metadata.save()) == Metadata.MOST_BYTES + 8, "all that fits has come")
        assert came(bus)[:4] == b"told"
        assert bus.read(PORT_METADATA, 1) == 0
    finally:
        for one in (old_writer, writer):
            one.close()
            await one.wait_closed()
        metadata.close()


async def test_what_waits_moves_with_the_machine(tmp_path: Path) -> None:
    """Undelivered bytes and unread ones; a state whose lengths do not fit is refused and changes nothing."""
    bus, metadata = device(tmp_path)
    bus.write(PORT_METADATA, ord("x"))
    metadata.prepare(b"\x02\0\0\0\x01\0\0\0abx")()
    state = metadata.save()
    other_bus, other = device(tmp_path)
    other.prepare(state)()
    assert other.save() == state
    assert came(other_bus) == b"ab"
    for wrong in (state[:-1], state + b"x", b"", b"\xff\xff\xff\xff" + state[4:]):
        with pytest.raises(DeviceStateError):
            other.prepare(wrong)
    assert came(bus) == b"ab"
