"""The permission slip of one migration: made by a controller or admin, checked by both hosts.

Promise: a :class:`VerifiedTicket` exists only if an identity of kind controller or admin, certified by a trusted
authority for signing, signed exactly these bytes, and their times hold now. Whether it is for *this* machine and
*these* hosts is asked with :meth:`VerifiedTicket.check`; that it is used once is the business of the destination's
journal, which burns the nonce. This module reads no clock and no file but the signer's.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, NoReturn, Self

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID
from google.protobuf.message import DecodeError
from google.protobuf.timestamp_pb2 import Timestamp

from vmferry.errors import (
    ConfigError,
    InvalidArgumentError,
    TicketExpiredError,
    TicketInvalidError,
    UnauthenticatedError,
)
from vmferry.security.files import read_private, read_public
from vmferry.security.identity import MAX_URI_CHARS, Identity, Kind, identity_from_x509, load_certificate
from vmferry.security.trust import UNREADABLE, find_issuer, is_valid_at
from vmferry.v1.ticket_pb2 import SignedTicket, Ticket

TICKET_VERSION: Final = 1
MAX_TICKET_BYTES: Final = 16 * 1024
MAX_VALID_S: Final = 600
"""Longest time from not_before to start_by."""
CLOCK_SKEW: Final = timedelta(seconds=30)
"""How far the clocks of signer and host may be apart; both ends of a ticket's time are widened by this."""
ID_BYTES: Final = 16
KEY_HASH_BYTES: Final = 32
MAX_MEMORY_BYTES: Final = 2**63 - 1
MAX_VCPUS: Final = 2**32 - 1
SIGNER_KINDS: Final = frozenset({Kind.CONTROLLER, Kind.ADMIN})

_CONTEXT: Final = b"vmferry ticket v1\0"
_MACHINE_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_TLS_PURPOSES: Final = frozenset(
    {
        ExtendedKeyUsageOID.CLIENT_AUTH,
        ExtendedKeyUsageOID.SERVER_AUTH,
        ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE,
    }
)


@dataclass(frozen=True)
class VerifiedTicket:
    """What a trusted signer allows: one machine, from one host to one host, once, soon. Made by open_ticket."""

    signer: Identity
    machine_id: str
    migration_id: bytes
    source: Identity
    destination: Identity
    max_memory_bytes: int
    max_vcpus: int
    not_before: datetime
    start_by: datetime
    nonce: bytes
    source_key_sha256: bytes
    """Empty if the signer named no key."""
    destination_key_sha256: bytes
    """Empty if the signer named no key."""

    def check(
        self,
        *,
        machine_id: str,
        source: Identity,
        destination: Identity,
        memory_bytes: int,
        vcpus: int,
        source_key_sha256: bytes | None,
        destination_key_sha256: bytes | None = None,
    ) -> None:
        """Compare with what is really asked for; identities come from certificates, never from the request.

        A key hash of None means that this side cannot know that key and leaves it to the other side.

        Raises:
            TicketInvalidError: it was made out for something else; ``field`` says in what.
        """
        for field, allowed, asked in (
            ("machine_id", self.machine_id, machine_id),
            ("source", self.source, source),
            ("destination", self.destination, destination),
        ):
            if asked != allowed:
                _refuse(field, f"the ticket is for {field} {allowed}, not {str(asked)[:MAX_URI_CHARS]}")
        for field, limit, wanted in (
            ("max_memory_bytes", self.max_memory_bytes, memory_bytes),
            ("max_vcpus", self.max_vcpus, vcpus),
        ):
            if not 0 < wanted <= limit:
                _refuse(field, f"the ticket allows a {field} of {limit}, the machine has {wanted}")
        for field, named, found in (
            ("source_key_sha256", self.source_key_sha256, source_key_sha256),
            ("destination_key_sha256", self.destination_key_sha256, destination_key_sha256),
        ):
            if named and found is not None and found != named:
                _refuse(field, f"the ticket names another key than the certificate has ({field})")


