"""``vmferry recover`` and blocked machines, with real services, guests and a network that is cut at the hand-off.

The services ask again only every few minutes here, so that whatever settles at once was asked to.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc

import vmferry
from tests.integration.hosts import Guest, World, open_world
from tests.integration.hypervisors import run_state
from tests.integration.lost_handoffs import start_and_lose_go, start_slowly
from tests.integration.proxy import Proxy
from tests.integration.services import DEADLINE_S, Host, Service, eventually, refusal
from vmferry.errors import ExitCode
from vmferry.handoff.journal import SLOT_BYTES
from vmferry.handoff.rights import Standing
from vmferry.machines.port import RunState
from vmferry.security.tls import open_channel
from vmferry.v1 import migration_pb2 as pb
from vmferry.v1.recovery_pb2 import InspectMachineRequest, MachineInspection, SettleMachineRequest
from vmferry.v1.recovery_pb2_grpc import RecoveryServiceStub

# Most of it is the starting of commands, which takes its time where cores are few.
pytestmark = [pytest.mark.usefixtures("tidy"), pytest.mark.timeout(300)]

RETRY_S = 300.0
SOURCES = str(Path(vmferry.__file__).parents[1])


@pytest.fixture(scope="module")
async def world() -> AsyncIterator[World]:
    """Hosts whose services are in no hurry by themselves."""
    async with open_world(handoff_retry_s=RETRY_S, qmp_timeout_s=3.0, rpc_timeout_s=8.0) as opened:
        yield opened


@pytest.fixture
async def guest(world: World, link: Proxy) -> AsyncIterator[Guest]:
    """A canary on host a; afterwards the network is whole, all services run, and nothing waits for anything."""
    guest = await world.run()
    try:
        yield guest
    finally:
        link.heal()
        for service in world.services:
            service.environment = {}
            if not service.running:
                await service.start()
        await world.a.source.restart()
        await eventually(lambda: not world.a.ledger.rights(guest.id).leaving, "nothing is left open")


@dataclass(frozen=True)
class Ran:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        """Its JSON."""
        found: dict[str, Any] = json.loads(self.out)
        return found

    def ends(self) -> dict[str, Any]:
        """What every end said, by its name."""
        return {end["who"]: end for end in self.document["ends"]}


async def run(*arguments: str, **environment: str) -> Ran:
    """A command as an operator types it."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "vmferry.cli.main", *arguments),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": SOURCES} | environment,
    )
    out, err = await asyncio.wait_for(process.communicate(), 90)
    assert process.returncode is not None
    return Ran(process.returncode, out.decode(), err.decode())


async def on(world: World, service: Service, *arguments: str) -> Ran:
    """The same with one service of a host in the environment."""
    return await run(
        *arguments,
        VMFERRY_SOURCE=service.address,
        VMFERRY_SOURCE_HOST=service.host.identity.uri,
        VMFERRY_TLS=str(world.tls_dir("admin")),
    )


async def inspect(world: World, service: Service, machine: str) -> MachineInspection:
    """What a service knows of a machine."""
    async with open_channel(service.address, service.host.identity, world.material("admin")) as channel:
        answer = await RecoveryServiceStub(channel).InspectMachine(
            InspectMachineRequest(machine=machine), timeout=DEADLINE_S
        )
    inspection: MachineInspection = answer.inspection
    return inspection


async def settle(world: World, service: Service, machine: str) -> tuple[list[str], MachineInspection]:
    """Have a service do now what it would try next."""
    async with open_channel(service.address, service.host.identity, world.material("admin")) as channel:
        answer = await RecoveryServiceStub(channel).SettleMachine(
            SettleMachineRequest(machine=machine), timeout=2 * DEADLINE_S
        )
    return list(answer.done), answer.inspection


