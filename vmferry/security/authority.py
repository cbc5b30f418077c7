"""A certificate authority for demonstrations and tests; production brings its own.

Promise: what it issues is exactly what the other modules demand: elliptic-curve keys, one URI name, for a host the one
DNS name, no right to issue further. Keys are 0600 from their first moment, and nothing is overwritten unless forced.
The CA's own key lies unencrypted beside its certificate, which is why this is not for production.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from vmferry.errors import ConfigError, InvalidArgumentError
from vmferry.security.files import PRIVATE_MODE, PUBLIC_MODE, read_private, read_public, write_atomic
from vmferry.security.identity import Identity, Kind, check_trust_domain

AUTHORITY_DAYS: Final = 365
LEAF_DAYS: Final = 30
_BACKDATE: Final = timedelta(minutes=5)
"""New certificates are valid at once on hosts whose clock is behind."""


def init_authority(directory: Path, trust_domain: str) -> None:
    """Make ``ca.pem`` and ``ca.key`` for one trust domain.

    Raises:
        InvalidArgumentError: the trust domain is malformed, or an authority is there already.
        ConfigError: the folder cannot be written.
    """
    check_trust_domain(trust_domain)
    _prepare(directory, ("ca.pem", "ca.key"), force=False)
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "vmferry throw-away CA")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - _BACKDATE)
        .not_valid_after(now + timedelta(days=AUTHORITY_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(authority=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            # As X.509 SVID has it: an authority bears its trust domain's own name.
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier(f"spiffe://{trust_domain}")]),
            critical=False,
        )
        .sign(key, hashes.SHA256())
    )
    write_atomic(directory / "ca.key", _private_pem(key), mode=PRIVATE_MODE)
    write_atomic(directory / "ca.pem", certificate.public_bytes(Encoding.PEM), mode=PUBLIC_MODE)


def issue(
    authority_dir: Path,
    identity: Identity,
    out_dir: Path,
    *,
    days: int = LEAF_DAYS,
    not_before: datetime | None = None,
    not_after: datetime | None = None,
    force: bool = False,
) -> None:
    """Write ``ca.pem``, ``tls.crt`` and ``tls.key`` for ``identity``; for callers also ``ticket.crt``, ``ticket.key``.

    With ``force`` it renews: keys first, so that a service that looks in between sees a pair that does not match,
    and stays with the old one until the new one is whole.

    Raises:
        InvalidArgumentError: the identity is of another trust domain, or files are there and ``force`` is not set.
        ConfigError: the authority's files are broken, or the folder cannot be written.
    """
    authority = _Authority(authority_dir)
    if identity.trust_domain != authority.trust_domain:
        raise InvalidArgumentError(
            f"{identity} is not of this authority's trust domain {authority.trust_domain}", field="identity"
        )
    if days < 1:
        raise InvalidArgumentError("a certificate is valid for at least 1 day", field="days")
    start = not_before or datetime.now(UTC) - _BACKDATE
    end = not_after or datetime.now(UTC) + timedelta(days=days)
    signs_tickets = identity.kind is not Kind.VMHOST
    names = ("tls.key", "tls.crt", *(("ticket.key", "ticket.crt") if signs_tickets else ()), "ca.pem")
    _prepare(out_dir, names, force=force)

    tls_key = ec.generate_private_key(ec.SECP256R1())
    purposes = [ExtendedKeyUsageOID.CLIENT_AUTH]
    if identity.kind is Kind.VMHOST:
        purposes.append(ExtendedKeyUsageOID.SERVER_AUTH)
    tls_certificate = authority.sign(identity, tls_key.public_key(), purposes, start, end)
    write_atomic(out_dir / "tls.key", _private_pem(tls_key), mode=PRIVATE_MODE)
    write_atomic(out_dir / "tls.crt", tls_certificate, mode=PUBLIC_MODE)
    if signs_tickets:
        ticket_key = ed25519.Ed25519PrivateKey.generate()
        purposes = [ExtendedKeyUsageOID.CODE_SIGNING]
        ticket_certificate = authority.sign(identity, ticket_key.public_key(), purposes, start, end)
        write_atomic(out_dir / "ticket.key", _private_pem(ticket_key), mode=PRIVATE_MODE)
        write_atomic(out_dir / "ticket.crt", ticket_certificate, mode=PUBLIC_MODE)
    write_atomic(out_dir / "ca.pem", authority.pem, mode=PUBLIC_MODE)


class _Authority:
    """An authority read back from its folder."""

    def __init__(self, directory: Path) -> None:
        path = directory / "ca.pem"
        self.pem = read_public(path)
        try:
            self._certificate = x509.load_pem_x509_certificate(self.pem)
            names = self._certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            (uri,) = names.get_values_for_type(x509.UniformResourceIdentifier)
            key = load_pem_private_key(read_private(directory / "ca.key"), password=None)
        except (ValueError, TypeError, x509.ExtensionNotFound) as error:
            raise ConfigError(f"{directory} is not an authority of 'vmferry certs init': {error}", field="ca") from error
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != self._certificate.public_key():
            raise ConfigError(f"{directory / 'ca.key'} is not the key of {path}", field="ca.key")
        self._key = key
        self.trust_domain = uri.removeprefix("spiffe://")

    def sign(
        self,
        identity: Identity,
        key: ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey,
        purposes: list[x509.ObjectIdentifier],
        start: datetime,
        end: datetime,
    ) -> bytes:
        """A leaf certificate for ``identity``, as PEM."""
        names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(identity.uri)]
        if identity.kind is Kind.VMHOST:
            names.append(x509.DNSName(identity.server_name))
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, identity.name)])
        issuer_key = self._certificate.public_key()
        assert isinstance(issuer_key, ec.EllipticCurvePublicKey)
        certificate = (
            x509.CertificateBuilder(self._certificate.subject, subject, key, x509.random_serial_number())
            .not_valid_before(start)
            .not_valid_after(end)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(authority=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        return certificate.public_bytes(Encoding.PEM)


def _prepare(directory: Path, names: tuple[str, ...], *, force: bool) -> None:
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make the folder {directory}: {error.strerror}", field="out") from error
    present = [name for name in names if (directory / name).exists()]
    if present and not force:
        raise InvalidArgumentError(f"{directory} already holds {', '.join(present)}", field="out")


def _key_usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=authority,
        crl_sign=authority,
        encipher_only=False,
        decipher_only=False,
    )


def _private_pem(key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
