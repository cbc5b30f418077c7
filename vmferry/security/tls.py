"""Identities on the wire: gRPC credentials and channels, mutually authenticated, TLS 1.3, never plaintext.

Promise: a server made here asks every client for a certificate, and uses new files from the next handshake on while
connections that stand go on; a channel made here speaks to the expected identity or not at all. There is no option
to switch any of it off. Programs call ``tls13.enforce_tls13()`` before they import this module.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, Final

import grpc
import grpc.aio

from vmferry.errors import ConfigError, PeerIdentityError
from vmferry.security.identity import Identity, Kind
from vmferry.security.material import TlsFiles, TlsMaterial
from vmferry.telemetry.logs import get_logger

__all__ = [
    "CHANNEL_OPTIONS",
    "SERVER_OPTIONS",
    "TlsFiles",
    "TlsMaterial",
    "is_identity_mismatch",
    "open_channel",
    "open_lane_channel",
    "server_credentials",
]

MAX_MESSAGE_BYTES: Final = 4 * 1024 * 1024
MAX_METADATA_BYTES: Final = 16 * 1024
KEEPALIVE_TIME_MS: Final = 10_000
KEEPALIVE_TIMEOUT_MS: Final = 5_000
MIN_PING_INTERVAL_MS: Final = 5_000
"""A server permits pings twice as often as clients send them: a client sent away for pinging is a lost migration."""
HANDSHAKE_TIMEOUT_MS: Final = 10_000
CONNECT_TIMEOUT_MS: Final = 5_000
MAX_CONCURRENT_STREAMS: Final = 16
MAX_CONNECTIONS: Final = 256
MAX_CONNECTION_AGE_MS: Final = 3_600_000

_COMMON_OPTIONS: Final[tuple[tuple[str, Any], ...]] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_metadata_size", MAX_METADATA_BYTES),
    # Between the two limits gRPC refuses at random; equal limits make it one.
    ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
    ("grpc.keepalive_time_ms", KEEPALIVE_TIME_MS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
)

SERVER_OPTIONS: Final[tuple[tuple[str, Any], ...]] = (
    *_COMMON_OPTIONS,
    ("grpc.http2.min_ping_interval_without_data_ms", MIN_PING_INTERVAL_MS),
    ("grpc.max_concurrent_streams", MAX_CONCURRENT_STREAMS),
    ("grpc.max_allowed_incoming_connections", MAX_CONNECTIONS),
    ("grpc.server_handshake_timeout_ms", HANDSHAKE_TIMEOUT_MS),
    # A certificate is looked at once per connection. Aged connections get no new calls; running ones end in peace.
    ("grpc.max_connection_age_ms", MAX_CONNECTION_AGE_MS),
    # Two services on one port must collide, not share the callers at random.
    ("grpc.so_reuseport", 0),
)
"""What every data port is built with."""

CHANNEL_OPTIONS: Final[tuple[tuple[str, Any], ...]] = (
    *_COMMON_OPTIONS,
    # Reconnecting is quick and a black hole is noticed: the defaults are 20 s to connect and 2 min between attempts.
    ("grpc.min_reconnect_backoff_ms", CONNECT_TIMEOUT_MS),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)
"""What every channel is built with, unless its opener says otherwise."""

_LOG: Final = get_logger(__name__)


def server_credentials(files: TlsFiles) -> grpc.ServerCredentials:
    """Credentials of a data port: client certificates required, files watched.

    Raises:
        ConfigError: the files are unusable now, or are not a host's. Later changes that are unusable are only logged.
    """
    reloader = _Reloader(files)
    return grpc.dynamic_ssl_server_credentials(
        reloader.initial, reloader.fetch, require_client_authentication=True
    )


def open_channel(
    address: str,
    expected: Identity,
    material: TlsMaterial,
    *,
    options: Sequence[tuple[str, Any]] = (),
    interceptors: Sequence[grpc.aio.ClientInterceptor] = (),
) -> grpc.aio.Channel:
    """A channel with its own connection, to the host ``expected`` and no other.

    It keeps ``material`` for life; after a rotation, open a new channel and let this one finish. ``options`` may tune
    the transport, and cannot change whom it trusts.

    Raises:
        PeerIdentityError: ``expected`` is no host of the own trust domain, so nobody there can be it.
    """
    credentials, chosen = _connecting(expected, material, options)
    return grpc.aio.secure_channel(address, credentials, options=chosen, interceptors=list(interceptors))


def open_lane_channel(address: str, expected: Identity, material: TlsMaterial) -> grpc.Channel:
    """The same for whoever calls it from threads, and not from an event loop.

    Raises:
        PeerIdentityError: as above.
    """
    credentials, chosen = _connecting(expected, material)
    return grpc.secure_channel(address, credentials, options=chosen)


def _connecting(
    expected: Identity, material: TlsMaterial, options: Sequence[tuple[str, Any]] = ()
) -> tuple[grpc.ChannelCredentials, list[tuple[str, Any]]]:
    """What a channel is made with."""
    if expected.kind is not Kind.VMHOST or expected.trust_domain != material.identity.trust_domain:
        raise PeerIdentityError(
            f"{expected} is not a host of the trust domain {material.identity.trust_domain}",
            field="destination",
        )
    credentials = grpc.ssl_channel_credentials(material.ca_pem, material.key_pem, material.cert_pem)
    # One value per name: of two, gRPC would take the first.
    chosen = {
        **dict(CHANNEL_OPTIONS),
        **dict(options),
        # From here on it is about trust and repetition, and stands whatever the options say.
        "grpc.ssl_target_name_override": expected.server_name,
        "grpc.use_local_subchannel_pool": 1,
        # A call is repeated by whoever knows that this is harmless, never by the transport.
        "grpc.enable_retries": 0,
        "grpc.enable_http_proxy": 0,
        # Whoever answers for DNS must not configure the channel.
        "grpc.service_config_disable_resolution": 1,
    }
    return credentials, list(chosen.items())


def is_identity_mismatch(error: grpc.RpcError) -> bool:
    """Whether a call failed because a trusted host answered that is not the expected one."""
    if not isinstance(error, grpc.aio.AioRpcError):
        return False
    return error.code() is grpc.StatusCode.UNAVAILABLE and "Hostname Verification Check failed" in (
        error.details() or ""
    )


class _Reloader:
    """Hands a server its certificate, and a new one when the files have changed and are whole."""

    def __init__(self, files: TlsFiles) -> None:
        self._files = files
        self._lock = threading.Lock()
        self._seen = files.fingerprint()
        self.initial = _configuration(files)

    def fetch(self) -> Any:
        """The new configuration, or None for "no change"; gRPC calls it before each handshake, on its own threads."""
        with self._lock:
            # The look comes before the load: a change in between is seen again at the next handshake.
            fingerprint = self._files.fingerprint()
            if fingerprint == self._seen:
                return None
            self._seen = fingerprint
            try:
                configuration = _configuration(self._files)
            except ConfigError as error:
                _LOG.error("certificate files unusable, the old ones stay in use", error=str(error))
                return None
            _LOG.info("certificate files reloaded", directory=str(self._files.directory))
            return configuration


def _configuration(files: TlsFiles) -> grpc.ServerCertificateConfiguration:
    material = files.load()
    if material.identity.kind is not Kind.VMHOST:
        raise ConfigError(
            f"{files.cert} is of {material.identity}; a service needs a host's", field=files.cert.name
        )
    return grpc.ssl_server_certificate_configuration(
        [(material.key_pem, material.cert_pem)], root_certificates=material.ca_pem
    )