async def blocked(world: World, guest: Guest, link: Proxy, *, answer_only: bool = False) -> str:
    """A machine that was handed off, whose hosts cannot reach each other; its migration."""
    migration_id = await start_and_lose_go(world, guest, link, answer_only=answer_only)
    link.cut = True
    link.reset_all()

    async def is_blocked() -> bool:
        return (await world.machine(world.a, guest)).HasField("blockage")

    deadline = time.monotonic() + DEADLINE_S
    while not await is_blocked():
        assert time.monotonic() < deadline, "the machine is not called blocked"
        await asyncio.sleep(0.05)
    return migration_id


def kinds(end: dict[str, Any]) -> dict[str, list[str]]:
    """The records that an end shows, by who wrote them."""
    return {
        journal["role"]: [record["kind"].removeprefix("RECORD_KIND_") for record in journal["records"]]
        for journal in end["inspection"]["journals"]
    }


async def test_a_machine_in_doubt_is_seen_in_the_list_and_by_inspection(
    world: World, guest: Guest, link: Proxy
) -> None:
    """Each host says what it waits for, since when, and what it heard from the other one; whoever watches is told."""
    migration_id = await blocked(world, guest, link)
    here = await inspect(world, world.a.source, guest.spec.name)
    there = await inspect(world, world.b.dest, guest.id)
    assert here.machine.blockage.reason == "OUTCOME_UNKNOWN"
    assert here.machine.blockage.since.ToNanoseconds() <= time.time_ns()
    assert (here.attempt_state, here.open_attempt.migration_id.hex()) == ("handed-off", migration_id)
    assert here.peer.host == world.b.identity.uri
    assert here.peer.address == link.address
    assert here.peer.failure
    assert there.machine.blockage.reason == "AWAITS_SOURCE"
    assert there.attempt_state == "prepared"
    assert there.peer.host == world.a.identity.uri
    assert there.peer.heard == "Seal"

    listed = await on(world, world.a.source, "list", "--machines")
    assert "OUTCOME_UNKNOWN" in listed.out
    assert f"vmferry recover {guest.spec.name}" in listed.err
    listed = await on(world, world.a.source, "list", "--machines", "--json")
    (machine,) = [one for one in listed.document["machines"] if one["uuid"] == guest.id]
    assert machine["blockage"]["since"]
    # Whoever waits for the migration is told the same, and never that it failed.
    watched = await on(world, world.a.source, "watch", migration_id, "--json")
    assert watched.code == ExitCode.UNKNOWN, watched.err
    assert watched.document["outcome"] == "MIGRATION_OUTCOME_UNKNOWN"


async def test_a_service_that_asks_again_and_again_ends_when_it_is_told_to(
    world: World, guest: Guest, link: Proxy
) -> None:
    """It does not sit out the wait for its next question, and the next start goes on where it was."""
    await blocked(world, guest, link)
    before = await inspect(world, world.a.source, guest.id)
    assert await world.a.source.stop() == 0
    await world.a.source.start()
    after = await inspect(world, world.a.source, guest.id)
    assert after.open_attempt == before.open_attempt
    assert after.attempt_state == "handed-off"


