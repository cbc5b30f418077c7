"""Who may call what: one table, and everything that is not in it is refused.

Promise: :func:`authorize` returns only if the caller proved an identity of this host's trust domain over TLS 1.3 and
the table lists its kind for the method. Identities come from the certificate of the connection alone, never from
metadata or messages. Nothing here knows gRPC; ``vmferry.rpc.interceptors`` asks before any handler runs. What the
table cannot say (that a caller is the very source of *this* attempt) is checked by the method against the ticket.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Final

from vmferry.errors import PermissionDeniedError, UnauthenticatedError
from vmferry.security.identity import (
    Identity,
    Kind,
    identity_from_certificate,
    load_certificate,
    public_key_sha256,
)

REQUIRED_TLS: Final = "TLSv1.3"
MAX_SHOWN_CHARS: Final = 200
"""How much of a method name that somebody made up comes back in an error."""

_KEPT: Final = 64
"""Certificates of callers that are not taken apart again for each call."""
_OPERATORS: Final = frozenset({Kind.CONTROLLER, Kind.ADMIN})
_ADMINS: Final = frozenset({Kind.ADMIN})
_HOSTS: Final = frozenset({Kind.VMHOST})
_EVERYBODY: Final = frozenset(Kind)

TABLE: Final[Mapping[str, frozenset[Kind]]] = MappingProxyType(
    {
        "/vmferry.v1.SourceService/PlanMigration": _OPERATORS,
        "/vmferry.v1.SourceService/StartMigration": _OPERATORS,
        "/vmferry.v1.SourceService/GetMigration": _OPERATORS,
        "/vmferry.v1.SourceService/ListMigrations": _OPERATORS,
        "/vmferry.v1.SourceService/WatchMigration": _OPERATORS,
        "/vmferry.v1.SourceService/CancelMigration": _OPERATORS,
        "/vmferry.v1.SourceService/UpdateMigration": _OPERATORS,
        "/vmferry.v1.SourceService/SwitchNow": _OPERATORS,
        "/vmferry.v1.SourceService/ListMachines": _OPERATORS,
        "/vmferry.v1.SourceService/GetMachine": _OPERATORS,
        "/vmferry.v1.SourceService/ForceReclaim": _ADMINS,
        "/vmferry.v1.UpdateService/CheckUpdate": _OPERATORS,
        "/vmferry.v1.UpdateService/UpdateInPlace": _OPERATORS,
        "/vmferry.v1.UpdateService/GetUpdate": _OPERATORS,
        "/vmferry.v1.UpdateService/WatchUpdate": _OPERATORS,
        "/vmferry.v1.DestinationService/Negotiate": _HOSTS,
        "/vmferry.v1.DestinationService/Measure": _HOSTS,
        "/vmferry.v1.DestinationService/Begin": _HOSTS,
        "/vmferry.v1.DestinationService/Transfer": _HOSTS,
        "/vmferry.v1.DestinationService/Seal": _HOSTS,
        "/vmferry.v1.DestinationService/Go": _HOSTS,
        "/vmferry.v1.DestinationService/GetAttempt": _HOSTS | _OPERATORS,
        "/vmferry.v1.DestinationService/Abort": _HOSTS,
        "/vmferry.v1.ClockService/GetClock": _HOSTS,
        "/vmferry.v1.EventsService/ListBoards": _HOSTS,
        "/vmferry.v1.EventsService/ApproveEvents": _HOSTS,
        "/vmferry.v1.RecoveryService/InspectMachine": _OPERATORS,
        "/vmferry.v1.RecoveryService/SettleMachine": _OPERATORS,
        "/vmferry.v1.DestinationService/ForceAccept": _ADMINS,
        "/vmferry.v1.DrainService/DrainHost": _OPERATORS,
        "/vmferry.v1.DrainService/UndrainHost": _OPERATORS,
        "/vmferry.v1.DrainService/GetDrain": _OPERATORS,
        "/vmferry.v1.DrainService/WatchDrain": _OPERATORS,
        "/grpc.health.v1.Health/Check": _EVERYBODY,
        "/grpc.health.v1.Health/List": _EVERYBODY,
        "/grpc.health.v1.Health/Watch": _EVERYBODY,
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo": _EVERYBODY,
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": _EVERYBODY,
    }
)
"""Full method name to the kinds of identity that may call it; docs/security.md shows the same table."""


def authorize(method: str, *, caller: Identity | None, own: Identity, tls_version: str) -> None:
    """Return if ``caller`` may call ``method`` on the host ``own``; refuse otherwise.

    Raises:
        UnauthenticatedError: there is no caller of this trust domain, or the connection is not TLS 1.3.
        PermissionDeniedError: the method is not in the table, or not for this kind of caller.
    """
    if tls_version != REQUIRED_TLS:
        raise UnauthenticatedError(
            f"the connection uses {tls_version or 'no TLS'}; {REQUIRED_TLS} is required",
            remedy="Use a client that speaks TLS 1.3.",
        )
    if caller is None:
        raise UnauthenticatedError("the caller has shown no identity")
    if caller.trust_domain != own.trust_domain:
        raise UnauthenticatedError(f"{caller} is not of this host's trust domain {own.trust_domain}")
    kinds = TABLE.get(method)
    if kinds is None:
        shown = method[:MAX_SHOWN_CHARS]
        raise PermissionDeniedError(f"nobody may call {shown!r}", method=shown)
    if caller.kind not in kinds:
        raise PermissionDeniedError(f"{caller} may not call {method}", method=method, caller=caller)


def caller_from_auth_context(auth: Mapping[str, Iterable[bytes]]) -> Identity:
    """The identity the TLS layer found for a connection (``context.auth_context()``).

    Raises:
        UnauthenticatedError: there is none, or the certificate and what gRPC read from it do not agree.
    """
    identity = _identity(_one(auth, "x509_pem_cert"))
    for name in ("peer_spiffe_id", "peer_uri"):
        if _one(auth, name) != identity.uri.encode():
            raise UnauthenticatedError(
                f"the connection's {name} is not the certificate's identity {identity}"
            )
    return identity


def caller_key_sha256(auth: Mapping[str, Iterable[bytes]]) -> bytes:
    """SHA-256 of the public key that the caller's certificate holds."""
    return _key_sha256(_one(auth, "x509_pem_cert"))


def tls_version_from_auth_context(auth: Mapping[str, Iterable[bytes]]) -> str:
    """The version of TLS of a connection, such as ``TLSv1.3``; empty if it has none."""
    versions = list(auth.get("ssl_tls_version", ()))
    return versions[0].decode("ascii", "replace") if len(versions) == 1 else ""


# What a certificate says never changes, and a guest's pause waits for calls. That it is trusted and in its time is
# for the TLS layer to say, which did so when the connection was made.
@lru_cache(maxsize=_KEPT)
def _identity(certificate: bytes) -> Identity:
    return identity_from_certificate(certificate)


@lru_cache(maxsize=_KEPT)
def _key_sha256(certificate: bytes) -> bytes:
    return public_key_sha256(load_certificate(certificate))


def _one(auth: Mapping[str, Iterable[bytes]], name: str) -> bytes:
    values = list(auth.get(name, ()))
    if len(values) != 1:
        raise UnauthenticatedError(f"the connection must have exactly one {name}, it has {len(values)}")
    return values[0]
