"""The client of a source service, over real TLS, against a service that answers by script."""

from __future__ import annotations

import threading
import uuid
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import pytest

from tests.unit.cli.fake_source import HOST_A, HOST_B, MACHINE_ID, MIGRATION_ID, FakeSource, migration
from vmferry.client import BlockingSourceClient, Patience, SourceClient, Target, Tries
from vmferry.errors import (
    InvalidArgumentError,
    MachineNotFoundError,
    OutcomeUnknownError,
    PeerIdentityError,
    PeerUnreachableError,
    PointOfNoReturnError,
    ServiceStoppingError,
    TicketInvalidError,
)
from vmferry.v1 import migration_pb2 as pb
from vmferry.v1.ticket_pb2 import SignedTicket, Ticket

THERE = Target(HOST_B, "127.0.0.1:1")
QUICK = Tries(attempts=4, pause_s=0.01)
IMPATIENT = Patience(reconnect_s=0.2, unknown_s=0.2, retry_s=0.02)
AWAY = ServiceStoppingError("the service is stopping")


@pytest.fixture
async def client(source: FakeSource, certificates: Path) -> AsyncIterator[SourceClient]:
    """A client that tries again at once."""
    async with SourceClient.open(source.address, HOST_A, certificates / "operator", tries=QUICK) as opened:
        yield opened


async def test_a_migration_is_started_once_however_often_the_answer_is_lost(
    client: SourceClient,
    source: FakeSource,
) -> None:
    """Three lost answers: the same request id and the same ticket come four times, and the caller sees a success."""
    source.lost_answers = 3

    started = await client.start("web-1", THERE)

    assert started.id == MIGRATION_ID
    assert len(source.requests) == 4
    assert len({(request.request_id, request.ticket) for request in source.requests}) == 1
    assert len(source.tickets) == 1


async def test_a_ticket_is_renewed_for_as_long_as_it_waits(client: SourceClient, source: FakeSource) -> None:
    """Each is for the same migration and a new one; a lost answer costs one of them, and it ends with the queue."""
    waiting = migration(phase=pb.MIGRATION_PHASE_QUEUED)
    source.migrations = [waiting]
    source.updates = [waiting, AWAY, waiting, migration()]

    await client.keep_ticket(waiting, every_s=0.01)

    assert len(source.requests) == 4
    tickets = [SignedTicket.FromString(request.ticket).ticket for request in source.requests]
    read = [Ticket.FromString(ticket) for ticket in tickets]
    assert {one.migration_id.hex() for one in read} == {MIGRATION_ID}
    assert len({one.nonce for one in read}) == 4
    assert {one.destination for one in read} == {HOST_B}


async def test_a_start_whose_answer_stays_lost_says_that_it_may_have_begun(
    client: SourceClient,
    source: FakeSource,
) -> None:
    """The error is UNREACHABLE and carries the request id with which the call can be repeated without harm."""
    source.lost_answers = 100
    request_id = str(uuid.uuid4())

    with pytest.raises(PeerUnreachableError) as caught:
        await client.start("web-1", THERE, request_id=request_id)

    assert request_id in caught.value.instance_remedy
    assert len(source.requests) == QUICK.attempts


async def test_a_refusal_is_raised_as_the_catalogues_error_and_not_repeated(
    client: SourceClient,
    source: FakeSource,
) -> None:
    """What the service said is what is raised, by class and field, after one call."""
    with pytest.raises(MachineNotFoundError) as caught:
        await client.plan("nobody", THERE)
    assert caught.value.field == "machine"
    source.migrations[0].phase = pb.MIGRATION_PHASE_HANDING_OFF
    with pytest.raises(PointOfNoReturnError):
        await client.cancel(MIGRATION_ID)
    assert source.requests == []


async def test_a_ticket_made_elsewhere_is_sent_as_it_is(client: SourceClient, source: FakeSource) -> None:
    """The client's own key is not used for it, and the machine is not even looked up."""
    with pytest.raises(TicketInvalidError):
        await client.start("web-1", THERE, ticket=b"of somebody else")
    assert source.requests[0].ticket == b"of somebody else"
    assert source.requests[0].machine == "web-1"


