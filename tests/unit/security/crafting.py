"""Certificates that a decent authority would never issue."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeAlias

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from vmferry.security.identity import Identity

AnyKey: TypeAlias = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey

HOST_A = Identity.parse("spiffe://example.org/vmhost/a")
HOST_B = Identity.parse("spiffe://example.org/vmhost/b")
CONTROLLER = Identity.parse("spiffe://example.org/controller/scheduler")
ADMIN = Identity.parse("spiffe://example.org/admin/jane")

TLS = (ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH)
SIGNING = (ExtendedKeyUsageOID.CODE_SIGNING,)


def key_usage(*, sign: bool = True, authority: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=sign,
        content_commitment=False,
        key_encipherment=not sign,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=authority,
        crl_sign=authority,
        encipher_only=False,
        decipher_only=False,
    )


class Authority:
    """Signs whatever it is told to."""

    def __init__(
        self, *, is_ca: bool = True, start: timedelta = timedelta(days=-2), end: timedelta = timedelta(days=9)
    ) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name(
            [x509.NameAttribute(NameOID.COMMON_NAME, f"ca {x509.random_serial_number():x}"[:60])]
        )
        now = datetime.now(UTC)
        self.certificate = (
            x509.CertificateBuilder(self.name, self.name, self.key.public_key(), x509.random_serial_number())
            .not_valid_before(now + start)
            .not_valid_after(now + end)
            .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
            .add_extension(key_usage(sign=False, authority=is_ca), critical=True)
            .sign(self.key, hashes.SHA256())
        )
        self.pem = self.certificate.public_bytes(Encoding.PEM)

    def leaf(
        self,
        *,
        uris: Sequence[str] = (),
        dns: Sequence[str] = (),
        key: AnyKey | None = None,
        usage: x509.KeyUsage | None = None,
        constraints: x509.BasicConstraints | None = None,
        purposes: Sequence[x509.ObjectIdentifier] = TLS,
        start: timedelta = timedelta(days=-2),
        end: timedelta = timedelta(days=1),
        common_name: str = "leaf",
    ) -> x509.Certificate:
        """A certificate; what is not named is as it should be."""
        now = datetime.now(UTC)
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
        public = (key or ec.generate_private_key(ec.SECP256R1())).public_key()
        builder = (
            x509.CertificateBuilder(self.name, subject, public, x509.random_serial_number())
            .not_valid_before(now + start)
            .not_valid_after(now + end)
            .add_extension(constraints or x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(usage or key_usage(), critical=True)
            .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
        )
        names = [*map(x509.UniformResourceIdentifier, uris), *map(x509.DNSName, dns)]
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(self.key, hashes.SHA256())

    def host(self, identity: Identity, **changes: object) -> x509.Certificate:
        """A host's certificate as it should be, but for ``changes``."""
        return self.leaf(**{"uris": [identity.uri], "dns": [identity.server_name], **changes})  # type: ignore[arg-type]


def der(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.DER)


def pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.PEM)


def key_pem(key: AnyKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def write_folder(directory: Path, ca_pem: bytes, certificate: x509.Certificate, key: AnyKey) -> Path:
    """A folder as services read it."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "ca.pem").write_bytes(ca_pem)
    (directory / "tls.crt").write_bytes(pem(certificate))
    (directory / "tls.key").write_bytes(key_pem(key))
    (directory / "tls.key").chmod(0o600)
    return directory
