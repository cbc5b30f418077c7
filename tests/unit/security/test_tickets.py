"""What a ticket allows, and all the ways it can be wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.security.crafting import (
    ADMIN,
    CONTROLLER,
    HOST_A,
    HOST_B,
    SIGNING,
    Authority,
    der,
    key_pem,
    key_usage,
    pem,
)
from vmferry.errors import ConfigError, InvalidArgumentError, TicketExpiredError, TicketInvalidError
from vmferry.security.authority import init_authority, issue
from vmferry.security.identity import Identity, Kind
from vmferry.security.tickets import (
    CLOCK_SKEW,
    MAX_TICKET_BYTES,
    TicketSigner,
    VerifiedTicket,
    open_ticket,
)
from vmferry.v1.ticket_pb2 import SignedTicket, Ticket

MACHINE = "1b4e28ba-2fa1-41d2-883f-0016d3cca427"
OTHER_MACHINE = "1b4e28ba-2fa1-41d2-883f-0016d3cca428"
GIB = 1024**3
NOW = datetime.now(UTC).replace(microsecond=0)
SECOND = timedelta(seconds=1)
AUTHORITY = Authority()
KEY = ed25519.Ed25519PrivateKey.generate()
SIGNER_CERTIFICATE = AUTHORITY.leaf(uris=[CONTROLLER.uri], key=KEY, purposes=SIGNING)


def issued(signer: TicketSigner | None = None, **changes: object) -> bytes:
    """A ticket for the machine from a to b, but for ``changes``."""
    wanted = {
        "machine_id": MACHINE, "source": HOST_A, "destination": HOST_B, "max_memory_bytes": GIB, "max_vcpus": 2,
        "now": NOW, **changes,
    }  # fmt: skip
    return (signer or TicketSigner(CONTROLLER, KEY, SIGNER_CERTIFICATE)).issue(**wanted)  # type: ignore[arg-type]


def opened(data: bytes, now: datetime = NOW, ca_pem: bytes = AUTHORITY.pem) -> VerifiedTicket:
    return open_ticket(data, ca_pem=ca_pem, now=now)


def signed(
    ticket: Ticket, *, key: ed25519.Ed25519PrivateKey = KEY, certificate: bytes | None = None
) -> bytes:
    """Sign any ticket, also one that no decent signer would."""
    data = ticket.SerializeToString()
    return SignedTicket(
        ticket=data,
        signature=key.sign(b"vmferry ticket v1\0" + data),
        signer_certificate=der(SIGNER_CERTIFICATE) if certificate is None else certificate,
    ).SerializeToString()


def good() -> Ticket:
    return Ticket.FromString(SignedTicket.FromString(issued()).ticket)


def test_a_good_ticket_says_what_was_asked_for() -> None:
    """Everything that went in comes out, under the identity of the signer's certificate."""
    data = issued(
        migration_id=b"m" * 16, source_key_sha256=b"s" * 32, destination_key_sha256=b"d" * 32, valid_s=60
    )
    ticket = opened(data)
    assert dataclasses.asdict(ticket) == {
        "signer": dataclasses.asdict(CONTROLLER),
        "machine_id": MACHINE,
        "migration_id": b"m" * 16,
        "source": dataclasses.asdict(HOST_A),
        "destination": dataclasses.asdict(HOST_B),
        "max_memory_bytes": GIB,
        "max_vcpus": 2,
        "not_before": NOW,
        "start_by": NOW + 60 * SECOND,
        "nonce": ticket.nonce,
        "source_key_sha256": b"s" * 32,
        "destination_key_sha256": b"d" * 32,
    }


def test_every_ticket_is_another() -> None:
    """Nonces and migration ids are fresh, so that burning one ticket leaves the others good."""
    tickets = [opened(issued()) for _ in range(20)]
    assert len({ticket.nonce for ticket in tickets}) == 20
    assert len({ticket.migration_id for ticket in tickets}) == 20
    assert all(len(ticket.nonce) == len(ticket.migration_id) == 16 for ticket in tickets)


