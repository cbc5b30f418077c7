"""Warrants: what a source may make of one, and everything that a destination refuses."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from vmferry.errors import InvalidArgumentError, TicketExpiredError, TicketInvalidError
from vmferry.security.authority import init_authority, issue
from vmferry.security.identity import Identity
from vmferry.security.tickets import MAX_VALID_S, TicketSigner, open_ticket
from vmferry.security.warrants import (
    MAX_WARRANT_S,
    Allowance,
    issue_warrant,
    open_permission,
    open_warrant,
)
from vmferry.v1.ticket_pb2 import SignedTicket, SignedWarrant, Ticket, Warrant

A, B, C = (Identity.parse(f"spiffe://test.example/vmhost/{name}") for name in "abc")
MACHINE = "1b4e28ba-2fa1-41d2-883f-0016d3cca427"
OTHER = "1b4e28ba-2fa1-41d2-883f-0016d3cca428"
LARGEST = Allowance(64 << 20, 2)
NOW = datetime.now(UTC) + timedelta(hours=12)
"""Within the time of certificates that are issued when the tests run, however long after their collection that is."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority with a controller, and another one that nobody trusts."""
    root = tmp_path_factory.mktemp("warrants")
    for ca in ("ca", "foreign"):
        init_authority(root / ca, "test.example")
        issue(root / ca, Identity.parse("spiffe://test.example/controller/nova"), root / f"{ca}-nova")
    return root


@pytest.fixture(scope="module")
def ca_pem(folder: Path) -> bytes:
    """The authority that hosts trust."""
    return (folder / "ca-nova" / "ca.pem").read_bytes()


@pytest.fixture(scope="module")
def signer(folder: Path) -> TicketSigner:
    """The controller's key."""
    return TicketSigner.load(folder / "ca-nova")


@pytest.fixture
def warrant(signer: TicketSigner) -> bytes:
    """For one machine from a to b."""
    return issue_warrant(signer, source=A, destinations=[B], machines={MACHINE: LARGEST}, now=NOW)


def test_a_source_makes_out_tickets_that_its_destination_accepts_each_once(
    warrant: bytes, ca_pem: bytes
) -> None:
    """Each has numbers of its own, lives as shortly as any ticket, and says who stands behind it."""
    opened = open_warrant(warrant, ca_pem=ca_pem, now=NOW)

    made = [opened.make_ticket(machine_id=MACHINE, destination=B, now=NOW) for _ in range(2)]
    tickets = [open_permission(one, ca_pem=ca_pem, now=NOW) for one in made]

    for ticket in tickets:
        ticket.check(
            machine_id=MACHINE, source=A, destination=B, memory_bytes=64 << 20, vcpus=2, source_key_sha256=b""
        )
        assert ticket.start_by - ticket.not_before == timedelta(seconds=MAX_VALID_S)
        assert ticket.signer.name == "nova"
    assert len({ticket.nonce for ticket in tickets}) == 2
    assert len({ticket.migration_id for ticket in tickets}) == 2
    with pytest.raises(TicketInvalidError):
        tickets[0].check(
            machine_id=MACHINE, source=C, destination=B, memory_bytes=1, vcpus=1, source_key_sha256=b""
        )


def test_a_ticket_by_warrant_is_none_where_only_signed_ones_count(warrant: bytes, ca_pem: bytes) -> None:
    """A caller from outside cannot start a migration by a warrant that it got hold of."""
    opened = open_warrant(warrant, ca_pem=ca_pem, now=NOW)
    made = opened.make_ticket(machine_id=MACHINE, destination=B, now=NOW)

    with pytest.raises(TicketInvalidError):
        open_permission(made, ca_pem=ca_pem, now=NOW, by_warrant=False)
    with pytest.raises(TicketInvalidError):
        open_ticket(made, ca_pem=ca_pem, now=NOW)


def test_a_signed_ticket_is_as_good_as_ever(signer: TicketSigner, ca_pem: bytes) -> None:
    """With and without warrants being allowed."""
    ticket = signer.issue(
        machine_id=MACHINE, source=A, destination=B, max_memory_bytes=1, max_vcpus=1, now=NOW
    )
    for by_warrant in (True, False):
        assert open_permission(ticket, ca_pem=ca_pem, now=NOW, by_warrant=by_warrant).machine_id == MACHINE


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda ticket: setattr(ticket, "machine_id", OTHER), "machine_id"),
        (lambda ticket: setattr(ticket, "source", C.uri), "source"),
        (lambda ticket: setattr(ticket, "destination", C.uri), "destination"),
        (lambda ticket: setattr(ticket, "max_memory_bytes", (64 << 20) + 1), "max_memory_bytes"),
        (lambda ticket: setattr(ticket, "max_vcpus", 3), "max_memory_bytes"),
        (lambda ticket: ticket.not_before.FromDatetime(NOW - timedelta(seconds=5)), "start_by"),
        (lambda ticket: setattr(ticket, "nonce", b"short"), "nonce"),
    ],
)
def test_what_goes_beyond_the_warrant_is_refused(
    warrant: bytes, ca_pem: bytes, change: Callable[[Ticket], None], field: str
) -> None:
    """A source that makes out more than it was allowed gets nowhere, whatever it changes."""
    opened = open_warrant(warrant, ca_pem=ca_pem, now=NOW)
    signed = SignedTicket.FromString(opened.make_ticket(machine_id=MACHINE, destination=B, now=NOW))
    ticket = Ticket.FromString(signed.ticket)
    change(ticket)
    signed.ticket = ticket.SerializeToString()

    with pytest.raises(TicketInvalidError) as caught:
        open_permission(signed.SerializeToString(), ca_pem=ca_pem, now=NOW)
    assert caught.value.field == field