async def test_a_watch_goes_on_over_lost_connections(client: SourceClient, source: FakeSource) -> None:
    """Every state arrives once and in order, and each loss is told."""
    source.script = [
        migration(),
        AWAY,
        AWAY,
        migration(current_round=2),
        migration(outcome=pb.MIGRATION_OUTCOME_COMPLETED),
    ]
    lost = list[str]()

    seen = [
        one.progress.round if one.phase != pb.MIGRATION_PHASE_ENDED else "ended"
        async for one in client.watch(MIGRATION_ID, patience=IMPATIENT, on_lost=lambda: lost.append("lost"))
    ]

    assert seen == [1, 2, "ended"]
    assert lost == ["lost"]


async def test_a_watch_of_a_service_that_stays_away_ends_in_an_error(
    client: SourceClient,
    source: FakeSource,
) -> None:
    """Silence is never an outcome."""
    source.script = [migration(), *[AWAY] * 1000]

    with pytest.raises(PeerUnreachableError, match="may go on"):
        await client.wait(MIGRATION_ID, patience=IMPATIENT)


async def test_an_outcome_that_stays_unknown_is_returned_as_unknown(
    client: SourceClient,
    source: FakeSource,
) -> None:
    """Neither failed nor completed, after the time that the caller gave."""
    unknown = pb.MIGRATION_OUTCOME_UNKNOWN
    source.script = [migration(outcome=unknown, reason=OutcomeUnknownError("no answer to Go"))]

    found = await client.migrate("web-1", THERE, patience=IMPATIENT)

    assert found.outcome == unknown


async def test_limits_are_set_in_their_units_and_the_rest_is_left(
    client: SourceClient,
    source: FakeSource,
) -> None:
    """What is not given is absent from the request; zero is not absent."""
    await client.set_limits(MIGRATION_ID, max_bandwidth=0, max_downtime=timedelta(milliseconds=900))

    request = source.requests[0]
    assert request.HasField("max_bandwidth")
    assert request.max_downtime.ToMilliseconds() == 900
    assert not request.HasField("switchover_bandwidth")
    assert not request.HasField("downtime_limit")


async def test_all_pages_of_the_history_are_read(client: SourceClient, source: FakeSource) -> None:
    """The service has two migrations and gives one to a page."""
    assert len(await client.history()) == 2
    assert len(await client.history(open_only=True)) == 1


async def test_another_host_than_the_named_is_not_talked_to(source: FakeSource, certificates: Path) -> None:
    """The certificate of whoever answers is compared with the identity that was asked for."""
    operator = certificates / "operator"
    async with SourceClient.open(source.address, HOST_B, operator, tries=QUICK) as wrong:
        with pytest.raises(PeerIdentityError):
            await wrong.list_machines()


@pytest.mark.parametrize(
    ("address", "host"), [("nowhere", HOST_A), ("a:1", "spiffe://test.example/admin/jane")]
)
async def test_a_malformed_place_is_refused_before_anything_is_sent(
    certificates: Path,
    address: str,
    host: str,
) -> None:
    """Address and identity are checked when the client is opened, and a target when it is used."""
    with pytest.raises(InvalidArgumentError):
        async with SourceClient.open(address, host, certificates / "operator"):
            pytest.fail("it was opened")
    with pytest.raises(InvalidArgumentError):
        Target(host if "admin" in host else HOST_B, address).message()


def test_the_waiting_client_does_the_same_and_leaves_no_thread(
    source: FakeSource, certificates: Path
) -> None:
    """Machines, a migration with its states, an error of the catalogue; its thread is gone afterwards."""
    source.script = [migration(), migration(outcome=pb.MIGRATION_OUTCOME_COMPLETED)]
    before = set(threading.enumerate())
    states = list[pb.Migration]()

    with BlockingSourceClient(source.address, HOST_A, certificates / "operator") as client:
        assert [machine.uuid for machine in client.list_machines()] == [MACHINE_ID]
        started = client.start("web-1", THERE)
        ended = client.wait(started.id, show=states.append)
        with pytest.raises(MachineNotFoundError):
            client.get_machine("nobody")

    assert ended.outcome == pb.MIGRATION_OUTCOME_COMPLETED
    assert [one.outcome for one in states][-1] == pb.MIGRATION_OUTCOME_COMPLETED
    assert {
        thread.name for thread in set(threading.enumerate()) - before if "vmferry" in thread.name
    } == set()
