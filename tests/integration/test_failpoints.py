"""Services that end, or are held, at every named moment of a migration: exactly one copy runs, and it can move again.

Each test lets the service that is named come to one place, kills or holds it there, brings it back, and then asks
everybody.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator

import pytest

from tests.integration.hosts import Guest, World, configured, open_world
from tests.integration.places import (
    HELD_S,
    PLACES,
    Evidence,
    all_is_well,
    armed,
    collecting,
    guest_in_peace,
    halted,
    provoke,
)
from tests.integration.proxy import Proxy
from tests.integration.services import Service, eventually
from vmferry.v1 import migration_pb2 as pb

pytestmark = [pytest.mark.usefixtures("tidy"), pytest.mark.timeout(300)]

DECISIVE = {
    *("source.recorded.sealed", "source.recorded.handed-off", "source.outcome-heard"),
    *("dest.recorded.prepared", "dest.recorded.owned", "dest.resumed", "source.recorded.aborted"),
}
CASES = [(place, "kill") for place in PLACES] + [
    (place, "stop") for place in PLACES if place in DECISIVE or os.environ.get("VMFERRY_SOAK")
]


@pytest.fixture(scope="module")
def evidence(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Evidence]:
    """Of when guests executed."""
    with collecting(tmp_path_factory.mktemp("activity")) as evidence:
        yield evidence


@pytest.fixture(scope="module")
async def world(evidence: Evidence) -> AsyncIterator[World]:
    """Hosts whose hypervisors leave evidence."""
    assert evidence
    async with open_world() as opened:
        yield opened


@pytest.fixture
async def guest(world: World) -> AsyncIterator[Guest]:
    """A canary on host a, and services that run in peace again afterwards."""
    async with guest_in_peace(world) as guest:
        yield guest


async def bring_back(service: Service, action: str) -> None:
    """Wait until the service has come to its place, and let it, or its next process, go on."""
    if action == "kill":
        await eventually(lambda: not service.running, "the service has come to the place")
        await service.start()
    else:
        await eventually(lambda: halted(service), "the service has come to the place")
        await asyncio.sleep(HELD_S)
        service.signal(signal.SIGCONT)


@pytest.mark.parametrize(("place", "action"), CASES)
async def test_exactly_one_copy_runs_whatever_ends_where(
    world: World, guest: Guest, link: Proxy, evidence: Evidence, place: str, action: str
) -> None:
    """Both ends come to the same truth by themselves, the guest is whole, and it migrates there and back again."""
    async with armed(world, place, action) as service:
        await provoke(world, guest, link, place)
        await bring_back(service, action)
    link.heal()

    owner, other = await all_is_well(world, guest, evidence)
    await world.assert_crosses(guest, owner, other)
    await world.assert_crosses(guest, other, owner)
    evidence.assert_no_two_at_once(guest)


async def test_the_clock_is_seen_to_by_the_next_service(world: World, guest: Guest, link: Proxy) -> None:
    """The destination ends when the guest runs and before anybody looked at its clock; its next start does."""
    async with configured(world.a.source, agent_timeout_s=40.0):
        async with armed(world, "dest.released", "kill") as service:
            migration_id = await provoke(world, guest, link, "dest.released")
            await bring_back(service, "kill")
        migration = await world.ended(world.a, migration_id)
    assert migration.outcome == pb.MIGRATION_OUTCOME_COMPLETED, migration
    assert migration.clock.measured, migration.clock
    assert migration.clock.method == "clock-device"