def test_a_folder_of_the_authority_signs(tmp_path: Path) -> None:
    """What 'certs issue' writes for a controller and for an admin makes good tickets."""
    init_authority(tmp_path / "ca", "example.org")
    for identity in (CONTROLLER, ADMIN):
        issue(tmp_path / "ca", identity, tmp_path / identity.name)
        now = datetime.now(UTC)  # the authority is younger than NOW, which may be minutes ago
        data = issued(TicketSigner.load(tmp_path / identity.name), now=now)
        assert opened(data, now, (tmp_path / "ca" / "ca.pem").read_bytes()).signer == identity


@pytest.mark.parametrize(
    ("age", "refused"),
    [
        (-CLOCK_SKEW - SECOND, "not_before"),
        (-CLOCK_SKEW, None),
        (timedelta(0), None),
        (timedelta(minutes=10) + CLOCK_SKEW, None),
        (timedelta(minutes=10) + CLOCK_SKEW + SECOND, "start_by"),
        (timedelta(days=-3650), "signer_certificate"),
        (timedelta(days=3650), "signer_certificate"),
    ],
    ids=str,
)
def test_times(age: timedelta, refused: str | None) -> None:
    """A ticket is good from not_before to start_by, give or take the clocks' difference, to the second."""
    data = issued()
    if refused is None:
        opened(data, now=NOW + age)
        return
    with pytest.raises((TicketExpiredError, TicketInvalidError)) as caught:
        opened(data, now=NOW + age)
    assert caught.value.field == refused
    assert isinstance(caught.value, TicketExpiredError) == (refused != "signer_certificate")


@pytest.mark.parametrize("field", [field.name for field in Ticket.DESCRIPTOR.fields])
def test_every_field_is_signed(field: str) -> None:
    """No field can be changed after signing; the list of fields is the message's own."""
    keys = bytes(range(32))
    message = SignedTicket.FromString(issued(source_key_sha256=keys, destination_key_sha256=keys))
    ticket = Ticket.FromString(message.ticket)
    value = getattr(ticket, field)
    if isinstance(value, Timestamp):
        value.seconds += 1
    else:
        setattr(ticket, field, value + 1 if isinstance(value, int) else value[:-1] + value[:1])
    changed = ticket.SerializeToString()
    assert changed != message.ticket
    message.ticket = changed
    with pytest.raises(TicketInvalidError) as caught:
        opened(message.SerializeToString())
    assert caught.value.field == "signature"


def _set(**values: object) -> Callable[[Ticket], None]:
    def change(ticket: Ticket) -> None:
        for name, value in values.items():
            setattr(ticket, name, value)

    return change


