"""Memory that is short: in the guest, and at the destination before and while it is taken."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.integration.hosts import MIB, World
from tests.integration.places import armed, halted
from tests.integration.qemu.conftest import boot, linux_spec, ticker_spec
from tests.integration.qemu.leftovers import left_in_process
from tests.integration.services import Host, eventually, open_trackers
from tests.support import require
from vmferry.v1 import migration_pb2 as pb

pytestmark = [pytest.mark.usefixtures("tidy"), pytest.mark.timeout(180)]

LEFT_KIB = 20 * 1024


@contextlib.contextmanager
def limited(host: Host, size_mib: int) -> Iterator[Path]:
    """Let a host have only so much memory for machines."""
    require(os.geteuid() == 0, "only root can mount a file system")
    folder = host.config.ram_dir
    options = f"size={size_mib}M,mode=0700"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)
    try:
        yield folder
        assert list(folder.iterdir()) == []
    finally:
        # Lazily: what a failure left open must not keep it there for the tests that follow.
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


async def assert_never_paused(world: World, migration: pb.Migration) -> None:
    """It failed for want of memory, before the guest was touched."""
    assert migration.outcome == pb.MIGRATION_OUTCOME_FAILED, migration
    assert "memory" in migration.reason.message, migration.reason
    assert migration.reason.remedy
    assert migration.owner == world.a.identity.uri
    assert pb.MIGRATION_PHASE_SWITCHING not in [timing.phase for timing in migration.timings]
    await eventually(
        lambda: not any(open_trackers(service.pid) for service in world.services), "nothing stays open"
    )


async def test_a_guest_whose_memory_is_full_crosses(world: World, images: Path) -> None:
    """Most of its memory are files, more are written all the time, and there is no swap: all are what they were."""
    spec = linux_spec(images, writes=4, memory_mib=96)
    assert spec.qemu is not None
    spec = replace(spec, qemu=replace(spec.qemu, append=f"{spec.qemu.append} vf.leave={LEFT_KIB}"))
    guest = await boot(world, spec)
    assert 0 < int(re.findall(r"memory available=(\d+)", guest.serial(world.a))[0]) <= LEFT_KIB
    for here, there in ((world.a, world.b), (world.b, world.a)):
        await world.assert_crosses(guest, here, there, downtime_limit=2.0)
    assert left_in_process(world.a, guest) == []


async def test_a_destination_that_is_too_small_refuses(world: World, images: Path) -> None:
    """Told before anything is made there; the guest never stops."""
    guest = await boot(world, ticker_spec(images, memory_mib=64))
    with limited(world.b, 48):
        migration = await world.migrate(guest, world.a, world.b)
        await assert_never_paused(world, migration)
        await world.assert_stays(guest, world.a, world.b)
    await world.assert_crosses(guest, world.a, world.b)


async def test_memory_that_runs_out_on_the_way_fails_the_migration(world: World, images: Path) -> None:
    """Somebody else takes what was there: the guest never stops, and the destination gives back what it had taken."""
    guest = await boot(world, ticker_spec(images, memory_mib=64))
    with limited(world.b, 80) as folder:
        # It has seen that there is enough, and has not begun to take it.
        async with armed(world, "dest.copy-started", "stop") as destination:
            migration_id = await world.start(guest, world.a, world.b)
            await eventually(lambda: halted(destination), "the destination has started its hypervisor")
            try:
                with (folder / "somebody-else").open("wb") as file:
                    file.write(bytes(40 * MIB))
            finally:
                destination.resume()
        migration = await world.ended(world.a, migration_id)
        (folder / "somebody-else").unlink()
        await assert_never_paused(world, migration)
        await world.assert_stays(guest, world.a, world.b)
    await world.assert_crosses(guest, world.a, world.b)
