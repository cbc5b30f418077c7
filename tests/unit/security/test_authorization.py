"""Who may call what: every method of every service, every kind of caller, cell by cell against the documentation."""

from __future__ import annotations

import hashlib
import importlib
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from google.protobuf.descriptor import FileDescriptor
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

import vmferry.v1
from tests.unit.security.crafting import HOST_A, HOST_B, Authority, pem
from vmferry.errors import PermissionDeniedError, UnauthenticatedError
from vmferry.security.authorization import (
    TABLE,
    authorize,
    caller_from_auth_context,
    caller_key_sha256,
    tls_version_from_auth_context,
)
from vmferry.security.identity import Identity, Kind

OWN = HOST_B
DOCUMENT = Path(__file__).parents[3] / "docs" / "security.md"


def methods_of(file: FileDescriptor) -> Iterator[str]:
    for service in file.services_by_name.values():
        for method in service.methods:
            yield f"/{service.full_name}/{method.name}"


def our_methods() -> list[str]:
    """Every method of every generated service."""
    modules = [
        module.name for module in pkgutil.iter_modules(vmferry.v1.__path__) if module.name.endswith("_pb2")
    ]
    files = [importlib.import_module(f"vmferry.v1.{name}").DESCRIPTOR for name in modules]
    return [method for file in files for method in methods_of(file)]


def documented() -> dict[str, frozenset[Kind]]:
    """The table of docs/security.md."""
    rows = re.findall(
        r"^\| `(/\S+)` \| (yes|no) \| (yes|no) \| (yes|no) \|$", DOCUMENT.read_text(), re.MULTILINE
    )
    kinds = (Kind.VMHOST, Kind.CONTROLLER, Kind.ADMIN)
    assert "| Method | vmhost | controller | admin |" in DOCUMENT.read_text()
    assert len(rows) == len({row[0] for row in rows})
    return {
        method: frozenset(kind for kind, cell in zip(kinds, cells, strict=True) if cell == "yes")
        for method, *cells in rows
    }


OURS = our_methods()
METHODS = [*OURS, *methods_of(health_pb2.DESCRIPTOR), *methods_of(reflection_pb2.DESCRIPTOR)]


def test_the_services_are_seen() -> None:
    """The walk over the generated code finds all services; otherwise the tests below would be about nothing."""
    assert {method.split("/")[1] for method in OURS} == {
        "vmferry.v1.UpdateService",
        "vmferry.v1.SourceService",
        "vmferry.v1.DestinationService",
        "vmferry.v1.DrainService",
        "vmferry.v1.RecoveryService",
        "vmferry.v1.EventsService",
        "vmferry.v1.ClockService",
    }
    assert len(OURS) >= 15


def test_no_method_is_missing_and_none_is_invented() -> None:
    """Each method of ours has its row, and no row of ours is for a method that does not exist."""
    assert {method for method in TABLE if "/vmferry." in method} == set(OURS)
    assert set(METHODS) <= set(TABLE)


def test_the_document_says_the_same() -> None:
    """docs/security.md shows the table as it is."""
    assert documented() == dict(TABLE)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", Kind)
def test_every_cell(method: str, kind: Kind) -> None:
    """An identified caller over TLS 1.3 may do what the documentation says, and nothing else."""
    caller = Identity(OWN.trust_domain, kind, "x")
    if kind in documented()[method]:
        authorize(method, caller=caller, own=OWN, tls_version="TLSv1.3")
        return
    with pytest.raises(PermissionDeniedError) as caught:
        authorize(method, caller=caller, own=OWN, tls_version="TLSv1.3")
    assert caught.value.metadata == {"method": method, "caller": caller.uri}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("domain", ["other.org", "sub.example.org", "org", "example.org.other.org"])
def test_other_trust_domains_may_do_nothing(method: str, kind: Kind, domain: str) -> None:
    """A certificate that is fine but of another trust domain opens no method."""
    with pytest.raises(UnauthenticatedError):
        authorize(method, caller=Identity(domain, kind, "x"), own=OWN, tls_version="TLSv1.3")


@pytest.mark.parametrize("method", METHODS)
def test_nobody_may_do_nothing(method: str) -> None:
    """Without an identity there is no method to call."""
    with pytest.raises(UnauthenticatedError):
        authorize(method, caller=None, own=OWN, tls_version="TLSv1.3")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("version", ["", "TLSv1", "TLSv1.1", "TLSv1.2", "tlsv1.3", "TLSv1.30", "TLSv1.4"])
