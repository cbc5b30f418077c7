"""How crossings of Linux guests are slowed down, damaged on their way, and planned."""

from __future__ import annotations

import os

from tests.integration.hosts import MIB, World
from tests.integration.qemu.conftest import LinuxGuest
from tests.integration.services import DEADLINE_S
from vmferry.memory.runs import PAGE_SIZE
from vmferry.v1 import compatibility_pb2
from vmferry.v1 import migration_pb2 as pb

SLOW = 8 * MIB


def damage(here: int, there: int, wanted: int = 64) -> int:
    """Flip a bit in so many pages that arrived, more than a guest will rewrite; 0 if not so many are there yet."""
    pages = []
    for number in range(0, os.fstat(here).st_size // PAGE_SIZE, 16):
        mine, theirs = (os.pread(file, PAGE_SIZE, number * PAGE_SIZE) for file in (here, there))
        if mine == theirs and any(mine):
            pages.append(number)
    if len(pages) < wanted:
        return 0
    for number in pages[:wanted]:
        (byte,) = os.pread(there, 1, number * PAGE_SIZE)
        os.pwrite(there, bytes([byte ^ 1]), number * PAGE_SIZE)
    return wanted


async def plan(world: World, guest: LinuxGuest) -> dict[str, compatibility_pb2.CompatibilityItem]:
    """What stands in the way of moving a guest from a to b, by id."""
    request = pb.PlanMigrationRequest(
        machine=guest.id,
        destination=pb.Destination(host=world.b.identity.uri, address=world.b.dest.address),
    )
    async with world.source(world.a) as stub:
        report = (await stub.PlanMigration(request, timeout=DEADLINE_S)).report
    blocking = [item for item in report.items if item.severity == compatibility_pb2.SEVERITY_BLOCKS]
    assert report.compatible == (not blocking)
    assert all(item.message and item.object and item.remedy for item in blocking)
    return {item.id: item for item in blocking}
