"""Links that break while a guest crosses in QEMU's own stream: the transfer pauses, and the guest runs if it can."""

from __future__ import annotations

import os
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.integration.links import Broken, assert_right, broken_hosts, disturbed, lost
from tests.integration.qemu.conftest import LinuxGuest, boot, ticker_in_stream
from vmferry.v1 import migration_pb2 as pb

LANES = 4
STREAM = {"path": "stream", "compression": "none", "downtime_limit": 30.0, "lanes": LANES}
SLOW_MBIT = 1
"""So slow that the stream of a guest whose memory is nearly all zero takes some seconds."""
SOAK = bool(os.environ.get("VMFERRY_SOAK"))
RUNS = 40 if SOAK else 3
SEED = int(os.environ.get("VMFERRY_SEED") or random.randrange(1 << 32))

pytestmark = pytest.mark.timeout(max(240, RUNS * 60))


@pytest.fixture(scope="module")
async def broken(images: Path) -> AsyncIterator[Broken]:
    """Hosts a and b in namespaces."""
    async with broken_hosts(image_roots=(images,)) as hosts:
        yield hosts


@pytest.fixture
async def healed(broken: Broken) -> AsyncIterator[None]:
    """Heals the wires and ends the machines."""
    yield
    await broken.tidy()


async def broken_down(broken: Broken, guest: LinuxGuest) -> str:
    """Start a migration whose link breaks down with a part of the stream sent; returns its id, the break noticed."""
    world = broken.world
    broken.wire.shape(SLOW_MBIT)
    migration_id = await world.start(guest, world.a, world.b, **STREAM)
    await world.reaches(
        world.a, migration_id, lambda now: now.progress.wire_bytes > 50_000, "a part of the stream is sent"
    )
    broken.break_down()
    await world.reaches(world.a, migration_id, lost, "the connection is lost")
    return migration_id


async def completes(broken: Broken, guest: LinuxGuest, migration_id: str) -> pb.Migration:
    """The link is healed, and the guest arrives whole."""
    world = broken.world
    broken.wire.shape(None)
    broken.wire.heal()
    migration = await world.ended(world.a, migration_id)
    assert migration.outcome == pb.MIGRATION_OUTCOME_COMPLETED, migration
    assert migration.progress.reconnects >= LANES
    await guest.assert_clean(world.b)
    return migration


@pytest.mark.usefixtures("healed")
async def test_a_guest_runs_while_its_stream_is_broken(broken: Broken, images: Path) -> None:
    """Under KVM, for longer than the destination waits for a silent source."""
    world = broken.world
    guest = await boot(world, ticker_in_stream(images, "kvm", memory_mib=512))
    migration_id = await broken_down(broken, guest)
    said = guest.serial(world.a).count("\n")
    limit_ms = (world.a.config.reconnect_timeout_s - world.b.config.receive_timeout_s - 3) * 1000
    await world.reaches(
        world.a,
        migration_id,
        lambda now: now.progress.reconnect_left.ToMilliseconds() < limit_ms,
        "time goes on",
    )
    assert guest.serial(world.a).count("\n") > said
    migration = await completes(broken, guest, migration_id)
    assert migration.downtime.ToMilliseconds() < 10_000


@pytest.mark.usefixtures("healed")
async def test_a_guest_that_stands_still_is_waited_for(broken: Broken, images: Path) -> None:
    """Under emulation the guest is paused for the whole stream: a short break makes its pause longer."""
    world = broken.world
    guest = await boot(world, ticker_in_stream(images, "tcg"))
    migration_id = await broken_down(broken, guest)
    assert (await world.state(world.a, migration_id)).phase == pb.MIGRATION_PHASE_SWITCHING
    await completes(broken, guest, migration_id)


@pytest.mark.usefixtures("healed")
async def test_streams_over_links_that_break_at_random(broken: Broken, images: Path) -> None:
    """A guest that runs goes to and fro in streams; it is never damaged, and there is always exactly one copy."""
    print(f"VMFERRY_SEED={SEED}")
    here, there = broken.world.a, broken.world.b
    guest = await boot(broken.world, ticker_in_stream(images, "kvm", memory_mib=256))
    for number in range(RUNS):
        rng = random.Random(f"{SEED} {number}")
        longest_s = 12.0 if SOAK else 2.0
        story = await disturbed(
            broken, rng, guest, here, there, longest_s=longest_s, mbit=SLOW_MBIT, **STREAM
        )
        print(f"{number}: {story}", flush=True)
        await assert_right(broken, guest, here, there, story)
        if story.completed:
            here, there = there, here
