"""The certificate, key and trusted authorities of one party, read from its folder.

Promise: material that was loaded works: the key fits the certificate, the certificate fits the authorities, nothing
has expired, the identity is usable, and the kind of key keeps TLS 1.2 locked out (see ``tls13``). Anything else is a
ConfigError that names the file, at start instead of in the middle of a migration.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from vmferry.errors import ConfigError, UnauthenticatedError
from vmferry.security.files import read_private, read_public
from vmferry.security.identity import Identity, Kind, identity_from_x509, load_certificate, public_key_sha256
from vmferry.security.trust import UNREADABLE, find_issuer, is_valid_at

_CURVES: Final = (ec.SECP256R1, ec.SECP384R1)


@dataclass(frozen=True)
class TlsMaterial:
    """What one end of a connection proves itself with."""

    ca_pem: bytes = field(repr=False)
    """Authorities that peers must be issued by; more than one while an authority is being replaced."""
    cert_pem: bytes = field(repr=False)
    """The own certificate, followed by intermediate ones if there are any."""
    key_pem: bytes = field(repr=False)
    identity: Identity
    """Who the certificate says this is."""
    not_after: datetime
    """When the first certificate on the path to the authority expires."""

    @property
    def key_sha256(self) -> bytes:
        """SHA-256 of the own public key, as tickets name keys."""
        return public_key_sha256(load_certificate(self.cert_pem))


@dataclass(frozen=True)
class TlsFiles:
    """The folder with ``ca.pem``, ``tls.crt`` and ``tls.key``."""

    directory: Path

    @property
    def ca(self) -> Path:
        """Trusted authorities, PEM."""
        return self.directory / "ca.pem"

    @property
    def cert(self) -> Path:
        """The own certificate and its intermediates, PEM."""
        return self.directory / "tls.crt"

    @property
    def key(self) -> Path:
        """The own key, PEM, mode 0600 or narrower."""
        return self.directory / "tls.key"

    def fingerprint(self) -> tuple[tuple[int, ...], ...]:
        """Changes whenever one of the files is replaced, rewritten or gets another mode; cheap."""
        found: list[tuple[int, ...]] = []
        for path in (self.ca, self.cert, self.key):
            try:
                status = path.stat()
            except OSError:
                found.append(())
            else:
                found.append(
                    (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
                )
        return tuple(found)

    def load(self) -> TlsMaterial:
        """Read and check everything.

        Raises:
            ConfigError: a file is missing, broken, expired, does not fit the others, or its key is open to others.
        """
        now = datetime.now(UTC)
        ca_pem, cert_pem, key_pem = read_public(self.ca), read_public(self.cert), read_private(self.key)
        authorities = _certificates(self.ca, ca_pem)
        leaf, *intermediates = _certificates(self.cert, cert_pem)
        identity = self._identity(leaf)
        self._check_key(leaf, key_pem)
        _check_validity(self.cert, leaf, now)
        path = self._path(leaf, intermediates, authorities, now)
        not_after = min(certificate.not_valid_after_utc for certificate in path)
        return TlsMaterial(ca_pem, cert_pem, key_pem, identity, not_after)

    def _identity(self, leaf: x509.Certificate) -> Identity:
        try:
            identity = identity_from_x509(leaf)
        except UnauthenticatedError as error:
            raise ConfigError(
                f"{self.cert}: {error}", field=self.cert.name, remedy=error.instance_remedy
            ) from error
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        if identity.kind is Kind.VMHOST and not names.get_values_for_type(x509.DNSName):
            raise ConfigError(
                f"{self.cert}: a host's certificate must also have the DNS name {identity.server_name},"
                " by which clients recognise it",
                field=self.cert.name,
            )
        return identity

    def _check_key(self, leaf: x509.Certificate, key_pem: bytes) -> None:
        public = leaf.public_key()
        if not isinstance(public, ec.EllipticCurvePublicKey) or not isinstance(public.curve, _CURVES):
            raise ConfigError(
                f"{self.cert}: its key must be ECDSA P-256 or P-384; with RSA, TLS 1.2 could not be shut out,"
                " and gRPC's TLS takes no other kind",
                field=self.cert.name,
                remedy="Issue the certificate for an ECDSA P-256 key.",
            )
        try:
            private = load_pem_private_key(key_pem, password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise ConfigError(f"{self.key} is not an unencrypted PEM key", field=self.key.name) from error
        if private.public_key() != public:
            raise ConfigError(f"{self.key} is not the key of {self.cert}", field=self.key.name)

    def _path(
        self,
        leaf: x509.Certificate,
        intermediates: Sequence[x509.Certificate],
        authorities: Sequence[x509.Certificate],
        now: datetime,
    ) -> list[x509.Certificate]:
        path = [leaf]
        for intermediate in intermediates:
            if find_issuer(path[-1], [intermediate], now) is None:
                break  # an authority's own certificate, appended for completeness
            path.append(intermediate)
        issuer = find_issuer(path[-1], authorities, now)
        if issuer is None:
            raise ConfigError(
                f"{self.cert} was not issued by a valid authority of {self.ca}", field=self.ca.name
            )
        return [*path, issuer]


def _certificates(path: Path, pem: bytes) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(pem)
    except UNREADABLE as error:
        raise ConfigError(f"{path} holds no PEM certificate, or a broken one", field=path.name) from error


def _check_validity(path: Path, certificate: x509.Certificate, now: datetime) -> None:
    if is_valid_at(certificate, now):
        return
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    state = (
        f"expired at {end:%Y-%m-%dT%H:%M:%SZ}"
        if now > end
        else f"is not valid before {start:%Y-%m-%dT%H:%M:%SZ}"
    )
    raise ConfigError(
        f"{path} {state}",
        field=path.name,
        remedy="Issue a new one (vmferry certs issue --force), or set the clock.",
    )
