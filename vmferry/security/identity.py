"""Who somebody is: a SPIFFE identity, and the one DNS name that stands for it inside TLS.

Promise: an :class:`Identity` that exists is well formed, and ``server_name`` maps different identities to different
names. gRPC's client compares the server's certificate with a DNS name and ignores URI names, so a host's
certificate carries both; as the mapping has no collisions, the TLS layer itself refuses every host but the expected.
"""

from __future__ import annotations

import enum
import hashlib
import re
from dataclasses import dataclass
from typing import Final, Self

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from vmferry.errors import InvalidArgumentError, UnauthenticatedError, VmferryError
from vmferry.security.trust import UNREADABLE

MAX_DNS_NAME_CHARS: Final = 253
MAX_URI_CHARS: Final = MAX_DNS_NAME_CHARS + len("spiffe://")
"""The URI has the same parts and separators as the DNS name, and the scheme."""

_LABEL: Final = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_NAME = re.compile(_LABEL)
_TRUST_DOMAIN = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")
_URI = re.compile(r"spiffe://(?P<trust_domain>[^/]+)/(?P<kind>[^/]+)/(?P<name>[^/]+)")


class Kind(enum.StrEnum):
    """What an identity is for; what each kind may do is said in ``authorization``."""

    VMHOST = "vmhost"
    """Both services of one host."""
    CONTROLLER = "controller"
    """A scheduler."""
    ADMIN = "admin"
    """A person, or a person's tool."""


@dataclass(frozen=True)
class Identity:
    """One host, controller or administrator of one trust domain; malformed parts raise InvalidArgumentError."""

    trust_domain: str
    kind: Kind
    name: str

    def __post_init__(self) -> None:
        check_trust_domain(self.trust_domain)
        if not _NAME.fullmatch(self.name):
            raise InvalidArgumentError(
                f"{self.name!r} is not a DNS label (a-z, 0-9 and inner hyphens, at most 63 characters)",
                field="name",
            )
        if len(self.server_name) > MAX_DNS_NAME_CHARS:
            raise InvalidArgumentError(
                f"the identity's DNS name has {len(self.server_name)} characters; {MAX_DNS_NAME_CHARS} are allowed",
                field="name",
            )

    @classmethod
    def parse(
        cls, uri: str, *, field: str = "identity", error: type[VmferryError] = InvalidArgumentError
    ) -> Self:
        """Read ``spiffe://DOMAIN/KIND/NAME``; only the exact lower-case spelling is accepted.

        Raises:
            VmferryError: of class ``error``, naming ``field``, if it is anything else.
        """
        match = _URI.fullmatch(uri) if len(uri) <= MAX_URI_CHARS else None
        if match is None:
            raise error(
                f"{uri[:MAX_URI_CHARS]!r} is not of the form spiffe://DOMAIN/KIND/NAME"
                f" with at most {MAX_URI_CHARS} characters",
                field=field,
            )
        try:
            return cls(match["trust_domain"], _kind(match["kind"]), match["name"])
        except InvalidArgumentError as fault:
            raise error(f"{uri!r} is not an identity: {fault}", field=field) from None

    @property
    def uri(self) -> str:
        """The SPIFFE id, as it stands in certificates, tickets and messages."""
        return f"spiffe://{self.trust_domain}/{self.kind}/{self.name}"

    @property
    def server_name(self) -> str:
        """The DNS name of a host's certificate; kind and name are one label each, so no two identities share it."""
        return f"{self.name}.{self.kind}.{self.trust_domain}"

    def __str__(self) -> str:
        return self.uri


def check_trust_domain(trust_domain: str) -> None:
    """Raise InvalidArgumentError unless ``trust_domain`` is a lower-case DNS name."""
    if not _TRUST_DOMAIN.fullmatch(trust_domain):
        raise InvalidArgumentError(
            f"{trust_domain!r} is not a lower-case DNS name such as example.org", field="trust_domain"
        )


def identity_from_certificate(pem_or_der: bytes) -> Identity:
    """The identity a leaf certificate proves, by the rules of an X.509 SVID.

    Raises:
        UnauthenticatedError: it has not exactly one URI name, is a CA, may not sign, or has a foreign DNS name.
    """
    return identity_from_x509(load_certificate(pem_or_der))


def load_certificate(pem_or_der: bytes) -> x509.Certificate:
    """Read one certificate in either spelling; raises UnauthenticatedError if it is none."""
    try:
        if pem_or_der.lstrip().startswith(b"-----BEGIN"):
            return x509.load_pem_x509_certificate(pem_or_der)
        return x509.load_der_x509_certificate(pem_or_der)
    except UNREADABLE as error:
        raise UnauthenticatedError("that is not an X.509 certificate") from error


def identity_from_x509(certificate: x509.Certificate) -> Identity:
    """As :func:`identity_from_certificate`, for a certificate that was already read."""
    try:
        extensions = certificate.extensions
    except UNREADABLE as error:
        raise UnauthenticatedError(f"the certificate's extensions cannot be read: {error}") from error
    _require_leaf(extensions)
    try:
        names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        raise UnauthenticatedError("the certificate has no subject alternative name") from None
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    if len(uris) != 1:
        raise UnauthenticatedError(f"the certificate must have exactly one URI name, it has {len(uris)}")
    identity = Identity.parse(uris[0], field="certificate", error=UnauthenticatedError)
    foreign = set(names.get_values_for_type(x509.DNSName)) - {identity.server_name}
    if foreign:
        # A wildcard, or another host's name, would let this certificate pass for that host with every client.
        raise UnauthenticatedError(
            f"the certificate of {identity} has a DNS name other than {identity.server_name}: "
            + ", ".join(sorted(foreign))
        )
    return identity


def public_key_sha256(certificate: x509.Certificate) -> bytes:
    """SHA-256 of the certificate's public key (SubjectPublicKeyInfo), as tickets name keys."""
    key = certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(key).digest()


def _kind(text: str) -> Kind:
    try:
        return Kind(text)
    except ValueError:
        raise InvalidArgumentError(f"{text!r} is none of {', '.join(Kind)}") from None


def _require_leaf(extensions: x509.Extensions) -> None:
    try:
        if extensions.get_extension_for_class(x509.BasicConstraints).value.ca:
            raise UnauthenticatedError("the certificate is a CA's, not a leaf")
    except x509.ExtensionNotFound:
        pass  # absent means "not a CA" (RFC 5280, 4.2.1.9)
    try:
        usage = extensions.get_extension_for_class(x509.KeyUsage).value
    except x509.ExtensionNotFound:
        raise UnauthenticatedError("the certificate has no key usage; digitalSignature is needed") from None
    if not usage.digital_signature or usage.key_cert_sign or usage.crl_sign:
        raise UnauthenticatedError("the certificate's key usage must be digitalSignature, and not a CA's")