def test_a_ticket_does_not_outlive_its_warrant(signer: TicketSigner, ca_pem: bytes) -> None:
    """Near the end of the warrant tickets get shorter; afterwards there are none, and old ones do not count."""
    data = issue_warrant(signer, source=A, destinations=[B], machines={MACHINE: LARGEST}, valid_s=60, now=NOW)
    opened = open_warrant(data, ca_pem=ca_pem, now=NOW)
    made = opened.make_ticket(machine_id=MACHINE, destination=B, now=NOW + timedelta(seconds=50))

    assert open_permission(made, ca_pem=ca_pem, now=NOW + timedelta(seconds=59)).start_by == opened.expires
    late = NOW + timedelta(seconds=120)
    with pytest.raises(TicketExpiredError):
        opened.make_ticket(machine_id=MACHINE, destination=B, now=late)
    with pytest.raises(TicketExpiredError):
        open_permission(made, ca_pem=ca_pem, now=late)
    with pytest.raises(TicketExpiredError):
        open_warrant(data, ca_pem=ca_pem, now=NOW - timedelta(seconds=120))


def test_a_source_makes_no_ticket_that_would_be_refused(warrant: bytes, ca_pem: bytes) -> None:
    """For a machine, or a host, that is not named."""
    opened = open_warrant(warrant, ca_pem=ca_pem, now=NOW)
    with pytest.raises(TicketInvalidError):
        opened.make_ticket(machine_id=OTHER, destination=B, now=NOW)
    with pytest.raises(TicketInvalidError):
        opened.make_ticket(machine_id=MACHINE, destination=C, now=NOW)


def test_a_changed_or_foreign_warrant_is_refused(
    warrant: bytes, ca_pem: bytes, folder: Path, signer: TicketSigner
) -> None:
    """One bit, another authority's signer, a ticket's signature, or garbage."""
    signed = SignedWarrant.FromString(warrant)
    inner = Warrant.FromString(signed.warrant)
    inner.destinations.append(C.uri)
    changed = SignedWarrant(
        warrant=inner.SerializeToString(),
        signature=signed.signature,
        signer_certificate=signed.signer_certificate,
    ).SerializeToString()
    foreign = issue_warrant(
        TicketSigner.load(folder / "foreign-nova"),
        source=A,
        destinations=[B],
        machines={MACHINE: LARGEST},
        now=NOW,
    )
    as_ticket = signer.prove(b"vmferry ticket v1\0", signed.warrant)
    mistaken = SignedWarrant(
        warrant=as_ticket.data,
        signature=as_ticket.signature,
        signer_certificate=as_ticket.certificate,
    ).SerializeToString()
    for bad in (changed, foreign, mistaken, b"\xff" * 40, b"", b"\x0a" * 200_000):
        with pytest.raises(TicketInvalidError):
            open_warrant(bad, ca_pem=ca_pem, now=NOW)


def test_a_ticket_with_both_proofs_is_refused(warrant: bytes, ca_pem: bytes) -> None:
    """Nobody has to think about which one counts."""
    opened = open_warrant(warrant, ca_pem=ca_pem, now=NOW)
    signed = SignedTicket.FromString(opened.make_ticket(machine_id=MACHINE, destination=B, now=NOW))
    signed.signature = b"x"
    with pytest.raises(TicketInvalidError, match="not both"):
        open_permission(signed.SerializeToString(), ca_pem=ca_pem, now=NOW)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"destinations": []}, "destinations"),
        ({"destinations": [A]}, "destinations"),
        ({"destinations": [Identity.parse("spiffe://other.example/vmhost/b")]}, "destinations"),
        ({"source": Identity.parse("spiffe://test.example/admin/jane")}, "source"),
        ({"valid_s": MAX_WARRANT_S + 1}, "valid_s"),
        ({"valid_s": 0}, "valid_s"),
        ({"machines": {f"{number}": LARGEST for number in range(1001)}}, "machines"),
    ],
)
def test_a_warrant_that_no_host_would_accept_is_not_signed(
    signer: TicketSigner, changes: dict[str, object], field: str
) -> None:
    """The field at fault is named."""
    wanted: dict[str, object] = {"source": A, "destinations": [B], "machines": {MACHINE: LARGEST}}
    with pytest.raises(InvalidArgumentError) as caught:
        issue_warrant(signer, **(wanted | changes))  # type: ignore[arg-type]
    assert caught.value.field == field
