"""The operator's word between real services: one of the two hosts is lost for ever, and somebody decides."""

from __future__ import annotations

import contextlib
import json
import signal
from collections.abc import AsyncIterator

import pytest

from tests.integration.hosts import Guest, World
from tests.integration.proxy import Proxy
from tests.integration.services import Host, eventually, eventually_async, refusal
from tests.integration.test_recovery import run_state, start_and_lose_go
from vmferry.cli.machine import run_machine
from vmferry.errors import VmferryError
from vmferry.handoff import destination, source
from vmferry.handoff.ledger import Role
from vmferry.handoff.rights import Standing
from vmferry.machines.port import RunState
from vmferry.rpc.status import from_rpc_error
from vmferry.security.override import CONFIRMATION
from vmferry.security.tls import open_channel
from vmferry.v1 import handoff_pb2, machine_pb2
from vmferry.v1 import migration_pb2 as pb
from vmferry.v1.handoff_pb2_grpc import DestinationServiceStub
from vmferry.v1.override_pb2 import Override, OverrideReport

pytestmark = pytest.mark.usefixtures("tidy")
FENCED = "ipmi 4711: chassis power off"


@pytest.fixture
async def guest(world: World) -> AsyncIterator[Guest]:
    """A canary on host a; afterwards all services run."""
    guest = await world.run()
    try:
        yield guest
    finally:
        for service in world.services:
            if not service.running:
                await service.start()


def said(guest: Guest, migration_id: str = "", **how: object) -> Override:
    """An operator's word."""
    return Override(machine=guest.id, migration_id=migration_id, **how)  # type: ignore[arg-type]


async def reclaim(
    world: World, override: Override, *, only_asked: bool = False, who: str = "admin"
) -> OverrideReport:
    """Force the source."""
    async with world.source(world.a, who) as stub:
        request = pb.ForceReclaimRequest(override=override, validate_only=only_asked)
        return (await stub.ForceReclaim(request, timeout=20)).report


async def accept(
    world: World, override: Override, *, only_asked: bool = False, who: str = "admin"
) -> OverrideReport:
    """Force the destination."""
    async with open_channel(world.b.dest.address, world.b.identity, world.material(who)) as channel:
        request = handoff_pb2.ForceAcceptRequest(override=override, validate_only=only_asked)
        return (await DestinationServiceStub(channel).ForceAccept(request, timeout=20)).report


async def lose_the_destination(world: World, guest: Guest, link: Proxy, *, ran: bool = False) -> str:
    """A hand-off whose destination is switched off before anybody knows what became of it."""
    migration_id = await start_and_lose_go(world, guest, link, answer_only=ran)
    await world.reaches(
        world.a, migration_id, lambda now: now.outcome == pb.MIGRATION_OUTCOME_UNKNOWN, "UNKNOWN"
    )
    await world.b.dest.kill()
    kill_copy(world.b, guest)
    return migration_id


def kill_copy(host: Host, guest: Guest) -> None:
    """End a guest's process, as a power cut does."""
    process = host.record(guest.id).process
    assert process is not None
    process.send_signal(signal.SIGKILL)


def audited(host: Host, role: str, verdict: str) -> list[dict[str, object]]:
    """What a service's log says about operators."""
    log = host.source.log_text() if role == "source" else host.dest.log_text()
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    return [line for line in lines if line["event"] == "operator override" and line["verdict"] == verdict]


async def test_a_reclaimed_guest_goes_on_from_its_memory(world: World, guest: Guest, link: Proxy) -> None:
    """The destination is off for good: with memory the guest goes on here, and migrates again once that is back."""
    migration_id = await lose_the_destination(world, guest, link)
    asked = await reclaim(world, said(guest, with_memory=True), only_asked=True)
    assert (asked.migration_id, asked.done, asked.memory_usable) == (migration_id, False, True)
    assert asked.other_host == world.b.identity.uri
    assert asked.risks
    assert await run_state(world.a, guest) is not RunState.RUNNING
    word = said(guest, migration_id, with_memory=True, evidence=FENCED)
    done = await reclaim(world, word)
    assert (done.done, done.right, done.epoch) == (True, machine_pb2.MACHINE_RIGHT_OWNED, 3)
    ended = await world.ended(world.a, migration_id)
    assert (ended.outcome, ended.reason.reason) == (pb.MIGRATION_OUTCOME_FAILED, "FORCED_BY_OPERATOR")
    assert ended.owner == world.a.identity.uri
    await guest.assert_clean(world.a)
    (record,) = world.a.ledger.forced(guest.id, Role.SOURCE)
    assert (record.operator, record.note) == ("spiffe://test.vmferry.example/admin/operator", FENCED)
    (line,) = [one for one in audited(world.a, "source", "granted") if one["machine"] == guest.id]
    assert (line["operator"], line["evidence"], line["epoch"]) == (record.operator, FENCED, 3)
    assert line["level"] == "warning"

    again = await reclaim(world, word)
    assert (again.done, again.epoch, again.evidence) == (True, 3, FENCED)
    assert len(world.a.ledger.forced(guest.id, Role.SOURCE)) == 1
    with pytest.raises(Exception) as other:
        await reclaim(world, said(guest, migration_id, confirmation=CONFIRMATION))
    assert from_rpc_error(other.value).reason == "WRONG_PHASE"  # type: ignore[arg-type]

    link.heal()
    await world.b.dest.start()
    await world.assert_stays(guest, world.a, world.b)
    await world.assert_crosses(guest, world.a, world.b)


async def test_a_reclaimed_machine_is_started_anew(world: World, guest: Guest, link: Proxy) -> None:
    """Without memory, as is the default, the old copy is ended and the machine can be started again here."""
    migration_id = await lose_the_destination(world, guest, link, ran=True)
    old = world.a.record(guest.id).pid
    done = await reclaim(world, said(guest, migration_id, confirmation=CONFIRMATION))
    assert (done.right, done.with_memory) == (machine_pb2.MACHINE_RIGHT_OWNED, False)
    assert (await world.ended(world.a, migration_id)).reason.reason == "FORCED_BY_OPERATOR"
    assert not world.a.record(guest.id).alive
    await run_machine(guest.spec, world.a.config)
    assert world.a.record(guest.id).pid not in (None, old)
    await eventually(lambda: guest.serial(world.a).count("\n") > 1, "the guest speaks")
    await guest.assert_clean(world.a)
