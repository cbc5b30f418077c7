"""Guests whose memory travels compressed arrive as they were, with fewer bytes; what a host cannot is not asked."""

from __future__ import annotations

import random

import pytest

from tests.integration.alterations import Altered, altered
from tests.integration.hosts import MIB, Guest, World, configured
from tests.integration.services import DEADLINE_S, Host, refusal
from vmferry.v1 import migration_pb2 as pb

pytestmark = pytest.mark.usefixtures("tidy")
__all__ = ["altered"]

MEMORY_MIB, FILLED_MIB = 48, 24


async def filled(world: World) -> Guest:
    """A guest in whose memory lie pages that compress well, beside some that do not."""
    guest = await world.run(
        memory_mib=MEMORY_MIB, program="writer", params={"dirty-mib-per-s": "1", "working-set-mib": "1"}
    )
    chance = random.Random(7)
    words = [chance.randbytes(64) for _ in range(500)]
    text = b"".join(chance.choice(words) for _ in range(MIB // 64))
    with world.a.directory.paths(guest.spec).ram.open("r+b") as ram:
        ram.seek((MEMORY_MIB - FILLED_MIB) * MIB)
        for number in range(FILLED_MIB):
            ram.write(chance.randbytes(MIB) if number % 8 == 0 else text)
    return guest


def ram_of(host: Host, guest: Guest) -> bytes:
    """What lies in the upper part of a guest's memory, which it does not write to."""
    return host.directory.paths(guest.spec).ram.read_bytes()[-FILLED_MIB * MIB :]


@pytest.mark.parametrize(
    ("compression", "at_most"), [("none", 2.0), ("lz4", 0.5), ("zstd", 0.5), ("auto", 1.2)]
)
async def test_memory_arrives_as_it_was(world: World, compression: str, at_most: float) -> None:
    """By every encoding: compared byte for byte while the guest is paused, and read by the test afterwards."""
    guest = await filled(world)
    before = ram_of(world.a, guest)
    migration = await world.assert_crosses(
        guest, world.a, world.b, compression=compression, verify=pb.VERIFY_MODE_BYTES
    )
    assert migration.options.compression == compression
    assert migration.verification.different_pages == 0
    assert migration.verification.compared_bytes == MEMORY_MIB * MIB
    assert ram_of(world.b, guest) == before
    assert migration.progress.sent_bytes > 2 * FILLED_MIB * MIB
    assert migration.progress.wire_bytes < at_most * migration.progress.sent_bytes
    if compression == "none":
        assert migration.progress.wire_bytes > migration.progress.sent_bytes


async def test_the_configuration_speaks_where_the_caller_is_silent(world: World) -> None:
    """And what a caller says goes before it."""
    guest = await filled(world)
    async with configured(world.a.source, compression="zstd"):
        migration = await world.assert_crosses(guest, world.a, world.b)
        assert migration.progress.wire_bytes < 0.7 * migration.progress.sent_bytes
    async with configured(world.b.source, compression="zstd"):
        migration = await world.assert_crosses(guest, world.b, world.a, compression="none")
        assert migration.progress.wire_bytes > migration.progress.sent_bytes


async def test_an_encoding_that_does_not_exist_is_refused(world: World) -> None:
    """By the name of the option, before anything is begun."""
    guest = await world.run()
    async with world.source(world.a) as stub:
        request = world.order(guest, world.a, world.b, compression="brotli")
        error = await refusal(stub.StartMigration(request, timeout=DEADLINE_S))
    assert (error.reason, error.field) == ("INVALID_ARGUMENT", "options.compression")


@pytest.mark.parametrize(
    ("wish", "blocked"), [("zstd", True), ("lz4", True), ("auto", False), ("none", False)]
)
async def test_a_destination_that_speaks_none_gets_raw_pages_or_nothing(
    world: World, altered: Altered, wish: str, *, blocked: bool
) -> None:
    """What is insisted on and cannot be had is refused, never replaced; what is left to choose is chosen."""
    guest = await world.run()
    altered.change = lambda answer: answer.offer.encodings.__setitem__(slice(None), ["none"])
    request = pb.PlanMigrationRequest(
        machine=guest.id,
        destination=pb.Destination(host=world.b.identity.uri, address=altered.address),
        options=pb.MigrationOptions(compression=wish),
        without_prediction=True,
    )
    async with world.source(world.a) as stub:
        report = (await stub.PlanMigration(request, timeout=DEADLINE_S)).report
    found = {item.id: item.message for item in report.items if item.id.startswith("encoding.")}
    assert report.compatible is not blocked
    assert list(found) == ["encoding.unavailable" if blocked else "encoding.chosen"]
    assert "zstd" not in found.get("encoding.chosen", "")
