"""The warrant of a drain: a controller or admin lets one source make out the tickets of its own machines for a while.

A drain outlives any ticket: it waits for room, tries elsewhere, and goes on after a restart with nobody there to
sign. The warrant is signed beforehand, for named machines, named destinations and a time; for each migration the
source makes out an ordinary ticket, single-use and short-lived as ever, with the warrant in place of a signature::

    signer --- SignedWarrant ---> source --- SignedTicket{ticket, warrant} ---> destination

Promise: a ticket by warrant is accepted only within what the warrant says, and only from the source that it names, by
that source's certificate (:meth:`VerifiedTicket.check` compares it); nobody else can use a warrant. Its nonce is
burnt like any other. Hosts of an earlier release refuse such tickets.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final, NoReturn

from google.protobuf.message import DecodeError
from google.protobuf.timestamp_pb2 import Timestamp

from vmferry.errors import InvalidArgumentError, TicketExpiredError, TicketInvalidError
from vmferry.security.identity import Identity, Kind
from vmferry.security.tickets import (
    CLOCK_SKEW,
    ID_BYTES,
    MAX_TICKET_BYTES,
    MAX_VALID_S,
    TICKET_VERSION,
    Proof,
    TicketSigner,
    VerifiedTicket,
    open_ticket,
    read_ticket,
    verify_signature,
)
from vmferry.v1.ticket_pb2 import SignedTicket, SignedWarrant, Ticket, Warrant, WarrantedMachine

WARRANT_VERSION: Final = 1
MAX_WARRANT_BYTES: Final = 128 * 1024
MAX_WARRANT_S: Final = 24 * 3600
"""Longest time from not_before to expire_time."""
MAX_MACHINES: Final = 1000
MAX_DESTINATIONS: Final = 100
_CONTEXT: Final = b"vmferry warrant v1\0"


@dataclass(frozen=True)
class Allowance:
    """How large a machine may be that goes by a warrant."""

    max_memory_bytes: int
    max_vcpus: int


@dataclass(frozen=True)
class VerifiedWarrant:
    """What a trusted signer allows a source. Made by open_warrant."""

    signer: Identity
    warrant_id: bytes
    source: Identity
    destinations: frozenset[str]
    machines: Mapping[str, Allowance]
    not_before: datetime
    expires: datetime
    signed: bytes
    """The serialized SignedWarrant."""

    def make_ticket(self, *, machine_id: str, destination: Identity, now: datetime) -> bytes:
        """A serialized SignedTicket for one migration, made out by the source that this is for.

        Raises:
            TicketInvalidError: the warrant does not name this machine, or this destination.
            TicketExpiredError: its time is over.
        """
        allowed = self.machines.get(machine_id)
        if allowed is None:
            _refuse("machines", f"the warrant does not name the machine {machine_id}")
        if destination.uri not in self.destinations:
            _refuse("destinations", f"the warrant does not name {destination}")
        if now >= self.expires:
            raise _expired(self.expires)
        ticket = Ticket(
            version=TICKET_VERSION,
            machine_id=machine_id,
            migration_id=secrets.token_bytes(ID_BYTES),
            source=self.source.uri,
            destination=destination.uri,
            max_memory_bytes=allowed.max_memory_bytes,
            max_vcpus=allowed.max_vcpus,
            nonce=secrets.token_bytes(ID_BYTES),
        )
        begin = max(now, self.not_before)
        ticket.not_before.FromDatetime(begin)
        ticket.start_by.FromDatetime(min(begin + timedelta(seconds=MAX_VALID_S), self.expires))
        signed = SignedTicket(ticket=ticket.SerializeToString(deterministic=True), warrant=self.signed)
        return signed.SerializeToString(deterministic=True)

    def check(self, ticket: VerifiedTicket) -> None:
        """Refuse a ticket that goes beyond it.

        Raises:
            TicketInvalidError: naming what.
        """
        if ticket.source != self.source:
            _refuse("source", f"the warrant is for the source {self.source}, not {ticket.source}")
        if ticket.destination.uri not in self.destinations:
            _refuse("destination", f"the warrant does not name {ticket.destination}")
        allowed = self.machines.get(ticket.machine_id)
        if allowed is None:
            _refuse("machine_id", f"the warrant does not name the machine {ticket.machine_id}")
        if ticket.max_memory_bytes > allowed.max_memory_bytes or ticket.max_vcpus > allowed.max_vcpus:
            _refuse("max_memory_bytes", "the ticket allows a larger machine than its warrant")
        if ticket.not_before < self.not_before or ticket.start_by > self.expires:
            _refuse("start_by", "the ticket is good outside of its warrant's time")


def issue_warrant(
    signer: TicketSigner,
    *,
    source: Identity,
    destinations: Sequence[Identity],
    machines: Mapping[str, Allowance],
    valid_s: int = MAX_WARRANT_S,
    now: datetime | None = None,
) -> bytes:
    """A serialized SignedWarrant, good from now for ``valid_s`` seconds.

    Raises:
        InvalidArgumentError: no host would accept a warrant like this; ``field`` says why.
    """
    if not 1 <= valid_s <= MAX_WARRANT_S:
        raise InvalidArgumentError(f"valid_s must be between 1 and {MAX_WARRANT_S}", field="valid_s")
    warrant = Warrant(
        version=WARRANT_VERSION,
        warrant_id=secrets.token_bytes(ID_BYTES),
        source=source.uri,
        destinations=sorted({destination.uri for destination in destinations}),
        machines=[
            WarrantedMachine(
                machine_id=machine_id, max_memory_bytes=most.max_memory_bytes, max_vcpus=most.max_vcpus
            )
            for machine_id, most in sorted(machines.items())
        ],
    )
    begin = now or datetime.now(UTC)
    warrant.not_before.FromDatetime(begin)
    warrant.expire_time.FromDatetime(begin + timedelta(seconds=valid_s))
    try:
        _verified(warrant, signer.identity, b"")
    except TicketInvalidError as error:
        raise InvalidArgumentError(str(error), field=error.field) from error
    proof = signer.prove(_CONTEXT, warrant.SerializeToString(deterministic=True))
    signed = SignedWarrant(
        warrant=proof.data, signature=proof.signature, signer_certificate=proof.certificate
    )
    return signed.SerializeToString(deterministic=True)


def open_warrant(data: bytes, *, ca_pem: bytes, now: datetime) -> VerifiedWarrant:
    """Read and verify a serialized SignedWarrant.

    Raises:
        TicketInvalidError: it is malformed, or not signed by a trusted controller or admin; ``field`` says where.
        TicketExpiredError: its time has not come, or is over.
    """
    if len(data) > MAX_WARRANT_BYTES:
        _refuse("warrant", f"the warrant has {len(data)} bytes; at most {MAX_WARRANT_BYTES} are allowed")
    try:
        signed = SignedWarrant.FromString(data)
    except DecodeError:
        _refuse("warrant", "the warrant is not a SignedWarrant")
    proof = Proof(_CONTEXT, signed.warrant, signed.signature, signed.signer_certificate)
    signer = verify_signature(proof, ca_pem, now)
    try:
        warrant = Warrant.FromString(signed.warrant)
    except DecodeError:
        _refuse("warrant", "the signed bytes are not a Warrant")
    verified = _verified(warrant, signer, data)
    if now + CLOCK_SKEW < verified.not_before:
        raise TicketExpiredError(
            f"the warrant is not valid before {verified.not_before:%Y-%m-%dT%H:%M:%SZ}", field="not_before"
        )
    if now - CLOCK_SKEW > verified.expires:
        raise _expired(verified.expires)
    return verified


def open_permission(data: bytes, *, ca_pem: bytes, now: datetime, by_warrant: bool = True) -> VerifiedTicket:
    """Read and verify a ticket that is signed, or made out by warrant.

    Args:
        data: the serialized SignedTicket.
        ca_pem: the authorities that are trusted.
        now: now.
        by_warrant: the source that the ticket names is who brings it, so it may have made it out.

    Raises:
        TicketInvalidError: it is malformed, or nobody who may do so stands for it; ``field`` says where.
        TicketExpiredError: its time has not come, or is over.
    """
    if len(data) > MAX_TICKET_BYTES + MAX_WARRANT_BYTES:
        _refuse("ticket", f"the ticket has {len(data)} bytes, which is too many")
    try:
        signed = SignedTicket.FromString(data)
    except DecodeError:
        _refuse("ticket", "the ticket is not a SignedTicket")
    if not signed.warrant or not by_warrant:
        return open_ticket(data, ca_pem=ca_pem, now=now)
    if signed.signature or signed.signer_certificate:
        _refuse("signature", "a ticket is signed or made out by warrant, not both")
    warrant = open_warrant(signed.warrant, ca_pem=ca_pem, now=now)
    ticket = read_ticket(signed.ticket, warrant.signer, now)
    warrant.check(ticket)
    return ticket


def _verified(warrant: Warrant, signer: Identity, signed: bytes) -> VerifiedWarrant:
    """All that can be said about a warrant without a clock; the same checks for who issues and who accepts."""
    if warrant.version != WARRANT_VERSION:
        _refuse("version", f"the warrant is of version {warrant.version}; this host knows {WARRANT_VERSION}")
    known = Warrant()
    known.CopyFrom(warrant)
    known.DiscardUnknownFields()
    if known.ByteSize() != warrant.ByteSize():  # it may be a restriction that this host would not keep
        _refuse("warrant", "the warrant has fields that this host does not know")
    if len(warrant.warrant_id) != ID_BYTES:
        _refuse("warrant_id", f"warrant_id must have {ID_BYTES} bytes")
    source = _host(warrant.source, "source", signer)
    destinations = frozenset(_host(uri, "destinations", signer).uri for uri in warrant.destinations)
    if not 1 <= len(destinations) <= MAX_DESTINATIONS or source.uri in destinations:
        _refuse(
            "destinations", f"there must be 1 to {MAX_DESTINATIONS} destinations, none of them the source"
        )
    not_before, expires = _time(warrant, "not_before"), _time(warrant, "expire_time")
    if not timedelta(0) < expires - not_before <= timedelta(seconds=MAX_WARRANT_S):
        _refuse(
            "expire_time", f"expire_time must be later than not_before by at most {MAX_WARRANT_S} seconds"
        )
    return VerifiedWarrant(
        signer,
        warrant.warrant_id,
        source,
        destinations,
        _machines(warrant.machines),
        not_before,
        expires,
        signed,
    )


def _machines(machines: Iterable[WarrantedMachine]) -> dict[str, Allowance]:
    found = {one.machine_id: Allowance(one.max_memory_bytes, one.max_vcpus) for one in machines}
    if len(found) > MAX_MACHINES:
        _refuse("machines", f"a warrant names at most {MAX_MACHINES} machines")
    return found


def _host(uri: str, field: str, signer: Identity) -> Identity:
    identity = Identity.parse(uri, field=field, error=TicketInvalidError)
    if identity.kind is not Kind.VMHOST or identity.trust_domain != signer.trust_domain:
        _refuse(field, f"{identity} is not a host of the signer's trust domain {signer.trust_domain}")
    return identity


def _time(warrant: Warrant, field: str) -> datetime:
    stamp: Timestamp = getattr(warrant, field)
    try:
        if warrant.HasField(field):  # type: ignore[arg-type]
            return stamp.ToDatetime(tzinfo=UTC)
        _refuse(field, f"{field} is missing")
    except (ValueError, OverflowError):
        _refuse(field, f"{field} is no time")


def _expired(expires: datetime) -> TicketExpiredError:
    return TicketExpiredError(
        f"the warrant was good until {expires:%Y-%m-%dT%H:%M:%SZ}",
        field="expire_time",
        remedy="Ask for the drain once more (vmferry drain): that makes out a new warrant.",
    )


def _refuse(field: str, message: str) -> NoReturn:
    raise TicketInvalidError(message, field=field)
