"""Slow links and guests that write faster than these carry: caps, what is tried, what the caller chose.

Guests write to a working set of which more is written in a round than may be left for the pause.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.integration.busy_guests import CAP, PAUSE_S, SET_MIB, STUCK, assert_never_held, busy, throttled
from tests.integration.hosts import MIB, Guest, World
from tests.integration.hypervisors import run_state
from tests.integration.proxy import Proxy
from tests.integration.services import DEADLINE_S, Service, eventually_async, refusal
from vmferry.machines.port import RunState
from vmferry.v1 import migration_pb2 as pb

pytestmark = pytest.mark.usefixtures("tidy")

TOLERANCE = 1.05
_BEFORE_MEMORY_BYTES = 64 * 1024
"""What the services say to each other before memory is on its way."""


@pytest.fixture
async def guest(world: World) -> AsyncIterator[Guest]:
    """Such a guest, and services that all run again afterwards."""
    yield await busy(world)
    for service in world.services:
        if not service.running:
            await service.start()


async def update(world: World, migration_id: str, **changes: Any) -> pb.Migration:
    """Change a running migration."""
    async with world.source(world.a) as stub:
        request = pb.UpdateMigrationRequest(id=migration_id, **changes)
        return (await stub.UpdateMigration(request, timeout=DEADLINE_S)).migration


async def sends_more(world: World, migration_id: str, more: int) -> None:
    """Wait until a migration has sent so many more bytes."""
    now = (await world.state(world.a, migration_id)).progress.wire_bytes
    await world.reaches(
        world.a, migration_id, lambda then: then.progress.wire_bytes >= now + more, "more was sent"
    )


class WireCounter:
    """How many bytes had gone over a link at which time."""

    def __init__(self, link: Proxy) -> None:
        self.samples: list[tuple[float, int]] = []
        self._link = link
        self._earlier = self._total()
        """What others have sent over it."""
        self._task = asyncio.create_task(self._count())

    def _total(self) -> int:
        return sum(one.up_bytes for one in self._link.links)

    async def _count(self) -> None:
        while True:
            self.samples.append((time.monotonic(), self._total() - self._earlier))
            await asyncio.sleep(0.02)

    async def stop(self) -> None:
        """Count no more."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    def beyond(self, bytes_per_s: float, *, since: float = 0.0) -> float:
        """The most bytes that at any moment had gone over since the beginning beyond what the rate allows.

        Since the beginning, and not in each window: this process, or a receiver, that was held up makes up for it.

        Args:
            bytes_per_s: the rate.
            since: when it began to hold, if not with the first memory.
        """
        before = [
            (at, total)
            for at, total in self.samples
            if (at < since if since else total < _BEFORE_MEMORY_BYTES)
        ]
        begun_at, begun = before[-1]
        grown = [(at - begun_at, total - begun) for at, total in self.samples if at >= begun_at]
        return max(sent - bytes_per_s * seconds for seconds, sent in grown)


async def test_a_cap_holds_on_the_wire(world: World, link: Proxy) -> None:
    """Counted outside of both services, there is never more than the cap and 5 %, and the guest crosses."""
    guest = await world.run(memory_mib=64, params={"resident-mib": "40"})
    link.begin_migration()
    counter = WireCounter(link)
    try:
        migration = await world.assert_crosses(
            guest, world.a, world.b, address=link.address, max_bandwidth=CAP, switchover_bandwidth=CAP
        )
    finally:
        await counter.stop()
    assert migration.progress.wire_bytes > 40 * MIB
    assert counter.beyond(CAP * TOLERANCE) <= MIB


