"""Machines whose memory lies in huge pages of a tmpfs, which the kernel maps as wholes, cross like all others."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.hugepages import huge_tmpfs, mapped_whole_bytes
from tests.integration.hosts import World, open_world
from tests.support import require
from vmferry.memory.hugepages import HUGE_PAGE_BYTES
from vmferry.v1 import migration_pb2 as pb

pytestmark = pytest.mark.usefixtures("tidy")


@pytest.fixture(scope="module")
async def world() -> AsyncIterator[World]:
    """Hosts a and b, on a tmpfs that has huge pages."""
    with huge_tmpfs() as folder:
        async with open_world(memory=folder) as opened:
            yield opened


async def test_a_busy_guest_in_huge_pages_goes_there_and_back(world: World) -> None:
    """It writes all the time, all its bytes are compared, and at each end its memory is mapped in huge pages."""
    dirtying = {"resident-mib": "4", "dirty-mib-per-s": "20", "working-set-mib": "4"}
    guest = await world.run(params=dirtying)
    here, there = world.a, world.b
    for _ in range(4):
        whole = mapped_whole_bytes(here.record(guest.id).pid or 0)
        require(whole >= HUGE_PAGE_BYTES, f"the kernel maps only {whole} bytes of a tmpfs in huge pages")
        await world.assert_crosses(guest, here, there, verify=pb.VERIFY_MODE_BYTES)
        here, there = there, here