class TicketSigner:
    """A controller's or admin's ticket key with its certificate."""

    def __init__(self, identity: Identity, key: Ed25519PrivateKey, certificate: x509.Certificate) -> None:
        self.identity = identity
        self._key = key
        self._certificate = certificate.public_bytes(Encoding.DER)

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Read ``ticket.crt`` and ``ticket.key``.

        Raises:
            ConfigError: a file is missing or broken, or the two do not make a ticket signer.
        """
        certificate_path, key_path = directory / "ticket.crt", directory / "ticket.key"
        try:
            certificate = load_certificate(read_public(certificate_path))
            identity = _signer_identity(certificate)
        except (UnauthenticatedError, TicketInvalidError) as error:
            raise ConfigError(f"{certificate_path}: {error}", field=certificate_path.name) from error
        try:
            key = load_pem_private_key(read_private(key_path), password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise ConfigError(f"{key_path} is not an unencrypted PEM key", field=key_path.name) from error
        if not isinstance(key, Ed25519PrivateKey) or key.public_key() != certificate.public_key():
            raise ConfigError(f"{key_path} is not the key of {certificate_path}", field=key_path.name)
        return cls(identity, key, certificate)

    def issue(
        self,
        *,
        machine_id: str,
        source: Identity,
        destination: Identity,
        max_memory_bytes: int,
        max_vcpus: int,
        valid_s: int = MAX_VALID_S,
        now: datetime | None = None,
        migration_id: bytes | None = None,
        source_key_sha256: bytes = b"",
        destination_key_sha256: bytes = b"",
    ) -> bytes:
        """A serialized SignedTicket, good from now for ``valid_s`` seconds.

        Raises:
            InvalidArgumentError: no host would accept a ticket like this; ``field`` says why.
        """
        for field, number, limit in (
            ("max_memory_bytes", max_memory_bytes, MAX_MEMORY_BYTES),
            ("max_vcpus", max_vcpus, MAX_VCPUS),
            ("valid_s", valid_s, MAX_VALID_S),
        ):
            if not 1 <= number <= limit:
                raise InvalidArgumentError(f"{field} must be between 1 and {limit}", field=field)
        ticket = Ticket(
            version=TICKET_VERSION,
            machine_id=machine_id,
            migration_id=secrets.token_bytes(ID_BYTES) if migration_id is None else migration_id,
            source=source.uri,
            destination=destination.uri,
            max_memory_bytes=max_memory_bytes,
            max_vcpus=max_vcpus,
            nonce=secrets.token_bytes(ID_BYTES),
            source_key_sha256=source_key_sha256,
            destination_key_sha256=destination_key_sha256,
        )
        begin = now or datetime.now(UTC)
        ticket.not_before.FromDatetime(begin)
        ticket.start_by.FromDatetime(begin + timedelta(seconds=valid_s))
        return self._sign(ticket)

    def _sign(self, ticket: Ticket) -> bytes:
        try:
            _verified(ticket, self.identity)
        except TicketInvalidError as error:
            raise InvalidArgumentError(str(error), field=error.field) from error
        data = ticket.SerializeToString(deterministic=True)
        proof = self.prove(_CONTEXT, data)
        signed = SignedTicket(ticket=data, signature=proof.signature, signer_certificate=proof.certificate)
        return signed.SerializeToString(deterministic=True)

    def prove(self, context: bytes, data: bytes) -> Proof:
        """Sign something of the kind that ``context`` names."""
        return Proof(context, data, self._key.sign(context + data), self._certificate)


def open_ticket(data: bytes, *, ca_pem: bytes, now: datetime) -> VerifiedTicket:
    """Read and verify a serialized SignedTicket.

    Raises:
        TicketInvalidError: it is malformed, or not signed by a trusted controller or admin; ``field`` says where.
        TicketExpiredError: its time has not come, or is over.
    """
    if len(data) > MAX_TICKET_BYTES:
        _refuse("ticket", f"the ticket has {len(data)} bytes; at most {MAX_TICKET_BYTES} are allowed")
    try:
        signed = SignedTicket.FromString(data)
    except DecodeError:
        _refuse("ticket", "the ticket is not a SignedTicket")
    proof = Proof(_CONTEXT, signed.ticket, signed.signature, signed.signer_certificate)
    signer = verify_signature(proof, ca_pem, now)
    return read_ticket(signed.ticket, signer, now)


def read_ticket(data: bytes, signer: Identity, now: datetime) -> VerifiedTicket:
    """Read a serialized Ticket that ``signer`` stands for.

    Raises:
        TicketInvalidError: it is malformed; ``field`` says where.
        TicketExpiredError: its time has not come, or is over.
    """
    try:
        ticket = Ticket.FromString(data)
    except DecodeError:
        _refuse("ticket", "the signed bytes are not a Ticket")
    verified = _verified(ticket, signer)
    if now + CLOCK_SKEW < verified.not_before:
        raise TicketExpiredError(
            f"the ticket is not valid before {verified.not_before:%Y-%m-%dT%H:%M:%SZ}", field="not_before"
        )
    if now - CLOCK_SKEW > verified.start_by:
        raise TicketExpiredError(
            f"the migration had to begin by {verified.start_by:%Y-%m-%dT%H:%M:%SZ}", field="start_by"
        )
    return verified


def _refuse(field: str, message: str) -> NoReturn:
    raise TicketInvalidError(message, field=field)


@dataclass(frozen=True)
class Proof:
    """What was signed, and by which certificate."""

    context: bytes
    """What kind of thing it is, so that a signature is never good for another kind."""
    data: bytes
    signature: bytes
    certificate: bytes
    """DER."""


def verify_signature(proof: Proof, ca_pem: bytes, now: datetime) -> Identity:
    """Who signed it, if that is somebody who may.

    Raises:
        TicketInvalidError: it is not signed by a trusted controller or admin; ``field`` says where.
    """
    try:
        certificate = load_certificate(proof.certificate)
    except UnauthenticatedError:
        _refuse("signer_certificate", "the ticket carries no readable certificate of its signer")
    identity = _signer_identity(certificate)
    if find_issuer(certificate, x509.load_pem_x509_certificates(ca_pem), now) is None:
        _refuse(
            "signer_certificate", f"the certificate of the signer {identity} is not of a trusted authority"
        )
    if not is_valid_at(certificate, now):
        _refuse(
            "signer_certificate", f"the certificate of the signer {identity} is expired, or not valid yet"
        )
    key = certificate.public_key()
    assert isinstance(key, Ed25519PublicKey)  # _signer_identity refuses others
    try:
        key.verify(proof.signature, proof.context + proof.data)
    except InvalidSignature:
        _refuse("signature", "the ticket was changed after signing, or signed with another key")
    return identity


def _signer_identity(certificate: x509.Certificate) -> Identity:
    """Who may sign tickets with this certificate; says nothing yet about who issued it."""
    try:
        identity = identity_from_x509(certificate)
        purposes = set(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
        key = certificate.public_key()
    except UnauthenticatedError as error:
        _refuse("signer_certificate", f"the signer: {error}")
    except (*UNREADABLE, x509.ExtensionNotFound) as error:
        _refuse("signer_certificate", f"the signer's certificate is not one for signing tickets: {error}")
    if identity.kind not in SIGNER_KINDS:
        _refuse("signer_certificate", f"{identity} may not sign tickets; only a controller or an admin may")
    # A key that proves who connects must not also be able to sign, and the other way round.
    if ExtendedKeyUsageOID.CODE_SIGNING not in purposes or purposes & _TLS_PURPOSES:
        _refuse("signer_certificate", "the signer's extended key usage must be codeSigning, and not TLS")
    if not isinstance(key, Ed25519PublicKey):
        _refuse("signer_certificate", "the signer's key must be Ed25519")
    return identity


def _verified(ticket: Ticket, signer: Identity) -> VerifiedTicket:
    """All that can be said about a ticket without a clock; the same checks for who issues and who accepts."""
    if ticket.version != TICKET_VERSION:
        _refuse("version", f"the ticket is of version {ticket.version}; this host knows {TICKET_VERSION}")
    _refuse_unknown_fields(ticket)
    _check_numbers(ticket)
    source = _host(ticket.source, "source", signer)
    destination = _host(ticket.destination, "destination", signer)
    if source == destination:
        _refuse("destination", "source and destination are the same host")
    not_before = _time(ticket, "not_before")
    start_by = _time(ticket, "start_by")
    if not timedelta(0) < start_by - not_before <= timedelta(seconds=MAX_VALID_S):
        _refuse("start_by", f"start_by must be later than not_before by at most {MAX_VALID_S} seconds")
    return VerifiedTicket(
        signer=signer,
        machine_id=ticket.machine_id,
        migration_id=ticket.migration_id,
        source=source,
        destination=destination,
        max_memory_bytes=ticket.max_memory_bytes,
        max_vcpus=ticket.max_vcpus,
        not_before=not_before,
        start_by=start_by,
        nonce=ticket.nonce,
        source_key_sha256=ticket.source_key_sha256,
        destination_key_sha256=ticket.destination_key_sha256,
    )


def _check_numbers(ticket: Ticket) -> None:
    if not _MACHINE_ID.fullmatch(ticket.machine_id):
        _refuse("machine_id", "machine_id must be a lower-case UUID")
    for field, value, sizes in (
        ("migration_id", ticket.migration_id, {ID_BYTES}),
        ("nonce", ticket.nonce, {ID_BYTES}),
        ("source_key_sha256", ticket.source_key_sha256, {0, KEY_HASH_BYTES}),
        ("destination_key_sha256", ticket.destination_key_sha256, {0, KEY_HASH_BYTES}),
    ):
        if len(value) not in sizes:
            _refuse(field, f"{field} must have {max(sizes)} bytes, it has {len(value)}")
    for field, number, limit in (
        ("max_memory_bytes", ticket.max_memory_bytes, MAX_MEMORY_BYTES),
        ("max_vcpus", ticket.max_vcpus, MAX_VCPUS),
    ):
        if not 1 <= number <= limit:
            _refuse(field, f"{field} must be between 1 and {limit}")


def _refuse_unknown_fields(ticket: Ticket) -> None:
    # A field this host does not know may be a restriction it would not keep.
    known = Ticket()
    known.CopyFrom(ticket)
    known.DiscardUnknownFields()
    if known.ByteSize() != ticket.ByteSize():
        _refuse("ticket", "the ticket has fields that this host does not know")


def _host(uri: str, field: str, signer: Identity) -> Identity:
    identity = Identity.parse(uri, field=field, error=TicketInvalidError)
    if identity.kind is not Kind.VMHOST or identity.trust_domain != signer.trust_domain:
        _refuse(field, f"{identity} is not a host of the signer's trust domain {signer.trust_domain}")
    return identity


def _time(ticket: Ticket, field: str) -> datetime:
    stamp: Timestamp = getattr(ticket, field)
    try:
        if ticket.HasField(field):  # type: ignore[arg-type]
            return stamp.ToDatetime(tzinfo=UTC)
    except (ValueError, OverflowError):
        pass
    _refuse(field, f"{field} is missing or is no time")