async def test_a_cap_that_is_changed_holds_from_then_on(world: World, link: Proxy) -> None:
    """Lowered on the way, no more goes over the wire than the new one and 5 %; raised, far more."""
    guest = await world.run(memory_mib=64, params={"resident-mib": "40"})
    link.begin_migration()
    counter = WireCounter(link)
    try:
        migration_id = await world.start(guest, world.a, world.b, address=link.address, max_bandwidth=CAP)
        await sends_more(world, migration_id, 4 * MIB)
        await update(world, migration_id, max_bandwidth=CAP // 4)
        lowered = time.monotonic()
        await sends_more(world, migration_id, 4 * MIB)
        beyond = counter.beyond(CAP / 4 * TOLERANCE, since=lowered)
        await update(world, migration_id, max_bandwidth=4 * CAP)
        raised = time.monotonic()
        await sends_more(world, migration_id, 16 * MIB)
        quickly = 16 * MIB / (time.monotonic() - raised)
        ended = await world.ended(world.a, migration_id)
    finally:
        await counter.stop()
    assert beyond <= MIB
    assert quickly > CAP / 4 * 2, "twice what went over before it was raised"
    assert ended.outcome == pb.MIGRATION_OUTCOME_COMPLETED, ended
    await guest.assert_clean(world.b)


async def test_a_cap_is_lifted_on_the_way(world: World) -> None:
    """What would take minutes is over soon after; the migration's options are the new ones."""
    guest = await world.run(memory_mib=64, params={"resident-mib": "40"})
    slowest = 262_144
    migration_id = await world.start(guest, world.a, world.b, max_bandwidth=slowest)
    await world.reaches(
        world.a, migration_id, lambda now: now.progress.wire_bytes > 0, "memory is on its way"
    )
    changed = await update(world, migration_id, max_bandwidth=0)
    assert changed.options.max_bandwidth == 0
    ended = await world.ended(world.a, migration_id)
    assert ended.outcome == pb.MIGRATION_OUTCOME_COMPLETED, ended
    assert ended.total.ToSeconds() < 40 * MIB / slowest / 2
    await guest.assert_clean(world.b)


async def test_a_guest_that_is_too_busy_stays(world: World, guest: Guest) -> None:
    """Unless the caller chose otherwise the migration ends, and the guest was never slowed down."""
    migration = await world.migrate(guest, world.a, world.b, **STUCK)
    assert migration.outcome == pb.MIGRATION_OUTCOME_FAILED, migration
    assert migration.reason.reason == "NOT_CONVERGING"
    await world.assert_stays(guest, world.a, world.b)
    await assert_never_held(world.a, guest)


async def test_a_longer_pause_is_accepted_when_it_must_be(world: World, guest: Guest) -> None:
    """The pause is raised towards what is acceptable only after rounds did not help, and then it fits."""
    migration = await world.assert_crosses(guest, world.a, world.b, **STUCK, max_downtime=5.0)
    assert migration.progress.allowed_downtime.ToMilliseconds() > PAUSE_S * 1000
    assert migration.progress.round > 1


async def test_waiting_goes_on_until_the_cap_is_lifted(world: World, guest: Guest) -> None:
    """Rounds go on where others would end; a changed limit is acted on."""
    migration_id = await world.start(
        guest, world.a, world.b, **STUCK, on_no_convergence=pb.ON_NO_CONVERGENCE_WAIT
    )
    await world.reaches(world.a, migration_id, lambda now: now.progress.round > 7, "rounds go on")
    await update(world, migration_id, max_bandwidth=0)
    ended = await world.ended(world.a, migration_id)
    assert ended.outcome == pb.MIGRATION_OUTCOME_COMPLETED, ended
    await guest.assert_clean(world.b)


async def test_switching_all_the_same_has_its_price(world: World, guest: Guest) -> None:
    """The predicted pause is told before; the last round keeps to a rate of its own."""
    migration = await world.assert_crosses(
        guest,
        world.a,
        world.b,
        **STUCK,
        switchover_bandwidth=CAP // 8,
        on_no_convergence=pb.ON_NO_CONVERGENCE_SWITCH,
    )
    expected_s = migration.progress.expected_downtime.ToMilliseconds() / 1000
    downtime_s = migration.downtime.ToMilliseconds() / 1000
    assert expected_s > PAUSE_S
    assert downtime_s > expected_s / 2, "as much was left to send as was predicted, at the rate of the pause"


async def test_slowing_the_guest_down_brings_it_across(world: World) -> None:
    """It writes less, so that the rest fits; where it arrives it has all of its time again."""
    guest = await busy(world, mib_per_s=4 * SET_MIB)
    migration_id = await throttled(world, guest, 1, **STUCK, max_throttle_percent=95)
    ended = await world.ended(world.a, migration_id)
    assert ended.outcome == pb.MIGRATION_OUTCOME_COMPLETED, ended
    assert ended.progress.throttle_percent == 0
    await guest.assert_clean(world.b)
    await assert_never_held(world.b, guest)


async def test_a_guest_that_was_slowed_down_in_vain_has_its_time_back(world: World, guest: Guest) -> None:
    """No further than allowed, and undone when that is not enough."""
    most = 0

    def look(now: pb.Migration) -> bool:
        nonlocal most
        most = max(most, now.progress.throttle_percent)
        return now.phase == pb.MIGRATION_PHASE_ENDED

    migration_id = await world.start(guest, world.a, world.b, **STUCK, max_throttle_percent=20)
    ended = await world.reaches(world.a, migration_id, look, "its end")
    assert ended.reason.reason == "NOT_CONVERGING", ended
    assert most == 20
    assert ended.progress.throttle_percent == 0
    await world.assert_stays(guest, world.a, world.b)
    await assert_never_held(world.a, guest)


async def kill_while_held(service: Service, guest: Guest) -> None:
    """SIGKILL for a source service at a moment when its guest is held still."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            service.signal(signal.SIGSTOP)
            if await run_state(service.host, guest) is RunState.PAUSED:
                break
            service.signal(signal.SIGCONT)
            await asyncio.sleep(0.005)  # it goes on for a while before the next look
    await service.kill()
    assert await run_state(service.host, guest) is RunState.PAUSED


@pytest.mark.parametrize("end", ["cancel", "stop", "kill", "destination"])
async def test_whatever_ends_it_the_guest_is_let_go(
    world: World, guest: Guest, link: Proxy, end: str
) -> None:
    """Cancelled, with its service stopped or killed while the guest is held, or left by the destination."""
    choice = pb.ON_NO_CONVERGENCE_WAIT
    migration_id = await throttled(
        world,
        guest,
        60,
        **STUCK,
        address=link.address,
        max_throttle_percent=60,
        on_no_convergence=choice,
    )
    if end == "kill":
        await kill_while_held(world.a.source, guest)
    elif end == "stop":
        assert await world.a.source.stop() == 0
        await assert_never_held(world.a, guest)
    elif end == "destination":
        await world.b.dest.kill()
        await world.b.dest.start()
        assert (await world.ended(world.a, migration_id)).outcome == pb.MIGRATION_OUTCOME_FAILED
    else:
        async with world.source(world.a) as stub:
            await stub.CancelMigration(pb.CancelMigrationRequest(id=migration_id))
        assert (await world.ended(world.a, migration_id)).outcome == pb.MIGRATION_OUTCOME_CANCELLED
    if not world.a.source.running:
        await world.a.source.start()

    async def settled() -> bool:
        return not (await world.machine(world.a, guest)).migration_id

    await eventually_async(settled, "the attempt is closed and the guest was let go")
    await world.assert_stays(guest, world.a, world.b)
    await assert_never_held(world.a, guest)


async def test_what_cannot_be_changed_is_said(world: World, guest: Guest) -> None:
    """Bad values by their field, ended migrations and unknown ones by their reason; nothing else changes."""
    choice = pb.ON_NO_CONVERGENCE_WAIT
    migration_id = await world.start(guest, world.a, world.b, **STUCK, on_no_convergence=choice)
    async with world.source(world.a) as stub:
        bad: dict[str, dict[str, Any]] = {
            "max_bandwidth": {"max_bandwidth": 1},
            "switchover_bandwidth": {"switchover_bandwidth": 262_143},
            "max_throttle_percent": {"max_throttle_percent": 96},
            "on_no_convergence": {"on_no_convergence": 77},
        }
        for field, values in bad.items():
            request = pb.UpdateMigrationRequest(id=migration_id, **values)
            error = await refusal(stub.UpdateMigration(request))
            assert (error.reason, error.field) == ("INVALID_ARGUMENT", field)
        shorter = pb.UpdateMigrationRequest(id=migration_id)
        shorter.max_downtime.FromMilliseconds(1)
        assert (await refusal(stub.UpdateMigration(shorter))).field == "max_downtime"
        assert (await refusal(stub.UpdateMigration(pb.UpdateMigrationRequest(id="x")))).reason == (
            "MIGRATION_NOT_FOUND"
        )
        now = await world.state(world.a, migration_id)
        assert now.options.max_bandwidth == CAP
        soon = pb.UpdateMigrationRequest(id=migration_id)
        soon.total_timeout.FromMilliseconds(1)
        await stub.UpdateMigration(soon)
        ended = await world.ended(world.a, migration_id)
        assert ended.reason.reason == "TIMED_OUT", ended
        assert (await refusal(stub.UpdateMigration(soon))).reason == "WRONG_PHASE"
    await world.assert_stays(guest, world.a, world.b)
