"""A Linux guest in QEMU whose memory travels compressed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.hosts import MIB, World
from tests.integration.qemu.conftest import boot, linux_spec, ticker_in_stream
from tests.integration.releases import as_before, as_now, before
from vmferry.v1 import migration_pb2 as pb

__all__ = ["before"]

pytestmark = [pytest.mark.usefixtures("tidy"), pytest.mark.timeout(240)]


async def test_a_linux_guest_crosses_compressed(world: World, images: Path) -> None:
    """Compared byte for byte while it is paused, with far fewer bytes on the wire, and back raw."""
    guest = await boot(world, linux_spec(images))
    there = await world.assert_crosses(
        guest, world.a, world.b, compression="zstd", verify=pb.VERIFY_MODE_BYTES
    )
    assert there.verification.different_pages == 0
    assert there.progress.wire_bytes < there.progress.sent_bytes * 0.7
    back = await world.assert_crosses(guest, world.b, world.a, compression="none")
    assert back.progress.wire_bytes > back.progress.sent_bytes


async def test_a_stream_travels_compressed(world: World, images: Path) -> None:
    """Whole, with far fewer bytes on the wire than the hypervisor wrote; and as it is where that is asked for."""
    guest, here, there = await boot(world, linux_spec(images)), world.a, world.b
    for compression, at_least, at_most in (("zstd", 0, 0.7), ("lz4", 0, 0.7), ("none", 1.0, 1.01)):
        found = await world.assert_crosses(
            guest, here, there, compression=compression, path="stream", downtime_limit=30.0
        )
        assert found.path == "stream"
        assert found.progress.sent_bytes > 20 * MIB
        assert at_least <= found.progress.wire_bytes / found.progress.sent_bytes < at_most
        here, there = there, here


async def test_an_older_destination_takes_the_stream_as_it_is(
    world: World, images: Path, before: Path
) -> None:
    """Its pieces travel raw, what is insisted on is refused by name, and its own stream is taken in here."""
    guest = await boot(world, ticker_in_stream(images, "tcg"))
    await as_before(before, world.b.source, world.b.dest)
    try:
        stream = {"path": "stream", "downtime_limit": 30.0}
        refused = await world.migrate(guest, world.a, world.b, compression="zstd", **stream)
        assert refused.outcome == pb.MIGRATION_OUTCOME_FAILED
        assert "a hypervisor's stream is to travel as zstd" in refused.reason.message
        for here, there in ((world.a, world.b), (world.b, world.a)):
            found = await world.migrate(guest, here, there, **stream)
            assert found.outcome == pb.MIGRATION_OUTCOME_COMPLETED, found.reason
            assert found.path == "stream"
            assert found.progress.wire_bytes > 100_000  # markers of zero pages: compressed, a fifth of it
            await guest.assert_clean(there)
    finally:  # the hosts are those of other modules, too
        await as_now(world.b.source, world.b.dest)