async def test_recover_shows_both_ends_and_settles_at_once_when_the_link_is_whole(
    world: World, guest: Guest, link: Proxy
) -> None:
    """Asked at either end it tells the same truth; then one command is enough, and twice is like once."""
    migration_id = await blocked(world, guest, link)
    # From the source the cut link is in the way; from the destination, whose source can be named, it is not.
    shown = await on(world, world.a.source, "recover", guest.spec.name, "--json")
    assert shown.code == ExitCode.UNKNOWN, shown.err
    assert shown.ends()["there"]["error"]["reason"] == "PEER_UNREACHABLE"
    assert kinds(shown.ends()["here"])["source"] == ["BEGUN", "SEALED", "HANDED_OFF"]
    both = await on(
        world, world.b.dest, "recover", guest.spec.name, "--show", "--json", "--peer", world.a.source.address
    )
    assert both.code == ExitCode.UNKNOWN, both.err
    assert kinds(both.ends()["here"])["destination"] == ["ACCEPTED", "PREPARED"]
    assert both.ends()["there"]["inspection"]["journals"] == shown.ends()["here"]["inspection"]["journals"]
    assert await run_state(world.a, guest) is not RunState.RUNNING

    text = await on(
        world, world.a.source, "recover", guest.spec.name, "--show", "--peer", world.b.dest.address
    )
    assert text.code == ExitCode.UNKNOWN, text.err
    assert max(len(line) for line in text.out.splitlines()) <= 100
    for expected in (
        "HANDED_OFF",
        "PREPARED",
        "OUTCOME_UNKNOWN",
        "AWAITS_SOURCE",
        "$ vmferry handoff force-reclaim",
    ):
        assert expected in text.out

    link.heal()
    began = time.monotonic()
    settled = await on(world, world.a.source, "recover", guest.spec.name, "--json")
    assert settled.code == ExitCode.OK, settled.out + settled.err
    assert time.monotonic() - began < RETRY_S / 3
    assert kinds(settled.ends()["here"])["source"][-1] == "DONE"
    assert kinds(settled.ends()["there"])["destination"][-1] == "RAN"
    assert any("tried again" in text for text in settled.ends()["here"]["done"])
    ended = await world.ended(world.a, migration_id)
    assert ended.outcome == pb.MIGRATION_OUTCOME_COMPLETED
    await guest.assert_clean(world.b)
    # A machine that has left is still known, by its identity; and twice is like once.
    again = await on(world, world.a.source, "recover", guest.id, "--json")
    assert again.code == ExitCode.OK
    assert again.ends()["here"]["done"] == []
    assert again.ends()["here"]["inspection"]["machine"]["right"] == "MACHINE_RIGHT_GONE"


async def test_since_when_and_the_metric_survive_a_restart(world: World, guest: Guest, link: Proxy) -> None:
    """The time is the journal's, so a restarted service tells the same one; it measures one blocked machine."""
    await blocked(world, guest, link)
    before = (await world.machine(world.a, guest)).blockage
    async with collector() as (port, counts):
        world.a.source.environment = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}",
            "OTEL_METRIC_EXPORT_INTERVAL": "200",
        }
        await world.a.source.restart()
        assert (await world.machine(world.a, guest)).blockage == before
        await eventually(lambda: counts.get("OUTCOME_UNKNOWN") == 1, "one machine is measured as blocked")
        link.heal()
        await settle(world, world.a.source, guest.id)
        await eventually(lambda: counts.get("OUTCOME_UNKNOWN") == 0, "no machine is blocked any more")
        assert await world.a.source.stop() == 0


class collector:  # noqa: N801 - used like a function
    """A collector of metrics that keeps the newest count of blocked machines by reason."""

    async def __aenter__(self) -> tuple[int, dict[str, int]]:
        counts: dict[str, int] = {}

        class Collector(metrics_service_pb2_grpc.MetricsServiceServicer):
            async def Export(self, request: Any, _context: Any) -> Any:  # noqa: N802 - the protocol's name
                for batch in request.resource_metrics:
                    for metric in (metric for scope in batch.scope_metrics for metric in scope.metrics):
                        for point in (
                            metric.gauge.data_points if metric.name == "vmferry.machines.blocked" else ()
                        ):
                            counts[point.attributes[0].value.string_value] = point.as_int
                return metrics_service_pb2.ExportMetricsServiceResponse()

        self._server = grpc.aio.server()
        add: Any = metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server
        add(Collector(), self._server)
        port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()
        return port, counts

    async def __aexit__(self, *_: object) -> None:
        await self._server.stop(None)


