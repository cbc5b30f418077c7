"""The throw-away authority issues what the rest demands, and takes care of its files."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID

from tests.unit.security.crafting import ADMIN, CONTROLLER, HOST_A, HOST_B
from vmferry.errors import ConfigError, InvalidArgumentError
from vmferry.security.authority import authority_trust_domain, init_authority, issue
from vmferry.security.identity import Identity, Kind
from vmferry.security.material import TlsFiles
from vmferry.security.tickets import TicketSigner


@pytest.fixture
def authority(tmp_path: Path) -> Path:
    """An authority of example.org."""
    init_authority(tmp_path / "ca", "example.org")
    return tmp_path / "ca"


@pytest.fixture(params=[0o000, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    """The widest and the narrowest umask."""
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


@pytest.mark.parametrize("identity", [HOST_A, CONTROLLER, ADMIN], ids=str)
def test_what_is_issued_can_be_used(authority: Path, tmp_path: Path, identity: Identity) -> None:
    """Every issued folder loads, is who it should be, and only callers can sign tickets."""
    out = tmp_path / "deep" / "out"
    issue(authority, identity, out)
    assert TlsFiles(out).load().identity == identity
    if identity.kind is Kind.VMHOST:
        assert sorted(path.name for path in out.iterdir()) == ["ca.pem", "tls.crt", "tls.key"]
    else:
        assert TicketSigner.load(out).identity == identity


def test_modes(tmp_path: Path, umask: int) -> None:
    """Keys are 0600 and new folders closed, whatever the umask; certificates can be read."""
    init_authority(tmp_path / "ca", "example.org")
    issue(tmp_path / "ca", CONTROLLER, tmp_path / "out")
    for directory in (tmp_path / "ca", tmp_path / "out"):
        assert mode(directory) == 0o700
        for path in directory.iterdir():
            assert mode(path) == (0o600 if path.suffix == ".key" else 0o644), path
            assert not path.name.startswith("."), "a temporary file was left behind"


@pytest.mark.parametrize(
    ("identity", "purposes"),
    [
        (HOST_A, {ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH}),
        (CONTROLLER, {ExtendedKeyUsageOID.CLIENT_AUTH}),
        (ADMIN, {ExtendedKeyUsageOID.CLIENT_AUTH}),
    ],
    ids=str,
)
def test_leaves_are_constrained(
    authority: Path, tmp_path: Path, identity: Identity, purposes: set[x509.ObjectIdentifier]
) -> None:
    """A leaf is for one identity and its purposes: callers cannot pass for servers, TLS keys cannot sign tickets."""
    issue(authority, identity, tmp_path / "out")
    leaf = certificate(tmp_path / "out" / "tls.crt")
    assert isinstance(leaf.public_key(), ec.EllipticCurvePublicKey)
    assert set(leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == purposes
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == [identity.uri]
    dns = names.get_values_for_type(x509.DNSName)
    assert dns == ([identity.server_name] if identity.kind is Kind.VMHOST else [])
    for limit in (
        leaf.extensions.get_extension_for_class(x509.BasicConstraints),
        leaf.extensions.get_extension_for_class(x509.KeyUsage),
    ):
        assert limit.critical
    if identity.kind is not Kind.VMHOST:
        signer = certificate(tmp_path / "out" / "ticket.crt")
        assert isinstance(signer.public_key(), ed25519.Ed25519PublicKey)
        purpose = signer.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        assert list(purpose) == [ExtendedKeyUsageOID.CODE_SIGNING]


def test_the_authority_can_issue_leaves_only(authority: Path) -> None:
    """The authority's certificate allows no further authority below it, and no use as a leaf."""
    extensions = certificate(authority / "ca.pem").extensions
    constraints = extensions.get_extension_for_class(x509.BasicConstraints)
    assert (constraints.critical, constraints.value.ca, constraints.value.path_length) == (True, True, 0)
    assert not extensions.get_extension_for_class(x509.KeyUsage).value.digital_signature
    assert authority_trust_domain(authority) == "example.org"


def test_nothing_is_overwritten(authority: Path, tmp_path: Path) -> None:
    """A second run changes no byte unless it is forced."""
    issue(authority, HOST_A, tmp_path / "a")
    before = {path: path.read_bytes() for path in [*authority.iterdir(), *(tmp_path / "a").iterdir()]}
    with pytest.raises(InvalidArgumentError, match=r"already holds ca\.pem, ca\.key"):
        init_authority(authority, "example.org")
    with pytest.raises(InvalidArgumentError, match=r"already holds tls\.key, tls\.crt, ca\.pem"):
        issue(authority, HOST_A, tmp_path / "a")
    assert {path: path.read_bytes() for path in before} == before