def _time(field: str, seconds: int) -> Callable[[Ticket], None]:
    return lambda ticket: getattr(ticket, field).FromSeconds(int(NOW.timestamp()) + seconds)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (_set(version=0), "version"),
        (_set(version=2), "version"),
        (_set(machine_id=""), "machine_id"),
        (_set(machine_id=MACHINE.upper()), "machine_id"),
        (_set(machine_id=MACHINE + "\n"), "machine_id"),
        (_set(machine_id="../" + MACHINE[3:]), "machine_id"),
        (_set(migration_id=b""), "migration_id"),
        (_set(migration_id=b"x" * 17), "migration_id"),
        (_set(source=""), "source"),
        (_set(source=CONTROLLER.uri), "source"),
        (_set(source="spiffe://other.org/vmhost/a"), "source"),
        (_set(destination="spiffe://example.org/vmhost/*"), "destination"),
        (_set(destination=ADMIN.uri), "destination"),
        (_set(destination="spiffe://other.org/vmhost/b"), "destination"),
        (_set(destination=HOST_A.uri), "destination"),
        (_set(max_memory_bytes=0), "max_memory_bytes"),
        (_set(max_memory_bytes=2**63), "max_memory_bytes"),
        (_set(max_vcpus=0), "max_vcpus"),
        (_set(nonce=b""), "nonce"),
        (_set(nonce=b"x" * 15), "nonce"),
        (_set(source_key_sha256=b"x" * 31), "source_key_sha256"),
        (_set(destination_key_sha256=b"x"), "destination_key_sha256"),
        (lambda ticket: ticket.ClearField("not_before"), "not_before"),
        (lambda ticket: ticket.ClearField("start_by"), "start_by"),
        (_time("start_by", 601), "start_by"),
        (_time("start_by", 0), "start_by"),
        (_time("start_by", -1), "start_by"),
        (_time("not_before", -60), "start_by"),
        (lambda ticket: _set(seconds=2**62)(ticket.start_by), "start_by"),  # type: ignore[arg-type]
        (lambda ticket: _set(nanos=-1)(ticket.not_before), "not_before"),  # type: ignore[arg-type]
        (lambda ticket: ticket.MergeFromString(b"\xf8\x07\x01"), "ticket"),
        (lambda ticket: ticket.start_by.MergeFromString(b"\xf8\x07\x01"), "ticket"),
    ],
)
def test_contents_are_checked_even_when_signed(change: Callable[[Ticket], None], field: str) -> None:
    """A trusted signer's ticket with a value that can never be right is refused, naming the field."""
    ticket = good()
    opened(signed(ticket))
    change(ticket)
    with pytest.raises(TicketInvalidError) as caught:
        opened(signed(ticket))
    assert caught.value.field == field


def _leaf(**changes: object) -> x509.Certificate:
    wanted = {"uris": [CONTROLLER.uri], "key": KEY, "purposes": SIGNING, **changes}
    return AUTHORITY.leaf(**wanted)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("certificate", "because"),
    [
        (_leaf(uris=[HOST_A.uri]), "only a controller or an admin"),
        (_leaf(uris=[]), "no subject alternative name"),
        (_leaf(uris=[CONTROLLER.uri, ADMIN.uri]), "exactly one URI"),
        (_leaf(uris=["spiffe://other.org/controller/scheduler"]), "trust domain other.org"),
        (_leaf(purposes=[ExtendedKeyUsageOID.CLIENT_AUTH]), "codeSigning"),
        (_leaf(purposes=[*SIGNING, ExtendedKeyUsageOID.CLIENT_AUTH]), "codeSigning"),
        (_leaf(purposes=[*SIGNING, ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE]), "codeSigning"),
        (_leaf(key=ec.generate_private_key(ec.SECP256R1())), "Ed25519"),
        (_leaf(usage=key_usage(sign=False)), "digitalSignature"),
        (_leaf(constraints=x509.BasicConstraints(ca=True, path_length=None)), "CA's"),
        (_leaf(end=-60 * SECOND), "expired"),
        (_leaf(start=60 * SECOND), "not valid yet"),
        (_leaf(key=ed25519.Ed25519PrivateKey.generate()), "another key"),
        (Authority().leaf(uris=[CONTROLLER.uri], key=KEY, purposes=SIGNING), "trusted authority"),
        (Authority(end=-60 * SECOND).leaf(uris=[CONTROLLER.uri], key=KEY, purposes=SIGNING), "trusted authority"),
    ],
    ids=[
        "a host", "nobody", "two", "other trust domain", "TLS client", "signing and TLS", "signing and anything",
        "ECDSA", "may not sign", "a CA", "expired", "not yet valid", "another key", "other CA", "other expired CA",
    ],
)  # fmt: skip
def test_who_may_sign(certificate: x509.Certificate, because: str) -> None:
    """Only a valid signing certificate of a controller or admin, from a trusted authority, makes a ticket good."""
    with pytest.raises(TicketInvalidError, match=because) as caught:
        opened(signed(good(), certificate=der(certificate)))
    assert caught.value.field in {"signer_certificate", "signature", "source"}