async def test_without_any_service_the_journals_are_read_from_disk(
    world: World, guest: Guest, link: Proxy
) -> None:
    """At night, when nothing starts: --config shows what is on disk, changes nothing, and says unknown."""
    await blocked(world, guest, link)
    await asyncio.gather(world.a.source.kill(), world.a.dest.kill())
    config = str(world.a.config_file)
    files = journals(world.a)
    ran = await run("recover", guest.spec.name, "--config", config, "--json")
    assert ran.code == ExitCode.UNKNOWN, ran.err
    (end,) = [end for end in ran.document["ends"] if end["who"] == "here"]
    assert end["inspection"]["machine"]["blockage"]["reason"] == "OUTCOME_UNKNOWN"
    assert kinds(end)["source"][-1] == "HANDED_OFF"
    assert kinds(end)["operator"] == ["BORN"]
    assert journals(world.a) == files
    away = await on(world, world.a.source, "recover", guest.spec.name)
    assert away.code == ExitCode.UNREACHABLE
    assert "--config FILE" in away.err


def journals(host: Host) -> dict[Path, bytes]:
    """All journals of a host, byte for byte."""
    return {path: path.read_bytes() for path in host.config.journal_dir.rglob("*") if path.is_file()}


async def test_a_damaged_journal_is_unknown_with_or_without_a_service(
    world: World, guest: Guest, link: Proxy
) -> None:
    """What can be read is shown with the reason why it is not believed; whoever asks is told that it is unknown."""
    migration_id = await blocked(world, guest, link)
    path = world.a.config.journal_dir / guest.id / "source.journal"
    await asyncio.gather(world.a.source.stop(), world.a.dest.stop())
    whole = path.read_bytes()
    bad = 3 * SLOT_BYTES  # HANDED_OFF; what follows it shows that it is no torn end
    try:
        path.write_bytes(
            whole[:bad] + b"rot" + whole[bad + 3 : bad + SLOT_BYTES] + b"more" + whole[bad + SLOT_BYTES + 4 :]
        )
        local = await run("recover", guest.spec.name, "--config", str(world.a.config_file), "--json")
        await world.a.source.start()
        served = await on(world, world.a.source, "recover", guest.spec.name, "--json")
        for ran in (local, served):
            assert ran.code == ExitCode.UNKNOWN, ran.out + ran.err
            end = ran.ends()["here"]
            assert end["inspection"]["machine"]["blockage"]["reason"] == "JOURNAL_DAMAGED"
            assert end["inspection"]["machine"]["right"] == "MACHINE_RIGHT_UNKNOWN"
            (damaged,) = [one for one in end["inspection"]["journals"] if one["damage"]]
            assert damaged["role"] == "source"
            assert kinds(end)["source"] == ["BEGUN", "SEALED"]
            assert not any(one["possible"] for one in end["inspection"]["choices"] if "force" in one["name"])
        migration = await world.state(world.a, migration_id)
        assert migration.outcome == pb.MIGRATION_OUTCOME_UNKNOWN
        assert migration.reason.reason == "JOURNAL_DAMAGED"
        async with world.source(world.a) as stub:
            error = await refusal(stub.CancelMigration(pb.CancelMigrationRequest(id=migration_id)))
        assert error.reason == "POINT_OF_NO_RETURN"
        assert await run_state(world.a, guest) is not RunState.RUNNING
        await world.a.source.stop()
    finally:
        path.write_bytes(whole)
    link.heal()
    await asyncio.gather(world.a.source.start(), world.a.dest.start())
    await world.ended(world.a, migration_id)
    await world.assert_stays(guest, world.b, world.a)


async def test_a_guest_that_its_new_owner_does_not_resume(world: World, guest: Guest, link: Proxy) -> None:
    """Both ends say that the hypervisor is in the way; once it answers, one call is enough."""
    world.b.dest.environment = {"VMFERRY_FAILPOINTS": "dest.recorded.owned=kill"}
    await world.b.dest.restart()
    await world.start(guest, world.a, world.b, address=link.address)
    await eventually(
        lambda: world.a.ledger.rights(guest.id).standing is Standing.HANDED_OFF, "it is handed off"
    )
    await eventually(lambda: not world.b.dest.running, "the destination was killed behind its record")
    world.b.dest.environment = {}
    copy = world.b.record(guest.id).process
    assert copy is not None
    copy.send_signal(signal.SIGSTOP)
    try:
        await world.b.dest.start()
        ran = await on(world, world.a.source, "recover", guest.spec.name, "--json")
        assert ran.code == ExitCode.UNKNOWN, ran.out + ran.err
        reasons = {who: end["inspection"]["machine"]["blockage"]["reason"] for who, end in ran.ends().items()}
        assert reasons == {"here": "PEER_NOT_RESUMED", "there": "NOT_RESUMED"}
    finally:
        copy.send_signal(signal.SIGCONT)
    done, seen = await settle(world, world.b.dest, guest.id)
    assert done == ["the guest is resumed here"]
    assert not seen.machine.HasField("blockage")
    assert (await settle(world, world.b.dest, guest.id))[0] == []
    ran = await on(world, world.a.source, "recover", guest.spec.name)
    assert ran.code == ExitCode.OK, ran.out + ran.err
    await guest.assert_clean(world.b)
    assert world.a.ledger.rights(guest.id).standing is Standing.GONE


