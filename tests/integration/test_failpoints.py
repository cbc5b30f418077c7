"""Services that end, or are held, at every named moment of a migration: exactly one copy runs, and it can move again.

Each test lets the service that is named come to one place, kills or holds it there, brings it back, and then asks
everybody. When the guest's CPU executed is known from the hypervisors' own evidence, to the millisecond.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import grpc.aio
import pytest

from tests.integration.hosts import Guest, World, open_world
from tests.integration.proxy import Proxy
from tests.integration.services import DEADLINE_S, Host, Service, eventually, eventually_async
from vmferry import failpoints
from vmferry.machines.microvm import activity
from vmferry.v1 import machine_pb2
from vmferry.v1 import migration_pb2 as pb

pytestmark = [pytest.mark.usefixtures("tidy"), pytest.mark.timeout(120)]

SLOW = 3e6
HELD_S = 2.5
"""Longer than the services wait for an answer of each other."""
ON_FAILURE = {
    *("source.recording.aborted", "source.recorded.aborted", "source.resumed"),
    *("dest.recording.refused", "dest.recorded.refused", "dest.discarded"),
}
DECISIVE = {
    *("source.recorded.sealed", "source.recorded.handed-off", "source.outcome-heard"),
    *("dest.recorded.prepared", "dest.recorded.owned", "dest.resumed", "source.recorded.aborted"),
}
PLACES = (*failpoints.SOURCE, *failpoints.DESTINATION)
CASES = [(place, "kill") for place in PLACES] + [
    (place, "stop") for place in PLACES if place in DECISIVE or os.environ.get("VMFERRY_SOAK")
]


@dataclass
class Evidence:
    """When hypervisors executed guests."""

    folder: Path

    def assert_no_two_at_once(self, guest: Guest) -> None:
        """The periods in which any process ran this guest lie one behind the other."""
        beats = [activity.read(path) for path in self.folder.glob(f"{guest.id}.*")]
        periods = sorted((times[0], times[-1]) for times in beats if times)
        assert periods
        assert all(len(times) > 1 for times in beats if times), "a copy ran for a moment only"
        for (_, ended), (began, _) in itertools.pairwise(periods):
            assert ended < began, f"two copies ran at once: {periods}"


@pytest.fixture(scope="module")
def evidence(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Evidence]:
    """Hypervisors that are started from now on note when they execute."""
    folder = tmp_path_factory.mktemp("activity")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(activity.VARIABLE, str(folder))
        yield Evidence(folder)


@pytest.fixture(scope="module")
async def world(evidence: Evidence) -> AsyncIterator[World]:
    """Hosts whose hypervisors leave evidence."""
    assert evidence
    async with open_world() as opened:
        yield opened


@pytest.fixture
async def guest(world: World) -> AsyncIterator[Guest]:
    """A canary on host a, and services that run in peace again afterwards."""
    guest = await world.run()
    try:
        yield guest
    finally:
        for service in world.services:
            service.environment.clear()
            if not service.running:
                await service.start()


def halted(service: Service) -> bool:
    """Whether it is held by SIGSTOP."""
    return service.running and service.status("State").startswith("T")


async def provoke(world: World, guest: Guest, link: Proxy, place: str) -> None:
    """A migration that will come by the place; it need not be heard of any more."""
    fails = place in ON_FAILURE
    if fails:
        link.up_bytes_per_s = SLOW
    migration_id = await world.start(guest, world.a, world.b, address=link.address)
    if fails:
        await world.enters(world.a, migration_id, pb.MIGRATION_PHASE_PRECOPYING)
        async with world.source(world.a) as stub:
            await stub.CancelMigration(pb.CancelMigrationRequest(id=migration_id), timeout=DEADLINE_S)


async def bring_back(service: Service, action: str) -> None:
    """Wait until the service has come to its place, and let it, or its next process, go on."""
    if action == "kill":
        await eventually(lambda: not service.running, "the service has come to the place")
        service.environment.clear()
        await service.start()
    else:
        await eventually(lambda: halted(service), "the service has come to the place")
        await asyncio.sleep(HELD_S)
        service.signal(signal.SIGCONT)


async def found_on(world: World, guest: Guest, host: Host) -> machine_pb2.Machine | None:
    """The machine as this host tells of it."""
    try:
        return await world.machine(host, guest)
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.NOT_FOUND:
            return None
        raise


async def settled(world: World, guest: Guest) -> Host | None:
    """The host that owns and runs the machine, once nothing of it is open anywhere."""
    owners = [host for host in (world.a, world.b) if host.ledger.rights(guest.id).permitted]
    if len(owners) != 1:
        return None
    (owner,) = owners
    other = world.b if owner is world.a else world.a
    machine = await found_on(world, guest, owner)
    if machine is None or other.holdings(guest.spec):
        return None
    quiet = machine.right == machine_pb2.MACHINE_RIGHT_OWNED and not machine.migration_id
    return owner if quiet and machine.state == machine_pb2.MACHINE_STATE_RUNNING else None


@pytest.mark.parametrize(("place", "action"), CASES)
async def test_exactly_one_copy_runs_whatever_ends_where(
    world: World, guest: Guest, link: Proxy, evidence: Evidence, place: str, action: str
) -> None:
    """Both ends come to the same truth by themselves, the guest is whole, and it migrates there and back again."""
    service = world.a.source if place.startswith("source.") else world.b.dest
    service.environment[failpoints.VARIABLE] = f"{place}={action}"
    await service.restart()
    await provoke(world, guest, link, place)
    await bring_back(service, action)
    link.heal()

    owner = await eventually_async(lambda: settled(world, guest), "one host owns and runs the machine")
    assert owner is not None
    other = world.b if owner is world.a else world.a
    await world.assert_stays(guest, owner, other)
    evidence.assert_no_two_at_once(guest)
    await told_alike(world, guest, owner)

    if action == "stop":
        service.environment.clear()
        await service.restart()
    await world.assert_crosses(guest, owner, other)
    await world.assert_crosses(guest, other, owner)
    evidence.assert_no_two_at_once(guest)


async def told_alike(world: World, guest: Guest, owner: Host) -> None:
    """What the source says of the migration, if it still knows of it, is what the journals say."""
    async with world.source(world.a) as stub:
        answer = await stub.ListMigrations(pb.ListMigrationsRequest(machine=guest.id), timeout=DEADLINE_S)
    for migration in answer.migrations:
        ended = await world.ended(world.a, migration.id)
        completed = ended.outcome == pb.MIGRATION_OUTCOME_COMPLETED
        assert completed == (owner is world.b), ended
        assert ended.owner == owner.identity.uri
