"""Callers, tickets and orders that must be turned down, and callers that go away.

After each the guest runs on where it was, undamaged, the other host holds nothing, and its next migration completes.
"""

from __future__ import annotations

import asyncio
import dataclasses
import uuid
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from tests.hostile.raw_source import Lane, Model, Request, raw_source
from tests.integration.hosts import Bystander, World, configured, migration_options
from tests.integration.services import DEADLINE_S, DOMAIN, Host, Service, refusal
from vmferry.security.authority import init_authority, issue
from vmferry.security.identity import Identity, Kind
from vmferry.security.tls import TlsFiles, open_channel
from vmferry.v1 import handoff_pb2, transfer_pb2
from vmferry.v1 import migration_pb2 as pb
from vmferry.v1.handoff_pb2_grpc import DestinationServiceStub
from vmferry.v1.migration_pb2_grpc import SourceServiceStub
from vmferry.v1.ticket_pb2 import SignedTicket

pytestmark = pytest.mark.usefixtures("tidy")


def services(world: World) -> list[tuple[Host, Service]]:
    return [(world.b, world.b.dest), (world.a, world.a.source)]


async def says_nothing(channel: grpc.aio.Channel) -> None:
    """Neither service answers anything on this channel."""
    for call in (
        DestinationServiceStub(channel).Negotiate(handoff_pb2.NegotiateRequest(), timeout=3),
        SourceServiceStub(channel).ListMachines(pb.ListMachinesRequest(), timeout=3),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert not caught.value.trailing_metadata()


async def test_plaintext_gets_no_answer(world: World, bystander: Bystander) -> None:
    """Without TLS not a word is spoken."""
    for _, service in services(world):
        async with grpc.aio.insecure_channel(service.address) as channel:
            await says_nothing(channel)
    await bystander.assert_unharmed()


async def test_no_client_certificate_gets_no_answer(world: World, bystander: Bystander) -> None:
    """A caller who trusts the right authority and shows nothing itself is not let in."""
    credentials = grpc.ssl_channel_credentials(world.material("a").ca_pem)
    for host, service in services(world):
        options = [("grpc.ssl_target_name_override", host.identity.server_name)]
        async with grpc.aio.secure_channel(service.address, credentials, options=options) as channel:
            await says_nothing(channel)
    await bystander.assert_unharmed()


async def test_a_certificate_of_another_authority_gets_no_answer(
    world: World, bystander: Bystander, tmp_path: Path
) -> None:
    """The same name from an authority of the same trust domain's name is not the same identity."""
    init_authority(tmp_path / "ca", DOMAIN)
    issue(tmp_path / "ca", world.a.identity, tmp_path / "a")
    forged = dataclasses.replace(TlsFiles(tmp_path / "a").load(), ca_pem=world.material("a").ca_pem)
    for host, service in services(world):
        async with open_channel(service.address, host.identity, forged) as channel:
            await says_nothing(channel)
    await bystander.assert_unharmed()


async def test_a_foreign_host_cannot_act_for_the_source(
    world: World, bystander: Bystander, model: Model
) -> None:
    """Host c, with ticket, secret and identity of the attempt, is refused in every call: its certificate says c."""
    async with (
        raw_source(world, world.b, model) as source,
        open_channel(world.b.dest.address, world.b.identity, world.material("c")) as channel,
    ):
        stub = DestinationServiceStub(channel)
        error = await refusal(stub.Begin(source.begin_request()))
        assert error.reason == "PERMISSION_DENIED"
        source_as_c = handoff_pb2.AttemptRef()
        source_as_c.CopyFrom(source.ref)
        source_as_c.source = Identity(DOMAIN, Kind.VMHOST, "c").uri
        error = await refusal(stub.Begin(source.begin_request(attempt=source_as_c)))
        assert (error.reason, error.field) == ("TICKET_INVALID", "source")
        assert not world.b.holdings(source.spec)

        await source.begin()
        calls: tuple[Awaitable[object], ...] = (
            stub.Begin(source.begin_request()),
            stub.Seal(handoff_pb2.SealRequest(attempt=source.ref, digest=source.digest)),
            stub.Go(handoff_pb2.GoRequest(attempt=source.ref, digest=source.digest)),
            stub.GetAttempt(handoff_pb2.GetAttemptRequest(attempt=source.ref)),
            stub.Abort(handoff_pb2.AbortRequest(attempt=source.ref)),
        )
        for call in calls:
            assert (await refusal(call)).reason == "PERMISSION_DENIED"
        opening = transfer_pb2.LaneOpen(migration_id=source.ref.migration_id, transfer_token=source.token)
        stream: Any = stub.Transfer(timeout=DEADLINE_S)  # type: ignore[call-arg]  # written to by hand
        assert (await refusal(Lane(stream).send_raw(Request(open=opening)))).reason == "PERMISSION_DENIED"
        assert (await source.status()).state == handoff_pb2.ATTEMPT_STATE_RECEIVING
    await bystander.assert_unharmed()


@pytest.mark.parametrize("who", ["a", "b", "c"])
async def test_hosts_cannot_order_migrations(world: World, bystander: Bystander, who: str) -> None:
    """A host's certificate, even the source's own, opens no call of the source service."""
    here, there = bystander.here, bystander.there
    async with world.source(here, who) as stub:
        machine = pb.GetMachineRequest(machine=bystander.guest.id)
        order = world.order(bystander.guest, here, there)
        plan = pb.PlanMigrationRequest(machine=order.machine, destination=order.destination)
        calls: tuple[Awaitable[object], ...] = (
            stub.GetMachine(machine),
            stub.ListMachines(pb.ListMachinesRequest()),
            stub.ListMigrations(pb.ListMigrationsRequest()),
            stub.StartMigration(order),
            stub.PlanMigration(plan),
            stub.GetMigration(pb.GetMigrationRequest(id="x")),
            stub.CancelMigration(pb.CancelMigrationRequest(id="x")),
            stub.UpdateMigration(pb.UpdateMigrationRequest(id="x")),
            anext(aiter(stub.WatchMigration(pb.WatchMigrationRequest(id="x")))),
        )
        for call in calls:
            assert (await refusal(call)).reason == "PERMISSION_DENIED"
    await bystander.assert_unharmed()


async def test_an_operator_cannot_play_the_source(world: World, bystander: Bystander, model: Model) -> None:
    """Controllers and admins may ask how an attempt stands, and nothing else of the destination."""
    async with raw_source(world, world.b, model, "admin") as source:
        for call in (
            lambda: source.stub.Negotiate(handoff_pb2.NegotiateRequest()),
            lambda: source.stub.Measure(iter([handoff_pb2.MeasureRequest()])),
            lambda: source.stub.Begin(source.begin_request()),
            source.seal,
            source.go,
            source.abort,
        ):
            assert (await refusal(call())).reason == "PERMISSION_DENIED"
        assert (await source.status()).state == handoff_pb2.ATTEMPT_STATE_UNSEEN
    await bystander.assert_unharmed()


async def test_another_host_at_the_address_is_noticed(world: World, bystander: Bystander) -> None:
    """When the destination that answers is not the one that was named, nothing is sent to it."""
    guest, here, there = bystander.guest, bystander.here, bystander.there
    other = Identity(DOMAIN, Kind.VMHOST, "c")
    ticket = world.ticket(guest, here, there, destination=other)
    order = world.order(guest, here, there, ticket=ticket)
    order.destination.host = other.uri
    async with world.source(here) as stub:
        plan = pb.PlanMigrationRequest(machine=guest.id, destination=order.destination)
        error = await refusal(stub.PlanMigration(plan))
        assert (error.reason, error.field) == ("PEER_IDENTITY", "destination.host")
        started = (await stub.StartMigration(order)).migration
    migration = await world.ended(here, started.id)
    assert migration.outcome == pb.MIGRATION_OUTCOME_FAILED
    assert migration.reason.reason == "PEER_IDENTITY"
    assert guest.id not in there.ledger.machines() or not there.holdings(guest.spec)
    await bystander.assert_unharmed()


async def test_an_address_where_nobody_listens_is_told_so(world: World, bystander: Bystander) -> None:
    """A destination that is not there fails the migration by name, soon."""
    guest, here, there = bystander.guest, bystander.here, bystander.there
    migration = await world.migrate(guest, here, there, address="127.0.0.1:1")
    assert migration.outcome == pb.MIGRATION_OUTCOME_FAILED
    assert migration.reason.reason == "PEER_UNREACHABLE"
    await bystander.assert_unharmed()


def tampered(ticket: bytes) -> bytes:
    signed = SignedTicket.FromString(ticket)
    signed.ticket = signed.ticket[:-1] + bytes([signed.ticket[-1] ^ 1])
    return signed.SerializeToString()


def unsigned(ticket: bytes) -> bytes:
    signed = SignedTicket.FromString(ticket)
    signed.signature = b""
    return signed.SerializeToString()


async def test_a_ticket_for_something_else_moves_nothing(world: World, bystander: Bystander) -> None:
    """Expired, early, for another machine, host or size, changed, unsigned, rubbish: each is refused by name."""
    guest, here, there = bystander.guest, bystander.here, bystander.there
    hour = timedelta(hours=1)
    good = world.ticket(guest, here, there)

    def ticket(**changes: Any) -> bytes:
        return world.ticket(guest, here, there, **changes)

    offences: dict[str, tuple[bytes, str, str]] = {
        "expired": (ticket(now=datetime.now(UTC) - hour), "TICKET_EXPIRED", "start_by"),
        "early": (ticket(now=datetime.now(UTC) + hour), "TICKET_EXPIRED", "not_before"),
        "machine": (ticket(machine_id=str(uuid.uuid4())), "TICKET_INVALID", "machine_id"),
        "source": (ticket(source=Identity(DOMAIN, Kind.VMHOST, "c")), "TICKET_INVALID", "source"),
        "destination": (
            ticket(destination=Identity(DOMAIN, Kind.VMHOST, "c")),
            "TICKET_INVALID",
            "destination",
        ),
        "memory": (ticket(max_memory_bytes=1), "TICKET_INVALID", "max_memory_bytes"),
        "key": (ticket(source_key_sha256=bytes(32)), "TICKET_INVALID", "source_key_sha256"),
        "changed": (tampered(good), "TICKET_INVALID", "signature"),
        "unsigned": (unsigned(good), "TICKET_INVALID", "signature"),
        "rubbish": (b"\xff" * 100, "TICKET_INVALID", "ticket"),
        "endless": (b"\x0a" * 100_000, "TICKET_INVALID", "ticket"),
        "missing": (b"", "INVALID_ARGUMENT", "ticket"),
    }
    async with world.source(here) as stub:
        for name, (wrong, reason, field) in offences.items():
            order = world.order(guest, here, there, ticket=good)
            order.ticket = wrong
            error = await refusal(stub.StartMigration(order))
            assert (error.reason, error.field) == (reason, field), name
        listed = await stub.ListMigrations(pb.ListMigrationsRequest(open_only=True))
        assert not listed.migrations
    await bystander.assert_unharmed()


async def test_a_destination_checks_the_ticket_for_itself(
    world: World, bystander: Bystander, model: Model
) -> None:
    """A source that does not care about tickets gets no further with a bad one."""
    async with raw_source(world, world.b, model) as source:
        migration_id = source.ref.migration_id
        c = Identity(DOMAIN, Kind.VMHOST, "c")
        for changes, reason, field in (
            ({"now": datetime.now(UTC) - timedelta(hours=1)}, "TICKET_EXPIRED", "start_by"),
            ({"machine_id": str(uuid.uuid4())}, "TICKET_INVALID", "machine_id"),
            ({"destination": c}, "TICKET_INVALID", "destination"),
            ({"source": c}, "TICKET_INVALID", "source"),
            ({"destination_key_sha256": bytes(32)}, "TICKET_INVALID", "destination_key_sha256"),
            ({"migration_id": bytes(16)}, "INVALID_ARGUMENT", "attempt.migration_id"),
        ):
            values: dict[str, Any] = {"migration_id": migration_id} | changes
            ticket = world.ticket(source.guest, world.a, world.b, **values)
            error = await refusal(source.stub.Begin(source.begin_request(ticket=ticket)))
            assert (error.reason, error.field) == (reason, field)
        assert source.spec.uuid not in world.b.ledger.machines()
    await bystander.assert_unharmed()


async def test_a_ticket_starts_one_migration(world: World, bystander: Bystander) -> None:
    """After a migration that was cancelled its ticket is used up; the migration it started is still told."""
    guest, here, there = bystander.guest, bystander.here, bystander.there
    ticket = world.ticket(guest, here, there)
    async with world.source(here) as stub:
        started = (await stub.StartMigration(world.order(guest, here, there, ticket=ticket))).migration
        await stub.CancelMigration(pb.CancelMigrationRequest(id=started.id))
        ended = await world.ended(here, started.id)
        assert ended.outcome == pb.MIGRATION_OUTCOME_CANCELLED
        error = await refusal(stub.StartMigration(world.order(guest, here, there, ticket=ticket)))
        assert error.reason == "TICKET_USED"
        assert (await stub.GetMigration(pb.GetMigrationRequest(id=started.id))).migration == ended
    await bystander.assert_unharmed()


async def test_the_destination_remembers_a_ticket_that_the_source_has_forgotten(
    world: World, bystander: Bystander
) -> None:
    """A source that lost its memory of migrations knows none; the destination's journal knows the ticket."""
    guest, here, there = bystander.guest, bystander.here, bystander.there
    ticket = world.ticket(guest, here, there)
    migration_id = await world.start(guest, here, there, ticket=ticket, max_bandwidth=262_144)
    await world.enters(here, migration_id, pb.MIGRATION_PHASE_PRECOPYING)
    async with world.source(here) as stub:
        await stub.CancelMigration(pb.CancelMigrationRequest(id=migration_id))
    await world.ended(here, migration_id)
    await here.source.stop()
    memory = list(here.config.state_dir.glob("source.sqlite3*"))
    assert memory
    for file in memory:
        file.unlink()
    await here.source.start()
    migration = await world.migrate(guest, here, there, ticket=ticket)
    assert migration.outcome == pb.MIGRATION_OUTCOME_FAILED
    assert migration.reason.reason == "TICKET_USED"
    await bystander.assert_unharmed()


def misshapen(world: World, bystander: Bystander) -> dict[str, Callable[[Any], Awaitable[object]]]:
    """A call for every field of the source service that can be wrong, by the field's name."""
    guest, here, there = bystander.guest, bystander.here, bystander.there

    def start(**changes: Any) -> Callable[[Any], Awaitable[object]]:
        order = world.order(guest, here, there)
        for name, value in changes.items():
            part, _, last = name.rpartition("__")
            setattr(getattr(order, part) if part else order, last, value)
        return lambda stub: stub.StartMigration(order)

    def options(**changes: Any) -> Callable[[Any], Awaitable[object]]:
        order = world.order(guest, here, there)
        order.options.CopyFrom(migration_options(**changes))
        return lambda stub: stub.StartMigration(order)

    destination = pb.Destination(host=there.identity.uri, address=there.dest.address)
    return {
        "request_id": start(request_id=""),
        "request_id ": start(request_id="one"),
        "machine": start(machine=""),
        "destination.host": start(destination__host=""),
        "destination.host ": start(destination__host="http://example.org/vmhost/b"),
        "destination.host  ": start(destination__host=f"spiffe://{DOMAIN}/admin/b"),
        "destination.host   ": start(destination__host="spiffe://elsewhere.example/vmhost/b"),
        "destination.host    ": start(destination__host=here.identity.uri),
        "destination.address": start(destination__address=""),
        "destination.address ": start(destination__address="b:99999"),
        "destination.address  ": start(destination__address="unix:/run/x"),
        "options.lanes": start(options__lanes=1),
        "options.lanes ": start(options__lanes=17),
        "options.verify": start(options__verify=77),
        "options.tracker": start(options__tracker="guess"),
        "options.path": start(options__path="by air"),
        "options.tracker ": options(path="stream", tracker="hash"),
        "options.downtime_limit": options(downtime_limit=-1.0),
        "options.total_timeout": options(total_timeout=0.0),
        "options.stall_timeout": options(stall_timeout=-0.5),
        "options.reserve_timeout": options(reserve_timeout=0.0),
        "options.reserve_timeout ": options(reserve_timeout=315_576_000_000.0),
        "options.downtime_limit ": options(downtime_limit=9e9),
        "options.max_bandwidth": options(max_bandwidth=262_143),
        "options.switchover_bandwidth": options(switchover_bandwidth=1),
        "options.max_throttle_percent": options(max_throttle_percent=96),
        "options.on_no_convergence": options(on_no_convergence=77),
        "options.max_downtime": options(max_downtime=0.2),
        "options.max_downtime ": options(max_downtime=-1.0),
        "machine ": lambda stub: stub.PlanMigration(pb.PlanMigrationRequest(destination=destination)),
        "destination.host     ": lambda stub: stub.PlanMigration(pb.PlanMigrationRequest(machine=guest.id)),
        "machine  ": lambda stub: stub.GetMachine(pb.GetMachineRequest()),
        "id": lambda stub: stub.GetMigration(pb.GetMigrationRequest()),
        "id ": lambda stub: stub.CancelMigration(pb.CancelMigrationRequest()),
        "id   ": lambda stub: stub.UpdateMigration(pb.UpdateMigrationRequest()),
        "id  ": lambda stub: anext(aiter(stub.WatchMigration(pb.WatchMigrationRequest()))),
        "page_size": lambda stub: stub.ListMachines(pb.ListMachinesRequest(page_size=-1)),
        "page_size ": lambda stub: stub.ListMigrations(pb.ListMigrationsRequest(page_size=-1)),
        "page_token": lambda stub: stub.ListMachines(pb.ListMachinesRequest(page_token="-1")),
        "page_token ": lambda stub: stub.ListMigrations(pb.ListMigrationsRequest(page_token="\u00b2")),
        "page_token  ": lambda stub: stub.ListMachines(pb.ListMachinesRequest(page_token="9" * 5000)),
    }


async def test_every_wrong_field_is_named(world: World, bystander: Bystander) -> None:
    """Each call with one wrong field is INVALID_ARGUMENT with a BadRequest for exactly this field and a remedy."""
    async with world.source(bystander.here) as stub:
        for name, call in misshapen(world, bystander).items():
            error = await refusal(call(stub))
            assert (error.reason, error.field) == ("INVALID_ARGUMENT", name.strip()), name
            assert error.instance_remedy, name
    await bystander.assert_unharmed()


@pytest.mark.parametrize("name", ["nobody", "../../etc/passwd", "a\0b", "\u00b2", "x" * 1_000_000])
async def test_what_is_not_there_is_said_so(world: World, bystander: Bystander, name: str) -> None:
    """Unknown machines and migrations are NOT_FOUND by name, whatever they are called."""
    guest, here, there = bystander.guest, bystander.here, bystander.there
    order = world.order(guest, here, there)
    order.machine = name
    async with world.source(here) as stub:
        machines: tuple[Awaitable[object], ...] = (
            stub.StartMigration(order),
            stub.GetMachine(pb.GetMachineRequest(machine=name)),
            stub.PlanMigration(pb.PlanMigrationRequest(machine=name, destination=order.destination)),
        )
        for call in machines:
            assert (await refusal(call)).reason == "MACHINE_NOT_FOUND"
        migrations: tuple[Awaitable[object], ...] = (
            stub.GetMigration(pb.GetMigrationRequest(id=name)),
            stub.CancelMigration(pb.CancelMigrationRequest(id=name)),
            stub.UpdateMigration(pb.UpdateMigrationRequest(id=name)),
            anext(aiter(stub.WatchMigration(pb.WatchMigrationRequest(id=name)))),
        )
        for call in migrations:
            assert (await refusal(call)).reason == "MIGRATION_NOT_FOUND"
        assert not (await stub.ListMigrations(pb.ListMigrationsRequest(machine=name))).migrations
    await bystander.assert_unharmed()


async def test_a_year_is_a_limit_like_any_other(world: World, bystander: Bystander) -> None:
    """The longest times that are taken work in every place they go to."""
    year = 366 * 24 * 3600.0
    await bystander.assert_crosses(
        downtime_limit=year, total_timeout=year, stall_timeout=year, reserve_timeout=year
    )


async def test_a_destination_without_room_is_told_before_anything_starts(
    world: World, bystander: Bystander, model: Model
) -> None:
    """With more headroom than the host has, the plan, the migration and a bare Begin all name the memory."""
    guest, here, there = bystander.guest, bystander.here, bystander.there
    async with configured(there.dest, memory_headroom_mib=10_000_000):
        order = world.order(guest, here, there)
        async with world.source(here) as stub:
            plan = pb.PlanMigrationRequest(machine=guest.id, destination=order.destination)
            report = (await stub.PlanMigration(plan)).report
        assert not report.compatible
        assert [item.id for item in report.items if item.severity == 3] == ["memory.insufficient"]
        migration = await world.migrate(guest, here, there)
        assert migration.reason.reason == "INCOMPATIBLE"
        assert "memory.insufficient" in migration.reason.message
        if there is world.b:
            async with raw_source(world, there, model) as source:
                error = await refusal(source.stub.Begin(source.begin_request()))
            assert (error.reason, error.field) == ("INSUFFICIENT_MEMORY", "spec.memory_mib")
            assert source.spec.uuid not in there.ledger.machines()
    await bystander.assert_unharmed()


async def test_a_caller_that_hangs_up_changes_nothing(world: World, bystander: Bystander) -> None:
    """StartMigration cut off at any moment has started its migration or not; asking again tells, and starts one."""
    guest = bystander.guest
    for delay_ms in (0, 1, 3, 10):
        here, there = bystander.here, bystander.there
        order = world.order(guest, here, there)
        async with world.source(here) as stub:
            call: Any = stub.StartMigration(order)
            await asyncio.sleep(delay_ms / 1000)
            call.cancel()
            migration = (await stub.StartMigration(order)).migration
        ended = await world.ended(here, migration.id)
        assert ended.outcome == pb.MIGRATION_OUTCOME_COMPLETED, ended
        bystander.turn()
    await bystander.assert_unharmed()


async def test_watchers_come_and_go_as_they_like(world: World, bystander: Bystander) -> None:
    """Watchers that vanish in the middle neither stop the migration nor stay in the service."""
    guest, here, there = bystander.guest, bystander.here, bystander.there
    migration_id = await world.start(guest, here, there)
    for _ in range(5):
        async with world.source(here) as stub:
            watching: Any = stub.WatchMigration(pb.WatchMigrationRequest(id=migration_id))
            assert (await anext(aiter(watching))).migration.id == migration_id
            watching.cancel()
    ended = await world.ended(here, migration_id)
    assert ended.outcome == pb.MIGRATION_OUTCOME_COMPLETED
    bystander.turn()
    await bystander.assert_unharmed()
