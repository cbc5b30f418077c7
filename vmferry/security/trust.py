"""Whether a certificate was issued by an authority this host trusts.

Promise: an issuer counts only if it is a CA, is valid at the time asked about, and its signature on the certificate
is right; names alone prove nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.utils import CryptographyDeprecationWarning

UNREADABLE: Final = (
    ValueError,
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
    # Only where warnings are errors; what is malformed today is unreadable to the library's next release.
    CryptographyDeprecationWarning,
)
"""Everything that looking at a malformed certificate is known to raise; found by changing bytes at random."""


def is_valid_at(certificate: x509.Certificate, now: datetime) -> bool:
    """Whether ``now`` lies in the certificate's validity."""
    return certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc


def find_issuer(
    certificate: x509.Certificate, authorities: Iterable[x509.Certificate], now: datetime
) -> x509.Certificate | None:
    """The authority that signed ``certificate`` and may do so at ``now``, if there is one."""
    for authority in authorities:
        if _is_authority(authority) and is_valid_at(authority, now) and _signed(certificate, authority):
            return authority
    return None


def _is_authority(certificate: x509.Certificate) -> bool:
    try:
        extensions = certificate.extensions
        constraints = extensions.get_extension_for_class(x509.BasicConstraints).value
        usage = extensions.get_extension_for_class(x509.KeyUsage).value
    except (*UNREADABLE, x509.ExtensionNotFound):
        return False
    return constraints.ca and usage.key_cert_sign


def _signed(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(authority)
    except (*UNREADABLE, TypeError, InvalidSignature):
        return False
    return True