def test_self_signed_signer() -> None:
    """A certificate that its own key signed is nobody's, also under the name of the trusted authority."""
    forger = Authority()
    forger.name = AUTHORITY.name
    certificate = forger.leaf(uris=[CONTROLLER.uri], key=KEY, purposes=SIGNING)
    assert certificate.issuer == SIGNER_CERTIFICATE.issuer
    with pytest.raises(TicketInvalidError, match="trusted authority"):
        opened(signed(good(), certificate=der(certificate)))


def test_an_authority_must_be_one() -> None:
    """A trusted file that holds a leaf, or an authority that has expired, vouches for nobody."""
    for unfit in (Authority(is_ca=False), Authority(end=-60 * SECOND)):
        certificate = unfit.leaf(uris=[CONTROLLER.uri], key=KEY, purposes=SIGNING)
        with pytest.raises(TicketInvalidError, match="trusted authority"):
            # The authority expired before now, which may be minutes after NOW.
            opened(signed(good(), certificate=der(certificate)), datetime.now(UTC), AUTHORITY.pem + unfit.pem)


def test_two_authorities_while_one_is_replaced() -> None:
    """Tickets of the old and the new authority are good while both are trusted."""
    both = Authority().pem + AUTHORITY.pem
    assert opened(issued(), ca_pem=both).signer == CONTROLLER


def test_the_signature_is_for_tickets_only() -> None:
    """A signature over the bare bytes, made for another purpose, does not make a ticket."""
    message = SignedTicket.FromString(issued())
    for forged in (KEY.sign(message.ticket), b"", bytes(64)):
        message.signature = forged
        with pytest.raises(TicketInvalidError) as caught:
            opened(message.SerializeToString())
        assert caught.value.field == "signature"


def test_size_is_bounded_before_anything_is_read() -> None:
    """One byte more than the limit is refused unread; the same ticket at the limit gets as far as its signature."""
    message = SignedTicket.FromString(issued())
    message.signature = b""
    message.signature = bytes(MAX_TICKET_BYTES - message.ByteSize() - 3)
    assert message.ByteSize() <= MAX_TICKET_BYTES
    with pytest.raises(TicketInvalidError) as caught:
        opened(message.SerializeToString())
    assert caught.value.field == "signature"
    with pytest.raises(TicketInvalidError, match="at most 16384") as caught:
        opened(message.SerializeToString() + b"\0" * 16)
    assert caught.value.field == "ticket"


@given(st.binary(max_size=400))
def test_garbage(data: bytes) -> None:
    """Bytes that nobody signed are refused with the one error that callers expect."""
    with pytest.raises(TicketInvalidError):
        opened(data)


GOOD = issued()


@settings(max_examples=200)
@given(st.integers(0, len(GOOD) - 1), st.integers(1, 255))
def test_any_changed_byte(position: int, change: int) -> None:
    """A ticket with one changed byte is refused, or proves exactly what it did before."""
    data = bytearray(GOOD)
    data[position] ^= change
    try:
        ticket = opened(bytes(data))
    except (TicketInvalidError, TicketExpiredError):
        return
    assert ticket == opened(GOOD)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({}, None),
        ({"memory_bytes": 1, "vcpus": 1}, None),
        ({"source_key_sha256": None}, None),
        ({"machine_id": OTHER_MACHINE}, "machine_id"),
        ({"machine_id": "x" * 5_000_000}, "machine_id"),
        ({"source": Identity("example.org", Kind.VMHOST, "c")}, "source"),
        ({"source": Identity("other.org", Kind.VMHOST, "a")}, "source"),
        ({"source": Identity("example.org", Kind.ADMIN, "a")}, "source"),
        ({"destination": HOST_A}, "destination"),
        ({"memory_bytes": GIB + 1}, "max_memory_bytes"),
        ({"memory_bytes": 0}, "max_memory_bytes"),
        ({"memory_bytes": -1}, "max_memory_bytes"),
        ({"vcpus": 3}, "max_vcpus"),
        ({"vcpus": 0}, "max_vcpus"),
        ({"source_key_sha256": b"x" * 32}, "source_key_sha256"),
        ({"source_key_sha256": b""}, "source_key_sha256"),
        ({"destination_key_sha256": b"x" * 32}, "destination_key_sha256"),
    ],
)
def test_check_compares_with_what_is_asked_for(changes: dict[str, object], field: str | None) -> None:
    """A ticket for something else is refused, naming in what it differs, in a message of bounded size."""
    ticket = opened(issued(source_key_sha256=b"s" * 32, destination_key_sha256=b"d" * 32))
    asked = {
        "machine_id": MACHINE, "source": HOST_A, "destination": HOST_B, "memory_bytes": GIB, "vcpus": 2,
        "source_key_sha256": b"s" * 32, "destination_key_sha256": b"d" * 32, **changes,
    }  # fmt: skip
    if field is None:
        ticket.check(**asked)  # type: ignore[arg-type]
        return
    with pytest.raises(TicketInvalidError) as caught:
        ticket.check(**asked)  # type: ignore[arg-type]
    assert caught.value.field == field
    assert len(str(caught.value)) < 1_000