def test_other_versions_of_tls_may_do_nothing(method: str, kind: Kind, version: str) -> None:
    """Whoever it is, the connection must be TLS 1.3."""
    with pytest.raises(UnauthenticatedError):
        authorize(method, caller=Identity(OWN.trust_domain, kind, "x"), own=OWN, tls_version=version)


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize(
    "method",
    [
        "",
        "/",
        "/vmferry.v1.SourceService/",
        "/vmferry.v1.SourceService/Shutdown",
        "/vmferry.v1.sourceservice/GetMigration",
        "vmferry.v1.SourceService/GetMigration",
        "/vmferry.v1.SourceService/GetMigration ",
        "//vmferry.v1.SourceService/GetMigration",
        "/vmferry.v2.SourceService/GetMigration",
        "/grpc.channelz.v1.Channelz/GetServers",
    ],
)
def test_unknown_methods_are_refused(method: str, kind: Kind) -> None:
    """What is not in the table is nobody's, however close it looks, and however long it is."""
    for name in (method, method + "x" * 10_000):
        with pytest.raises(PermissionDeniedError) as caught:
            authorize(name, caller=Identity(OWN.trust_domain, kind, "x"), own=OWN, tls_version="TLSv1.3")
        assert len(str(caught.value)) < 300


def test_the_table_cannot_be_changed() -> None:
    """No code can add a row at run time."""
    with pytest.raises(TypeError):
        TABLE["/vmferry.v1.SourceService/Shutdown"] = frozenset(Kind)  # type: ignore[index]


AUTHORITY = Authority()
KEY = ec.generate_private_key(ec.SECP256R1())
CERTIFICATE = pem(AUTHORITY.host(HOST_A, key=KEY))


def auth_context(**changes: Iterable[bytes] | None) -> dict[str, Iterable[bytes]]:
    """What gRPC says about a connection of host a, but for ``changes``."""
    found = {
        "transport_security_type": [b"ssl"],
        "x509_pem_cert": [CERTIFICATE],
        "x509_subject_alternative_name": [HOST_A.uri.encode(), HOST_A.server_name.encode()],
        "peer_uri": [HOST_A.uri.encode()],
        "peer_spiffe_id": [HOST_A.uri.encode()],
        "ssl_tls_version": [b"TLSv1.3"],
        **changes,
    }
    return {name: values for name, values in found.items() if values is not None}


def test_the_caller_is_read_from_the_certificate() -> None:
    """Identity, key and version of a connection are what TLS says; values may be any iterable."""
    auth = {name: tuple(values) for name, values in auth_context().items()}
    key = KEY.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    assert caller_from_auth_context(auth) == HOST_A
    assert caller_key_sha256(auth) == hashlib.sha256(key).digest()
    assert tls_version_from_auth_context(auth) == "TLSv1.3"


@pytest.mark.parametrize(
    "changes",
    [
        {"peer_spiffe_id": None},
        {"peer_spiffe_id": []},
        {"peer_spiffe_id": [HOST_A.uri.encode()] * 2},
        {"peer_spiffe_id": [HOST_B.uri.encode()]},
        {"peer_uri": None},
        {"peer_uri": [HOST_A.uri.encode(), HOST_B.uri.encode()]},
        {"peer_uri": [HOST_A.uri.encode(), b"https://example.org/"]},
        {"peer_uri": [HOST_B.uri.encode()]},
        {"x509_pem_cert": None},
        {"x509_pem_cert": []},
        {"x509_pem_cert": [b"nothing"]},
        {"x509_pem_cert": [CERTIFICATE, CERTIFICATE]},
        {"x509_pem_cert": [pem(AUTHORITY.host(HOST_B))]},
        {"x509_pem_cert": [pem(AUTHORITY.host(HOST_A, dns=["*.vmhost.example.org"]))]},
        {"x509_pem_cert": [pem(AUTHORITY.host(HOST_A, uris=[HOST_A.uri, HOST_B.uri]))]},
        {"x509_pem_cert": [pem(AUTHORITY.leaf(common_name=HOST_A.uri))]},
    ],
)
def test_connections_without_one_clear_identity(changes: dict[str, Iterable[bytes]]) -> None:
    """Two identities, none, or sources that do not agree are no identity."""
    with pytest.raises(UnauthenticatedError):
        caller_from_auth_context(auth_context(**changes))


def test_a_plaintext_connection_has_nothing() -> None:
    """The empty context of a plaintext connection gives no caller, no key and no version."""
    with pytest.raises(UnauthenticatedError):
        caller_from_auth_context({})
    with pytest.raises(UnauthenticatedError):
        caller_key_sha256({})
    assert tls_version_from_auth_context({}) == ""
    assert tls_version_from_auth_context({"ssl_tls_version": [b"TLSv1.3", b"TLSv1.2"]}) == ""


def test_deciding_needs_no_grpc() -> None:
    """The decision, tickets and the lock-out of TLS 1.2 can be loaded before gRPC, and do not load it."""
    modules = "authorization, identity, tickets, material, authority, tls13, trust, files"
    code = f"from vmferry.security import {modules}\nimport sys\nassert 'grpc' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
