"""A Linux guest in QEMU crosses between two hosts: there and back, with one and more processors, busy and idle."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.hosts import World
from tests.integration.qemu.conftest import boot, linux_spec
from tests.integration.services import descriptors

pytestmark = pytest.mark.usefixtures("qemu_tidy")


@pytest.mark.parametrize("vcpus", [1, 2, 4])
async def test_a_linux_guest_goes_there_and_back(qemu_world: World, images: Path, vcpus: int) -> None:
    """Six crossings with a busy guest: it counts on, its files stay what they were, nothing is left in its process."""
    guest = await boot(qemu_world, linux_spec(images, vcpus=vcpus, writes=4))
    here, there = qemu_world.a, qemu_world.b
    for _ in range(6 if vcpus == 2 else 2):
        migration = await qemu_world.assert_crosses(guest, here, there)
        print(vcpus, migration.downtime.ToMicroseconds() / 1e3, migration.total.ToMicroseconds() / 1e3, migration.progress.round, migration.progress.wire_bytes)
        assert migration.tracker == "pagemap-scan"
        here, there = there, here
        assert not [what for what in descriptors(here.machine_pid(guest.id)) if "userfaultfd" in what]
