"""A plan for a Linux guest in QEMU says how long it would take, and what then happens is like it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.hosts import MIB, World
from tests.integration.qemu.conftest import boot, linux_spec
from tests.integration.services import DEADLINE_S, open_trackers
from vmferry.v1 import migration_pb2 as pb

pytestmark = pytest.mark.usefixtures("tidy")


async def test_a_plan_predicts_a_linux_guest(world: World, images: Path) -> None:
    """The guest is looked at through an injection and goes on unharmed; then it crosses as predicted."""
    guest = await boot(world, linux_spec(images, writes=1))
    request = pb.PlanMigrationRequest(
        machine=guest.id,
        destination=pb.Destination(host=world.b.identity.uri, address=world.b.dest.address),
    )
    async with world.source(world.a) as stub:
        report = (await stub.PlanMigration(request, timeout=DEADLINE_S)).report
    assert report.HasField("prediction"), report
    predicted = report.prediction
    assert predicted.converges
    assert predicted.dirty_bytes_per_second > 0
    assert MIB < predicted.resident_bytes <= guest.spec.memory_mib * MIB
    assert open_trackers(world.a.source.pid) == []
    await guest.assert_clean(world.a)

    migration = await world.assert_crosses(guest, world.a, world.b)

    assert migration.prediction == predicted
    total_s, expected_s = (time.ToNanoseconds() / 1e9 for time in (migration.total, predicted.total.expected))
    assert expected_s / 3 - 5 <= total_s <= expected_s * 3 + 5
