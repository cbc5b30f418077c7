"""The operator's word between real services: one of the two hosts is lost for ever, and somebody decides."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator

import grpc.aio
import pytest

from tests.integration.hosts import Guest, World
from tests.integration.hypervisors import run_state
from tests.integration.lost_handoffs import start_and_lose_go
from tests.integration.proxy import Proxy
from tests.integration.services import Host, eventually, eventually_async, refusal
from vmferry.cli.machine import end_machine, run_machine
from vmferry.failpoints import VARIABLE
from vmferry.handoff import destination
from vmferry.handoff.choices import CONFIRMATION
from vmferry.handoff.ledger import Role
from vmferry.handoff.rights import Standing
from vmferry.machines.port import RunState
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
    other = await refusal(reclaim(world, said(guest, migration_id, confirmation=CONFIRMATION)))
    assert other.reason == "WRONG_PHASE"

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


async def test_only_an_admin_who_says_enough_is_heard(world: World, guest: Guest, link: Proxy) -> None:
    """A controller, a wrong confirmation, another migration: refused, in the log, and nothing changes."""
    migration_id = await lose_the_destination(world, guest, link)
    good = said(guest, migration_id, evidence=FENCED)
    denied = await refusal(reclaim(world, good, who="controller"))
    assert denied.reason == "PERMISSION_DENIED"
    close = said(guest, migration_id, confirmation=CONFIRMATION.lower())
    wrong = await refusal(reclaim(world, close))
    assert (wrong.reason, wrong.field) == ("INVALID_ARGUMENT", "override.confirmation")
    assert CONFIRMATION in wrong.instance_remedy
    nothing = await refusal(reclaim(world, said(guest, migration_id)))
    assert (nothing.reason, nothing.field) == ("INVALID_ARGUMENT", "override.evidence")
    stale = await refusal(reclaim(world, said(guest, "00" * 16, evidence=FENCED)))
    assert (stale.reason, stale.field) == ("STALE_ATTEMPT", "override.migration_id")
    assert not world.a.ledger.forced(guest.id, Role.SOURCE)
    assert world.a.ledger.rights(guest.id).standing is Standing.HANDED_OFF
    reasons = {line["reason"] for line in audited(world.a, "source", "refused")}
    assert reasons >= {"PERMISSION_DENIED", "INVALID_ARGUMENT", "STALE_ATTEMPT"}
    await reclaim(world, good)


async def test_a_destination_that_answers_is_believed(world: World, guest: Guest, link: Proxy) -> None:
    """While it can be asked, an operator is refused, and the hand-off settles itself."""
    migration_id = await start_and_lose_go(world, guest, link, answer_only=True)
    await eventually(lambda: world.b.ledger.rights(guest.id).permitted, "the destination owns it")
    link.heal()
    error = await refusal(reclaim(world, said(guest, migration_id, evidence=FENCED, with_memory=True)))
    assert error.reason == "WRONG_PHASE", error
    assert (await world.ended(world.a, migration_id)).outcome == pb.MIGRATION_OUTCOME_COMPLETED
    await world.assert_stays(guest, world.b, world.a)


@pytest.mark.parametrize("with_memory", [True, False], ids=["memory", "anew"])
async def test_a_prepared_copy_is_accepted_when_its_source_is_lost(
    world: World, guest: Guest, link: Proxy, *, with_memory: bool
) -> None:
    """The source is off for good: an operator lets the copy run, or starts the machine anew where it was to go."""
    migration_id = await prepare_and_lose_the_source(world, guest, link)
    word = said(guest, migration_id, evidence=FENCED, with_memory=with_memory)
    denied = await refusal(accept(world, word, who="controller"))
    assert denied.reason == "PERMISSION_DENIED"
    await source_is_silent(world, guest)
    done = await accept(world, word)
    assert (done.right, done.epoch) == (machine_pb2.MACHINE_RIGHT_OWNED, 2)
    assert (await accept(world, word)).done
    assert world.b.ledger.rights(guest.id).permitted
    if not with_memory:
        assert not world.b.record(guest.id).alive
        await run_machine(guest.spec, world.b.config)
    await guest.assert_clean(world.b)
    await world.a.source.start()
    await eventually(lambda: world.a.ledger.rights(guest.id).standing is Standing.GONE, "the source knows")
    await world.assert_crosses(guest, world.b, world.a)


async def test_a_destination_that_ran_meets_a_later_right_and_stops(
    world: World, guest: Guest, link: Proxy
) -> None:
    """The word was wrong: both run it until they meet; then the destination stops, with an alarm."""
    migration_id = await start_and_lose_go(world, guest, link, answer_only=True)
    await eventually(lambda: world.b.ledger.rights(guest.id).permitted, "the destination owns it")
    word = said(guest, migration_id, confirmation=CONFIRMATION, with_memory=True)
    await reclaim(world, word)
    await world.ended(world.a, migration_id)
    assert world.b.ledger.rights(guest.id).permitted, "two believe that they own it"
    link.heal()
    await stops_superseded(world.b, guest)
    assert "superseded by a later right" in world.b.dest.log_text()
    assert await run_state(world.a, guest) is RunState.RUNNING
    assert world.a.ledger.rights(guest.id).permitted
    await end_machine(guest.id, world.b.config)
    await world.assert_stays(guest, world.a, world.b)
    await world.assert_crosses(guest, world.a, world.b)


async def test_a_source_that_runs_on_meets_a_right_taken_there_and_stops(
    world: World, guest: Guest, link: Proxy
) -> None:
    """The source was only away: it runs on at its own right, hears that its copy was accepted there, and stops."""
    migration_id = await prepare_and_lose_the_source(world, guest, link, hypervisor=False)
    await source_is_silent(world, guest)
    await accept(world, said(guest, migration_id, confirmation=CONFIRMATION, with_memory=True))
    await guest.assert_clean(world.b)
    await world.a.source.start()
    await stops_superseded(world.a, guest)
    assert "superseded by a later right" in world.a.source.log_text()
    assert await run_state(world.b, guest) is RunState.RUNNING
    await world.a.source.restart()
    assert await run_state(world.a, guest) is RunState.PAUSED
    await end_machine(guest.id, world.a.config)
    await world.assert_stays(guest, world.b, world.a)
    await world.assert_crosses(guest, world.b, world.a)


async def typed(world: World, host: Host, *words: str) -> tuple[int, str, str]:
    """A command line, as an admin types it; exit code, stdout and stderr."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "vmferry.cli.main", *words),
        *("--source", host.source.address, "--source-host", host.identity.uri),
        *("--tls", str(world.tls_dir("admin"))),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def test_the_command_line_shows_first_and_decides_about_what_it_showed(
    world: World, guest: Guest, link: Proxy
) -> None:
    """Without evidence it prints what is at stake and ends with 2; with it, the migration shown is decided."""
    migration_id = await lose_the_destination(world, guest, link)
    command = ("handoff", "force-reclaim", guest.spec.name)
    code, out, err = await typed(world, world.a, *command)
    assert (code, "risk" in out, CONFIRMATION in err) == (2, True, True)
    code, out, _ = await typed(world, world.a, *command, "--dry-run", "--json")
    assert (code, json.loads(out)["migration_id"], json.loads(out)["done"]) == (0, migration_id, False)
    code, _, err = await typed(world, world.a, *command, "--confirm", "yes")
    assert (code, "override.confirmation" in err) == (2, True)
    assert not world.a.ledger.forced(guest.id, Role.SOURCE)
    code, out, err = await typed(world, world.a, *command, "--confirm", CONFIRMATION, "--with-memory")
    assert code == 0, err
    assert "decided" in out
    await guest.assert_clean(world.a)
    code, out, _ = await typed(world, world.a, *command, "--confirm", CONFIRMATION, "--with-memory", "--json")
    assert (code, json.loads(out)["done"], json.loads(out)["epoch"]) == (0, True, 3)


