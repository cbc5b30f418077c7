"""A Linux guest in QEMU whose memory travels compressed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.hosts import World
from tests.integration.qemu.conftest import boot, linux_spec
from vmferry.v1 import migration_pb2 as pb

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


async def test_a_stream_cannot_be_compressed(world: World, images: Path) -> None:
    """A hypervisor's own stream is carried as it is, so insisting on an encoding of pages is refused by name."""
    guest = await boot(world, linux_spec(images))
    migration = await world.migrate(guest, world.a, world.b, compression="zstd", path="stream")
    assert migration.outcome == pb.MIGRATION_OUTCOME_FAILED
    assert "stream is carried as it is" in migration.reason.message
    await world.assert_crosses(guest, world.a, world.b, path="stream")
