"""A certificate authority for demonstrations and tests; production brings its own.

Promise: what it issues is exactly what the other modules demand: elliptic-curve keys, one URI name, for a host the
one DNS name, no right to issue further. Keys are 0600 from their first moment, nothing is overwritten unless forced.
The CA's own key lies unencrypted beside its certificate, which is why this is not for production.
"""

from __future__ import annotations

import secrets
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
from vmferry.security.trust import UNREADABLE

AUTHORITY_DAYS: Final = 365
LEAF_DAYS: Final = 30
MAX_DAYS: Final = AUTHORITY_DAYS
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
    # Each authority has its own name, so that a verifier who trusts two of them can tell them apart.
    name = f"vmferry throw-away CA {secrets.token_hex(4)}"
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
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
    """Write ``ca.pem``, ``tls.crt``, ``tls.key``; for controllers and admins also ``ticket.crt`` and ``ticket.key``.

    With ``force`` it renews: keys first, so that a service that looks in between sees a pair that does not match,
    and stays with the old one until the new one is whole. A ``ca.pem`` that already trusts this authority stays as
    it is, as it may trust another one too while the authority is being replaced.

    Raises:
        InvalidArgumentError: the identity is of another trust domain, or files are there and ``force`` is not set.
        ConfigError: the authority's files are broken, or the folder cannot be written.
    """
    authority = _Authority(authority_dir)
    if identity.trust_domain != authority.trust_domain:
        raise InvalidArgumentError(
            f"{identity} is not of this authority's trust domain {authority.trust_domain}", field="identity"
        )
    if not 1 <= days <= MAX_DAYS:
        raise InvalidArgumentError(f"a certificate is valid for 1 to {MAX_DAYS} days", field="days")
    now = datetime.now(UTC)
    validity = (not_before or now - _BACKDATE, not_after or now + timedelta(days=days))
    host = identity.kind is Kind.VMHOST
    names = (
        ("tls.key", "tls.crt", "ca.pem")
        if host
        else ("tls.key", "tls.crt", "ticket.key", "ticket.crt", "ca.pem")
    )
    _prepare(out_dir, names, force=force)

    key = ec.generate_private_key(ec.SECP256R1())
    purposes = [ExtendedKeyUsageOID.CLIENT_AUTH, *([ExtendedKeyUsageOID.SERVER_AUTH] if host else [])]
    _write_pair(out_dir, "tls", key, authority.sign(identity, key.public_key(), purposes, validity))
    if not host:
        signing_key = ed25519.Ed25519PrivateKey.generate()
        certificate = authority.sign(
            identity, signing_key.public_key(), [ExtendedKeyUsageOID.CODE_SIGNING], validity
        )
        _write_pair(out_dir, "ticket", signing_key, certificate)
    if not (force and _trusts(out_dir / "ca.pem", authority.pem)):
        write_atomic(out_dir / "ca.pem", authority.pem, mode=PUBLIC_MODE)


def authority_trust_domain(authority_dir: Path) -> str:
    """The trust domain that an authority issues for; raises ConfigError if the folder holds none."""
    return _Authority(authority_dir).trust_domain


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
        except (*UNREADABLE, TypeError, x509.ExtensionNotFound) as error:
            raise ConfigError(
                f"{directory} is not an authority of 'vmferry certs init': {error}", field="ca"
            ) from error
        if (
            not isinstance(key, ec.EllipticCurvePrivateKey)
            or key.public_key() != self._certificate.public_key()
        ):
            raise ConfigError(f"{directory / 'ca.key'} is not the key of {path}", field="ca.key")
        self._key = key
        self.trust_domain = uri.removeprefix("spiffe://")

    def sign(
        self,
        identity: Identity,
        key: ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey,
        purposes: list[x509.ObjectIdentifier],
        validity: tuple[datetime, datetime],
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
            .not_valid_before(validity[0])
            .not_valid_after(validity[1])
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


def _trusts(path: Path, authority_pem: bytes) -> bool:
    return path.exists() and authority_pem.strip() in read_public(path)


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


def _write_pair(
    directory: Path,
    stem: str,
    key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey,
    certificate: bytes,
) -> None:
    write_atomic(directory / f"{stem}.key", _private_pem(key), mode=PRIVATE_MODE)
    write_atomic(directory / f"{stem}.crt", certificate, mode=PUBLIC_MODE)


def _private_pem(key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
