"""A Linux guest crosses whatever its memory and its devices are."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.hugepages import huge_folder
from tests.integration.hosts import MIB, World, open_world
from tests.integration.proxy import Proxy
from tests.integration.qemu.conftest import boot, linux_spec
from tests.integration.services import DEADLINE_S, eventually, open_trackers
from vmferry.cli.machine import end_machine, run_machine
from vmferry.errors import InsufficientMemoryError
from vmferry.machines.spec import MachineSpec
from vmferry.memory.hugepages import available_bytes, path_page_bytes
from vmferry.v1 import migration_pb2 as pb

pytestmark = [pytest.mark.usefixtures("tidy"), pytest.mark.timeout(300)]

GUEST_MIB = 128
SLOW = 8 * MIB
COMPARED: dict[str, Any] = {"verify": pb.VERIFY_MODE_BYTES, "downtime_limit": 10.0}


@pytest.fixture(scope="module")
def huge() -> Iterator[Path]:
    """Room for one guest on each of two hosts."""
    with huge_folder(2 * GUEST_MIB + 32) as folder:
        yield folder


@pytest.fixture(scope="module")
def room(huge: Path) -> int:
    """What is free there before any guest; later, whatever just ended may not have given everything back yet."""
    return available_bytes(huge)


@pytest.fixture(scope="module")
async def world(images: Path, huge: Path, room: int) -> AsyncIterator[World]:
    """Hosts a and b, which have huge pages too."""
    async with open_world(image_roots=(images,), downtime_limit_ms=1000, huge_dir=huge) as opened:
        yield opened


def qemu_spec(images: Path, writes: int = 4, files: int = 8, **part: Any) -> MachineSpec:
    """The self-checking guest, with some values changed."""
    spec = linux_spec(images, writes=writes, files=files, memory_mib=GUEST_MIB)
    assert spec.qemu is not None
    return replace(spec, qemu=replace(spec.qemu, **part))


async def huge_pages_free(huge: Path, wanted: int) -> None:
    """Wait until exactly so many bytes in huge pages are free: none are left behind, and none are missing."""
    seen: list[int] = []

    def as_wanted() -> bool:
        seen[:] = [available_bytes(huge)]
        return seen == [wanted]

    try:
        await eventually(as_wanted, "huge pages are free again")
    finally:
        assert seen == [wanted], "bytes that are free, and those that ought to be"


@pytest.mark.parametrize("backing", ["hugetlbfs", "memfd"])
async def test_a_guest_crosses_with_every_kind_of_memory(world: World, images: Path, backing: str) -> None:
    """There and back while it writes, compared byte for byte and by the trackers; nothing is left at either host."""
    guest = await boot(world, qemu_spec(images, memory_backing=backing))
    here, there = world.a, world.b
    for options in (COMPARED, {}, COMPARED | {"tracker": "hash"}):
        migration = await world.assert_crosses(guest, here, there, **options)
        here, there = there, here
        record = here.record(guest.id)
        assert migration.tracker == options.get("tracker", "pagemap-scan")
        assert record.paths.ram.exists() == (backing == "hugetlbfs")
        if options is COMPARED:
            assert migration.verification.compared_bytes == GUEST_MIB * MIB
    await end_machine(guest.id, here.config)
    assert here.holdings() == there.holdings() == []


async def test_huge_pages_that_are_not_there_are_refused(
    world: World, images: Path, huge: Path, room: int
) -> None:
    """Before a start, by what is missing; and a destination that was emptied meanwhile gives everything back."""
    await huge_pages_free(huge, room)
    guest = await boot(world, qemu_spec(images, memory_backing="hugetlbfs"))
    assert path_page_bytes(world.a.record(guest.id).paths.ram) > 0
    await huge_pages_free(huge, room - GUEST_MIB * MIB)
    other = replace(
        qemu_spec(images, memory_backing="hugetlbfs"), memory_mib=room // MIB, name=f"{guest.spec.name}-other"
    )
    with pytest.raises(InsufficientMemoryError, match="huge pages"):
        await run_machine(other, world.a.config)
    assert world.a.holdings(other) == []

    taken = world.b.config.huge_dir / "taken"
    taken.parent.mkdir(exist_ok=True)
    with taken.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, available_bytes(huge) - 16 * MIB)
    try:
        migration = await world.migrate(guest, world.a, world.b)
        assert migration.outcome == pb.MIGRATION_OUTCOME_FAILED
        assert "INSUFFICIENT_MEMORY" in migration.reason.reason or "memory" in migration.reason.message
    finally:
        taken.unlink()
    await world.assert_stays(guest, world.a, world.b)
    await world.assert_crosses(guest, world.a, world.b)


@pytest.mark.parametrize("backing", ["hugetlbfs", "memfd"])
async def test_a_crossing_that_is_cancelled_leaves_no_memory(
    world: World, images: Path, huge: Path, room: int, link: Proxy, backing: str
) -> None:
    """The waiting copy goes with all it took, nothing is tracked any more, and the next crossing completes."""
    await huge_pages_free(huge, room)
    guest = await boot(world, qemu_spec(images, memory_backing=backing))
    held = GUEST_MIB * MIB if backing == "hugetlbfs" else 0
    link.up_bytes_per_s = SLOW
    migration_id = await world.start(guest, world.a, world.b, address=link.address)
    await world.enters(world.a, migration_id, pb.MIGRATION_PHASE_PRECOPYING)
    await eventually(lambda: open_trackers(world.a.source.pid), "writes are tracked")
    async with world.source(world.a) as stub:
        await stub.CancelMigration(pb.CancelMigrationRequest(id=migration_id), timeout=DEADLINE_S)
    assert (await world.ended(world.a, migration_id)).outcome == pb.MIGRATION_OUTCOME_CANCELLED
    await world.assert_stays(guest, world.a, world.b)
    await huge_pages_free(huge, room - held)
    link.up_bytes_per_s = None
    await world.assert_crosses(guest, world.a, world.b)
    await end_machine(guest.id, world.b.config)
    await huge_pages_free(huge, room)


async def test_private_memory_travels_in_the_stream(world: World, images: Path) -> None:
    """A machine whose memory cannot be read from outside goes there and back in its hypervisor's own stream."""
    guest = await boot(world, qemu_spec(images, memory_backing="anonymous", accelerator="tcg"))
    refused = await world.migrate(guest, world.a, world.b, path="direct")
    assert refused.reason.reason == "INCOMPATIBLE"
    assert "path.unavailable" in refused.reason.message
    for here, there in ((world.a, world.b), (world.b, world.a)):
        migration = await world.assert_crosses(guest, here, there)
        assert migration.path == "stream"
        assert "not shared memory" in migration.path_reason