def test_renewal_keeps_the_trusted_authorities(authority: Path, tmp_path: Path) -> None:
    """Renewing while an authority is being replaced does not withdraw trust from the other one."""
    out = tmp_path / "a"
    issue(authority, HOST_A, out)
    old = TlsFiles(out).load()
    init_authority(tmp_path / "new", "example.org")
    both = (authority / "ca.pem").read_bytes() + (tmp_path / "new" / "ca.pem").read_bytes()
    (out / "ca.pem").write_bytes(both)
    issue(tmp_path / "new", HOST_A, out, force=True)
    new = TlsFiles(out).load()
    assert new.ca_pem == both
    assert new.key_sha256 != old.key_sha256


def test_renewal_by_another_authority_replaces_trust(authority: Path, tmp_path: Path) -> None:
    """A folder that does not know the authority yet trusts it, and only it, afterwards."""
    out = tmp_path / "a"
    issue(authority, HOST_A, out)
    init_authority(tmp_path / "new", "example.org")
    issue(tmp_path / "new", HOST_A, out, force=True)
    assert TlsFiles(out).load().ca_pem == (tmp_path / "new" / "ca.pem").read_bytes()


@pytest.mark.parametrize("days", [0, -1, 366, 10**9])
def test_days_are_bounded(authority: Path, tmp_path: Path, days: int) -> None:
    """A certificate outlives neither sense nor its authority."""
    with pytest.raises(InvalidArgumentError) as caught:
        issue(authority, HOST_A, tmp_path / "a", days=days)
    assert caught.value.field == "days"
    assert not (tmp_path / "a").exists()


def test_validity_can_be_chosen(authority: Path, tmp_path: Path) -> None:
    """Tests can ask for any validity, also one that is over."""
    start, end = datetime(2020, 1, 1, tzinfo=UTC), datetime(2020, 1, 2, tzinfo=UTC)
    issue(authority, HOST_A, tmp_path / "a", not_before=start, not_after=end)
    leaf = certificate(tmp_path / "a" / "tls.crt")
    assert (leaf.not_valid_before_utc, leaf.not_valid_after_utc) == (start, end)
    issue(authority, HOST_B, tmp_path / "b", days=2)
    left = certificate(tmp_path / "b" / "tls.crt").not_valid_after_utc - datetime.now(UTC)
    assert timedelta(days=1, hours=23) < left <= timedelta(days=2)


@pytest.mark.parametrize(
    "trust_domain", ["", "Example.org", "example.org/", "a b", "example.org\n", "x" * 64]
)
def test_bad_trust_domains(tmp_path: Path, trust_domain: str) -> None:
    """An authority is made only for a lower-case DNS name."""
    with pytest.raises(InvalidArgumentError) as caught:
        init_authority(tmp_path / "ca", trust_domain)
    assert caught.value.field == "trust_domain"
    assert not (tmp_path / "ca").exists()


def test_other_trust_domains_are_refused(authority: Path, tmp_path: Path) -> None:
    """An authority issues for its own trust domain only."""
    with pytest.raises(InvalidArgumentError, match=r"trust domain example\.org"):
        issue(authority, Identity("other.org", Kind.VMHOST, "a"), tmp_path / "a")


def test_a_broken_authority_is_named(authority: Path, tmp_path: Path) -> None:
    """A folder that is no authority, or has another one's key, is refused before anything is written."""
    init_authority(tmp_path / "other", "example.org")
    (authority / "ca.key").write_bytes((tmp_path / "other" / "ca.key").read_bytes())
    with pytest.raises(ConfigError, match="is not the key of"):
        issue(authority, HOST_A, tmp_path / "a")
    (authority / "ca.pem").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match="is not an authority"):
        issue(authority, HOST_A, tmp_path / "a")
    with pytest.raises(ConfigError, match="No such file"):
        issue(tmp_path / "nowhere", HOST_A, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_folder_that_cannot_be_written(authority: Path, tmp_path: Path) -> None:
    """A file in the way is named, and no partial file stays."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file/a"):
        issue(authority, HOST_A, tmp_path / "file" / "a")
