"""What counts as an identity, in text and in certificates."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable

import pytest
from cryptography import x509
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.security.crafting import HOST_A, HOST_B, Authority, der, key_usage, pem
from vmferry.errors import InvalidArgumentError, TicketInvalidError, UnauthenticatedError
from vmferry.security.identity import Identity, Kind, identity_from_certificate

LABELS = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", fullmatch=True)
DOMAINS = st.lists(LABELS, min_size=1, max_size=3).map(".".join).filter(lambda text: len(text) < 170)
IDENTITIES = st.builds(Identity, DOMAINS, st.sampled_from(Kind), LABELS)
AUTHORITY = Authority()
CERTIFICATE = der(AUTHORITY.host(HOST_B))
LONGEST_DOMAIN = ".".join(["x" * 60] * 4)


@pytest.mark.parametrize(
    ("uri", "kind", "name", "server_name"),
    [
        ("spiffe://example.org/vmhost/b", Kind.VMHOST, "b", "b.vmhost.example.org"),
        ("spiffe://lab/controller/nova-1", Kind.CONTROLLER, "nova-1", "nova-1.controller.lab"),
        (
            "spiffe://a.b.c/vmhost/1b4e28ba-2fa1-11d2-883f-0016d3cca427",
            Kind.VMHOST,
            "1b4e28ba-2fa1-11d2-883f-0016d3cca427",
            "1b4e28ba-2fa1-11d2-883f-0016d3cca427.vmhost.a.b.c",
        ),
        (f"spiffe://{LONGEST_DOMAIN}/vmhost/bc", Kind.VMHOST, "bc", f"bc.vmhost.{LONGEST_DOMAIN}"),
        ("spiffe://example.org/admin/" + "x" * 63, Kind.ADMIN, "x" * 63, "x" * 63 + ".admin.example.org"),
    ],
)
def test_accepts_well_formed(uri: str, kind: Kind, name: str, server_name: str) -> None:
    """A well-formed URI is read, and written back the same."""
    identity = Identity.parse(uri)
    assert (identity.kind, identity.name, identity.server_name) == (kind, name, server_name)
    assert str(identity) == identity.uri == uri


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "b",
        "spiffe://example.org",
        "spiffe://example.org/",
        "spiffe://example.org/vmhost",
        "spiffe://example.org/vmhost/",
        "spiffe://example.org/vmhost/b/",
        "spiffe://example.org/vmhost/b/c",
        "spiffe://example.org//vmhost/b",
        "spiffe:///vmhost/b",
        "SPIFFE://example.org/vmhost/b",
        "https://example.org/vmhost/b",
        "spiffe://Example.org/vmhost/b",
        "spiffe://example.org:443/vmhost/b",
        "spiffe://user@example.org/vmhost/b",
        "spiffe://example..org/vmhost/b",
        "spiffe://.example.org/vmhost/b",
        "spiffe://example.org./vmhost/b",
        "spiffe://-example.org/vmhost/b",
        "spiffe://exa_mple.org/vmhost/b",
        "spiffe://" + "x" * 64 + "/vmhost/b",
        "spiffe://" + LONGEST_DOMAIN + "/vmhost/bcd",
        "spiffe://example.org/VMHOST/b",
        "spiffe://example.org/vmhosts/b",
        "spiffe://example.org/host/b",
        "spiffe://example.org/vmhost/B",
        "spiffe://example.org/vmhost/b.c",
        "spiffe://example.org/vmhost/b_c",
        "spiffe://example.org/vmhost/-b",
        "spiffe://example.org/vmhost/b-",
        "spiffe://example.org/vmhost/*",
        "spiffe://example.org/vmhost/..",
        "spiffe://example.org/vmhost/%62",
        "spiffe://example.org/vmhost/b?x=1",
        "spiffe://example.org/vmhost/b#x",
        "spiffe://example.org/vmhost/b\n",
        "spiffe://example.org/vmhost/b\0",
        " spiffe://example.org/vmhost/b",
        "spiffe://example.org/vmhost/\u0430",
        "spiffe://ex\u0430mple.org/vmhost/b",
        "spiffe://example.org/vmhost/\u0661",
        "spiffe://example.org/vmhost/" + "b" * 64,
        "spiffe://example.org/vmhost/" + "b" * 10_000_000,
    ],
    ids=lambda uri: ascii(uri[:50]),
)
def test_refuses_anything_else(uri: str) -> None:
    """Anything but the exact lower-case spelling is refused, naming the field, in a message of bounded size."""
    with pytest.raises(TicketInvalidError) as caught:
        Identity.parse(uri, field="source", error=TicketInvalidError)
    assert caught.value.field == "source"
    assert len(str(caught.value)) < 2_000


def test_parts_are_checked_too() -> None:
    """An identity cannot be put together from parts that could not be read."""
    with pytest.raises(InvalidArgumentError):
        Identity("example.org", Kind.VMHOST, "b/../c")
    with pytest.raises(InvalidArgumentError):
        Identity("example.org/vmhost", Kind.VMHOST, "b")


@given(IDENTITIES)
def test_uri_round_trip(identity: Identity) -> None:
    """What is written can be read, and is the same; the DNS name is one."""
    assert Identity.parse(identity.uri) == identity
    assert re.fullmatch(r"[a-z0-9.-]{1,253}", identity.server_name)


@given(IDENTITIES, IDENTITIES)
def test_server_names_do_not_collide(one: Identity, other: Identity) -> None:
    """Different identities have different DNS names, else TLS could take one for the other."""
    assert (one == other) == (one.server_name == other.server_name)


def test_server_names_do_not_collide_by_borrowed_labels() -> None:
    """A trust domain that looks like the tail of another identity does not make the names meet."""
    looks_alike = Identity("vmhost.example.org", Kind.VMHOST, "vmhost")
    names = {looks_alike.server_name, Identity("example.org", Kind.VMHOST, "vmhost").server_name}
    assert len(names) == 2


@given(st.text(max_size=300) | st.binary(max_size=300).map(lambda data: data.decode("latin-1")))
def test_any_text_is_read_exactly_or_refused(text: str) -> None:
    """No text is read as an identity that is spelt otherwise, and none raises anything unexpected."""
    with contextlib.suppress(InvalidArgumentError):
        assert Identity.parse(text).uri == text


@pytest.mark.parametrize("encode", [der, pem])
def test_reads_the_identity_of_a_certificate(encode: Callable[[x509.Certificate], bytes]) -> None:
    """The one URI name of a leaf is its identity, in either spelling of the certificate."""
    assert identity_from_certificate(encode(AUTHORITY.host(HOST_B))) == HOST_B


@pytest.mark.parametrize(
    ("certificate", "because"),
    [
        (AUTHORITY.leaf(common_name="spiffe://example.org/vmhost/b"), "no subject alternative name"),
        (AUTHORITY.leaf(dns=["b.vmhost.example.org"]), "exactly one URI"),
        (AUTHORITY.leaf(uris=[HOST_A.uri, HOST_B.uri]), "exactly one URI"),
        (AUTHORITY.leaf(uris=[HOST_B.uri, "https://example.org/"]), "exactly one URI"),
        (AUTHORITY.leaf(uris=["https://example.org/vmhost/b"]), "not of the form"),
        (AUTHORITY.leaf(uris=["spiffe://example.org"]), "not of the form"),
        (AUTHORITY.host(HOST_B, dns=["*.vmhost.example.org"]), "other than b.vmhost.example.org"),
        (AUTHORITY.host(HOST_B, dns=[HOST_B.server_name, HOST_A.server_name]), "a.vmhost.example.org"),
        (AUTHORITY.host(HOST_B, constraints=x509.BasicConstraints(ca=True, path_length=None)), "CA's"),
        (AUTHORITY.host(HOST_B, usage=key_usage(sign=False)), "digitalSignature"),
        (AUTHORITY.host(HOST_B, usage=key_usage(sign=True, authority=True)), "not a CA's"),
        (AUTHORITY.certificate, "CA's"),
    ],
    ids=[
        "common name only", "DNS only", "two identities", "identity and another URI", "not SPIFFE", "the root",
        "wildcard", "another host's DNS name", "CA", "may not sign", "may sign certificates", "the authority itself",
    ],
)  # fmt: skip
def test_refuses_certificates(certificate: x509.Certificate, because: str) -> None:
    """A certificate that is not exactly a leaf for one identity proves none."""
    with pytest.raises(UnauthenticatedError, match=re.escape(because)):
        identity_from_certificate(der(certificate))


@given(st.binary(max_size=200))
def test_bytes_that_are_no_certificate_are_refused(data: bytes) -> None:
    """Garbage is refused with the error that callers expect."""
    with pytest.raises(UnauthenticatedError):
        identity_from_certificate(data)


@given(st.data())
def test_damaged_certificates_are_read_or_refused(data: st.DataObject) -> None:
    """A certificate with a changed byte never raises anything but the error that callers expect."""
    good = bytearray(CERTIFICATE)
    good[data.draw(st.integers(0, len(good) - 1))] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(UnauthenticatedError):
        identity_from_certificate(bytes(good))