async def test_a_machine_that_nobody_knows_is_not_found(world: World, guest: Guest) -> None:
    """By name or identity, at either service and without one: the catalogue's error, and code 4."""
    stranger = "6f1c7f5e-3b0e-4c57-9d53-2f6a6a1d8a01"
    for name in ("nobody", stranger, "../../etc"):
        for service in (world.a.source, world.a.dest):
            error = await refusal(inspect(world, service, name))
            assert error.reason == "MACHINE_NOT_FOUND"
            error = await refusal(settle(world, service, name))
            assert error.reason == "MACHINE_NOT_FOUND"
        ran = await run("recover", name, "--config", str(world.a.config_file))
        assert ran.code == ExitCode.PRECONDITION
        assert "MACHINE_NOT_FOUND" in ran.err
    assert not (world.a.config.journal_dir / stranger).exists()


async def test_a_running_machine_is_left_alone(world: World, guest: Guest) -> None:
    """Settling a machine that needs nothing does nothing, at either service of its host, however often."""
    for service in (world.a.source, world.a.dest, world.a.source):
        done, seen = await settle(world, service, guest.id)
        assert done == []
        assert not seen.machine.HasField("blockage")
    await guest.assert_clean(world.a)
    ran = await on(world, world.a.source, "recover", guest.spec.name)
    assert ran.code == ExitCode.OK
    assert "nothing is blocked" in ran.out


async def test_a_paused_guest_that_belongs_here_is_resumed_on_demand(world: World, guest: Guest) -> None:
    """Whatever left it paused: it is called blocked, with code 1 as nothing is unknown, until recover resumes it."""
    machine = world.a.directory.open(world.a.record(guest.id))
    try:
        await machine.stop()
    finally:
        await machine.close()
    shown = await on(world, world.a.source, "recover", guest.spec.name, "--show", "--json")
    assert shown.code == ExitCode.FAILED
    assert shown.ends()["here"]["inspection"]["machine"]["blockage"]["reason"] == "NOT_RESUMED"
    settled = await on(world, world.a.source, "recover", guest.spec.name, "--json")
    assert settled.code == ExitCode.OK, settled.out
    assert settled.ends()["here"]["done"] == ["the guest is resumed here"]
    await guest.assert_clean(world.a)


async def test_a_silent_hypervisor_keeps_nobody_from_saying_farewell(
    world: World, guest: Guest, link: Proxy
) -> None:
    """A start that cannot resume a guest tells the destination of its closed attempt all the same."""
    migration_id = await start_slowly(world, guest, link)
    link.cut = True
    link.reset_all()
    await world.ended(world.a, migration_id)
    await world.a.source.kill()
    hypervisor = world.a.record(guest.id).process
    assert hypervisor is not None
    hypervisor.send_signal(signal.SIGSTOP)
    try:
        link.heal()
        before = len(link.links)
        await world.a.source.start()
        await eventually(lambda: len(link.links) > before, "the destination is told")
    finally:
        hypervisor.send_signal(signal.SIGCONT)
    done, _ = await settle(world, world.a.source, guest.id)
    assert len(done) <= 1
    await guest.assert_clean(world.a)