def test_keys_are_compared_only_if_named() -> None:
    """A signer who named no key leaves the identities to decide."""
    opened(issued()).check(
        machine_id=MACHINE, source=HOST_A, destination=HOST_B, memory_bytes=GIB, vcpus=2,
        source_key_sha256=b"x" * 32, destination_key_sha256=b"y" * 32,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"valid_s": 0}, "valid_s"),
        ({"valid_s": 601}, "valid_s"),
        ({"machine_id": "vm1"}, "machine_id"),
        ({"destination": HOST_A}, "destination"),
        ({"source": ADMIN}, "source"),
        ({"destination": Identity("other.org", Kind.VMHOST, "b")}, "destination"),
        ({"max_memory_bytes": -1}, "max_memory_bytes"),
        ({"max_memory_bytes": 2**64}, "max_memory_bytes"),
        ({"max_vcpus": 2**32}, "max_vcpus"),
        ({"migration_id": b""}, "migration_id"),
        ({"source_key_sha256": b"x"}, "source_key_sha256"),
    ],
)
def test_no_useless_ticket_is_issued(changes: dict[str, object], field: str) -> None:
    """A ticket that no host would accept is refused to the issuer, naming the argument."""
    with pytest.raises(InvalidArgumentError) as caught:
        issued(**changes)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("certificate", "key", "named"),
    [
        (pem(SIGNER_CERTIFICATE), key_pem(ed25519.Ed25519PrivateKey.generate()), "ticket.key"),
        (pem(SIGNER_CERTIFICATE), b"nothing", "ticket.key"),
        (pem(AUTHORITY.host(HOST_A)), key_pem(KEY), "ticket.crt"),
        (b"nothing", key_pem(KEY), "ticket.crt"),
        (None, key_pem(KEY), "ticket.crt"),
    ],
)
def test_a_signer_is_checked_when_loaded(
    tmp_path: Path, certificate: bytes | None, key: bytes, named: str
) -> None:
    """A folder that cannot sign tickets is refused when it is read, naming the file."""
    if certificate is not None:
        (tmp_path / "ticket.crt").write_bytes(certificate)
    (tmp_path / "ticket.key").write_bytes(key)
    (tmp_path / "ticket.key").chmod(0o600)
    with pytest.raises(ConfigError, match=named) as caught:
        TicketSigner.load(tmp_path)
    assert caught.value.field == named


def test_a_ticket_key_open_to_others_is_refused(tmp_path: Path) -> None:
    """Whoever can read the key can sign; such a key is not used."""
    (tmp_path / "ticket.crt").write_bytes(pem(SIGNER_CERTIFICATE))
    (tmp_path / "ticket.key").write_bytes(key_pem(KEY))
    (tmp_path / "ticket.key").chmod(0o640)
    with pytest.raises(ConfigError, match="0640"):
        TicketSigner.load(tmp_path)
