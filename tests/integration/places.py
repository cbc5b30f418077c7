"""Services that are held or ended at named places of a migration, and what must be true once all is mended.

Promise: a service that was armed comes to its place exactly once; if the test ends before, nothing stays armed. When
a guest's CPU executed is known from the hypervisors' own evidence, to the millisecond.
"""

from __future__ import annotations

import itertools
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import grpc.aio
import pytest

from tests.integration.hosts import Guest, World
from tests.integration.proxy import Proxy
from tests.integration.services import DEADLINE_S, Host, Service, eventually, eventually_async
from vmferry import failpoints
from vmferry.machines.microvm import activity
from vmferry.v1 import machine_pb2
from vmferry.v1 import migration_pb2 as pb

SLOW = 3e6
"""Bytes a second at which pre-copy lasts long enough to be cancelled."""
HELD_S = 2.5
"""Longer than the services wait for an answer of each other."""
ON_FAILURE = {
    *("source.recording.aborted", "source.recorded.aborted", "source.resumed"),
    *("dest.recording.refused", "dest.recorded.refused", "dest.discarded"),
}
"""Where only a migration comes by that fails."""
PLACES = (*failpoints.SOURCE, *failpoints.DESTINATION)


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


@contextmanager
def collecting(folder: Path) -> Iterator[Evidence]:
    """Hypervisors that are started from now on note when they execute."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(activity.VARIABLE, str(folder))
        yield Evidence(folder)


@asynccontextmanager
async def guest_in_peace(world: World) -> AsyncIterator[Guest]:
    """A canary on host a; afterwards all services run, and what they said of it is in the report of a failure."""
    guest = await world.run()
    try:
        yield guest
    finally:
        for service in world.services:
            service.environment.clear()
            if not service.running:
                await service.start()
            elif halted(service):
                service.signal(signal.SIGCONT)
            for line in service.log_text().splitlines():
                if guest.id in line:
                    print(f"{service.role} {service.host.name}: {line}")


def service_at(world: World, place: str) -> Service:
    """The service of a migration from a to b that comes by the place."""
    return world.a.source if place.startswith("source.") else world.b.dest


def halted(service: Service) -> bool:
    """Whether it is held by SIGSTOP."""
    return service.running and service.status("State").startswith("T")


@asynccontextmanager
async def armed(world: World, place: str, action: str) -> AsyncIterator[Service]:
    """The service that comes by the place is killed or stopped there, once; unless it does, it is started anew."""
    service = service_at(world, place)
    service.environment[failpoints.VARIABLE] = f"{place}={action}"
    await service.restart()
    service.environment.clear()
    pid = service.pid
    try:
        yield service
    except BaseException:
        if service.running and service.pid == pid and not halted(service):
            await service.restart()
        raise


async def provoke(world: World, guest: Guest, link: Proxy, place: str) -> str:
    """A migration that will come by the place; it need not be heard of any more. Returns its id."""
    fails = place in ON_FAILURE
    if fails:
        link.up_bytes_per_s = SLOW
    migration_id = await world.start(guest, world.a, world.b, address=link.address)
    if fails:
        await world.enters(world.a, migration_id, pb.MIGRATION_PHASE_PRECOPYING)
        async with world.source(world.a) as stub:
            await stub.CancelMigration(pb.CancelMigrationRequest(id=migration_id), timeout=DEADLINE_S)
    return migration_id


async def held(world: World, guest: Guest, link: Proxy, place: str, service: Service) -> str:
    """Begin a migration, and return its id when the armed service is held at its place."""
    migration_id = await provoke(world, guest, link, place)
    await eventually(lambda: halted(service), f"{service.role}_svc has come to {place}")
    link.up_bytes_per_s = None
    return migration_id


async def all_is_well(world: World, guest: Guest, evidence: Evidence) -> tuple[Host, Host]:
    """Both ends come to the same truth by themselves; returns where the machine is, and the other host."""
    owner = await eventually_async(lambda: _settled(world, guest), "one host owns and runs the machine")
    assert owner is not None
    other = world.b if owner is world.a else world.a
    await world.assert_stays(guest, owner, other)
    evidence.assert_no_two_at_once(guest)
    there = await _found_on(world, guest, other)
    assert there is None or there.right == machine_pb2.MACHINE_RIGHT_GONE, there
    await _told_alike(world, guest, owner)
    return owner, other


async def _found_on(world: World, guest: Guest, host: Host) -> machine_pb2.Machine | None:
    """The machine as this host tells of it."""
    try:
        return await world.machine(host, guest)
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.NOT_FOUND:
            return None
        raise


async def _settled(world: World, guest: Guest) -> Host | None:
    """The host that owns and runs the machine, once nothing of it is open anywhere."""
    owners = [host for host in (world.a, world.b) if host.ledger.rights(guest.id).permitted]
    if len(owners) != 1:
        return None
    (owner,) = owners
    other = world.b if owner is world.a else world.a
    if other.holdings(guest.spec) or (machine := await _found_on(world, guest, owner)) is None:
        return None
    quiet = machine.right == machine_pb2.MACHINE_RIGHT_OWNED and not machine.migration_id
    return owner if quiet and machine.state == machine_pb2.MACHINE_STATE_RUNNING else None


async def _told_alike(world: World, guest: Guest, owner: Host) -> None:
    """What the source says of the migration, if it still knows of it, is what the journals say."""
    async with world.source(world.a) as stub:
        answer = await stub.ListMigrations(pb.ListMigrationsRequest(machine=guest.id), timeout=DEADLINE_S)
    for migration in answer.migrations:
        ended = await world.ended(world.a, migration.id)
        completed = ended.outcome == pb.MIGRATION_OUTCOME_COMPLETED
        assert completed == (owner is world.b), ended
        assert ended.owner == owner.identity.uri