async def prepare_and_lose_the_source(
    world: World, guest: Guest, link: Proxy, *, hypervisor: bool = True
) -> str:
    """A complete copy waits at b, and the source was ended before it gave its right up."""
    world.a.source.environment = {VARIABLE: "source.ready-heard=kill"}
    await world.a.source.restart()
    try:
        migration_id = await world.start(guest, world.a, world.b, address=link.address)
        await eventually(lambda: not world.a.source.running, "the source is gone")
    finally:
        world.a.source.environment = {}
    assert isinstance(world.b.ledger.rights(guest.id).incoming.current, destination.Prepared)
    if hypervisor:
        kill_copy(world.a, guest)
    return migration_id


async def source_is_silent(world: World, guest: Guest) -> None:
    """Until the source was not heard for a while, an operator is told to wait."""

    async def silent() -> bool:
        try:
            return bool((await accept(world, said(guest), only_asked=True)).memory_usable)
        except grpc.aio.AioRpcError as error:
            if "was heard" in str(error.details()):
                return False
            raise

    await eventually_async(silent, "the source is silent")


async def stops_superseded(host: Host, guest: Guest) -> None:
    """The host learns of the later right, and its guest stands still and is kept."""
    await eventually(
        lambda: host.ledger.rights(guest.id).standing is Standing.SUPERSEDED, "it knows of the later right"
    )

    async def paused() -> bool:
        return await run_state(host, guest) is RunState.PAUSED

    await eventually_async(paused, "its guest stands still")
    assert not host.ledger.rights(guest.id).permitted
