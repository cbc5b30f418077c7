"""Guests' clocks after pauses of up to 20 s, by updates and by migrations: both kinds of machine, side by side."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.integration.hosts import Guest, World, open_world
from tests.integration.qemu.clocks import (
    NEAR_US,
    arm,
    assert_put_right,
    holds,
    live_wrong,
    monotonic_canary,
    steps_back,
    watches_on,
    watching_spec,
)
from tests.integration.qemu.conftest import LinuxGuest, boot, ticker_spec
from tests.integration.services import Host, eventually
from tests.integration.updates import ask, ended
from vmferry.machines.beside import find_beside
from vmferry.v1 import migration_pb2
from vmferry.v1 import update_pb2 as pb

PAUSES_S = (0.2, 1.0, 5.0, 20.0)

pytestmark = [pytest.mark.usefixtures("tidy"), pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
async def world(images: Path) -> AsyncIterator[World]:
    """Hosts of this module's own, whose services are held."""
    async with open_world("ab", image_roots=(images,), downtime_limit_ms=1000) as opened:
        yield opened


async def has_agent(world: World, guest: LinuxGuest, host: Host) -> None:
    """Wait until the guest's agent is there, an update says by what the clock was put right, and until it is right.

    A guest that boots takes the time from an RTC that knows whole seconds, and may be half a second ahead.
    """

    async def right() -> bool:
        done = await ended(world, await ask(world, guest, host=host), host=host)
        assert done.outcome == pb.UPDATE_OUTCOME_COMPLETED, done
        return bool(done.clock.measured)

    async with asyncio.timeout(60):
        while not await right():
            await watches_on(guest, host)
    done = await held_update(world, guest, host, 1.0)
    assert done.clock.offset_before_us < 0, done.clock
    assert abs(done.clock.offset_after_us) < NEAR_US, done.clock


async def held_update(world: World, guest: Guest, host: Host, pause_s: float) -> pb.Update:
    """An update of a machine that is held for so long in its pause."""
    await arm(host.source, "update.loaded=stop")
    holding = asyncio.create_task(holds(host.source, pause_s))
    asked = await ask(world, guest, host=host)
    await holding
    done = await ended(world, asked, host=host)
    assert done.outcome == pb.UPDATE_OUTCOME_COMPLETED, done
    await arm(host.source, "")
    return done


async def updated_with_pauses(world: World, guest: Guest, host: Host) -> None:
    """Updates of one machine, each held for so long in its pause."""
    for pause_s in PAUSES_S:
        done = await held_update(world, guest, host, pause_s)
        assert done.pause.ToMilliseconds() >= pause_s * 1000
        assert_put_right(done.clock, pause_s)


async def test_clocks_are_right_after_updates_however_long_the_pause(world: World, images: Path) -> None:
    """A Linux guest with an agent on one host, a canary on the other: as short as can be, then for 0.2 to 20 s.

    At last the new process stands still, so that the old one goes on, two seconds late: its guest is told the time.
    """
    guest = await boot(world, watching_spec(images))
    canary = await world.run(world.b)
    await has_agent(world, guest, world.a)
    for one, host in ((guest, world.a), (canary, world.b)):
        done = await ended(world, await ask(world, one, host=host), host=host)
        assert done.clock.measured
        assert done.clock.offset_before_us < 0
        # One that is behind by no more than its agent takes to answer is left: it might be set back.
        assert abs(done.clock.offset_after_us) < NEAR_US, done.clock
        assert done.clock.method in {"guest-agent", "clock-device", "none"}
    async with asyncio.TaskGroup() as group:
        group.create_task(updated_with_pauses(world, guest, world.a))
        group.create_task(updated_with_pauses(world, canary, world.b))
    await rolled_back(world, guest)
    await watches_on(guest, world.a)
    assert not steps_back(guest, world.a)
    await canary.assert_clean(world.b)
    assert monotonic_canary(canary, world.b)


async def rolled_back(world: World, guest: LinuxGuest) -> None:
    """An update that would pause the guest for too long."""
    await arm(world.a.source, "update.loaded=stop")
    asking = asyncio.create_task(ask(world, guest, max_pause_s=3))
    await eventually(lambda: world.a.source.status("State").startswith("T"), "the service stands there")
    new = find_beside(world.a.record(guest.id).paths)
    assert new is not None
    new.process.send_signal(signal.SIGSTOP)
    await holds(world.a.source, 0)
    done = await ended(world, await asking)
    assert done.outcome == pb.UPDATE_OUTCOME_ROLLED_BACK, done
    assert_put_right(done.clock, 2.0)
    await arm(world.a.source, "")


async def test_clocks_are_right_after_migrations_and_never_set_back(
    world: World, images: Path, tmp_path: Path
) -> None:
    """Held for a second; then for longer than a switch may take, so that the source goes on; then by a host behind.

    At a host that is five seconds behind QEMU's guest is left ahead, which is told; the canary's clock runs slower.
    """
    guest = await boot(world, watching_spec(images))
    canary = await world.run()
    await has_agent(world, guest, world.a)
    for one in (guest, canary):
        await arm(world.a.source, "source.paused=stop")
        holding = asyncio.create_task(holds(world.a.source, 1.0))
        moving = await world.start(one, world.a, world.b)
        await holding
        found = await world.ended(world.a, moving)
        assert found.outcome == migration_pb2.MIGRATION_OUTCOME_COMPLETED, found
        assert_put_right(found.clock, 1.0)
    await arm(world.a.source, "")
    await arm(world.b.source, "source.paused=stop")
    holding = asyncio.create_task(holds(world.b.source, 6.0))
    returning = await world.start(guest, world.b, world.a)
    await holding
    found = await world.ended(world.b, returning)
    assert found.outcome == migration_pb2.MIGRATION_OUTCOME_FAILED, found
    assert_put_right(found.clock, 6.0)
    await arm(world.b.source, "")
    try:
        await live_wrong(world.a.dest, tmp_path / "wrong", -5)
        for one, method in ((guest, "none"), (canary, "clock-device")):
            found = await world.migrate(one, world.b, world.a)
            assert found.outcome == migration_pb2.MIGRATION_OUTCOME_COMPLETED, found
            assert found.clock.measured
            assert (found.clock.method, found.clock.offset_after_us > 3_000_000) == (method, True), (
                found.clock
            )
            assert found.clock.note
    finally:
        world.a.dest.environment.clear()
        await world.a.dest.restart()
    await watches_on(guest, world.a)
    assert not steps_back(guest, world.a)
    await canary.assert_clean(world.a)
    assert monotonic_canary(canary, world.a)


async def test_without_an_agent_it_is_said_that_nothing_was_corrected(world: World, images: Path) -> None:
    """What the pause took is told, and not as measured; with a channel that no agent has opened, that as well."""
    for agent in (False, True):
        spec = ticker_spec(images)
        assert spec.qemu is not None
        guest = await boot(world, replace(spec, qemu=replace(spec.qemu, agent=agent)))
        found = await world.migrate(guest, world.a, world.b)
        assert (found.clock.method, found.clock.measured) == ("rtc", False)
        assert found.clock.offset_before_us == found.clock.offset_after_us
        assert abs(found.clock.offset_before_us + found.downtime.ToMicroseconds()) <= 1
        assert "no agent" in found.clock.note
        assert ("has not opened the channel" in found.clock.note) is agent
