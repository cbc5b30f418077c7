"""The two listeners of a service.

Promise: the data port speaks mutual TLS and nothing else, and every call on it passes tracing, the translation of
errors, and authorisation, in this order. Health, reflection and channelz for the host's own tools are on a second
listener, which only this host can reach: a unix socket that only its owner may open, or a loopback port. A port
that somebody else has is refused at the start, never shared.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import grpc
import grpc.aio
from grpc_channelz.v1 import channelz, channelz_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from vmferry.errors import ConfigError
from vmferry.rpc.interceptors import AuthorizationInterceptor, ErrorInterceptor
from vmferry.rpc.local import UNIX, loopback, private_files, socket_path
from vmferry.rpc.tracing import ServerTracingInterceptor
from vmferry.security.identity import Identity
from vmferry.security.tls import SERVER_OPTIONS

Services = Callable[[grpc.aio.Server], Sequence[str]]
"""Adds a service's servicers to a server and returns their full names, such as ``vmferry.v1.SourceService``."""

_CHANNELZ: Final = channelz_pb2.DESCRIPTOR.services_by_name["Channelz"].full_name
_ADMIN_OPTIONS: Final = (("grpc.so_reuseport", 0),)


@dataclass(frozen=True)
class RunningServers:
    """The listeners of a running service."""

    port: int
    """Port number of the data port, also where the configuration asked for any free one."""
    _health: Any
    _data: grpc.aio.Server
    _admin: grpc.aio.Server
    _admin_socket: Path | None

    async def say_not_serving(self) -> None:
        """Say NOT_SERVING to whoever asks for health; calls still come."""
        await self._health.enter_graceful_shutdown()

    async def stop(self, grace_s: float) -> None:
        """Say NOT_SERVING, refuse new calls, and give running ones ``grace_s`` to end before they are cancelled."""
        await self._health.enter_graceful_shutdown()
        await self._data.stop(grace_s)
        await self._admin.stop(None)
        if self._admin_socket is not None:
            self._admin_socket.unlink(missing_ok=True)


async def start_server(
    *,
    listen: str,
    credentials: grpc.ServerCredentials,
    own: Identity,
    services: Services,
    admin_target: str,
    role: str = "",
) -> RunningServers:
    """Start both listeners of a service.

    Args:
        listen: ``address:port`` of the data port; port 0 takes any free one.
        credentials: of the data port; they must ask every client for its certificate.
        own: the identity of this host.
        services: adds the service's methods.
        admin_target: the admin listener: ``unix:/path``, or ``address:port`` with a loopback address.
        role: ``source`` or ``dest``, to name the setting at fault in errors.

    Raises:
        ConfigError: a listener's address is taken, is not of this host, or is not allowed.
    """
    prefix = f"{role}_" if role else ""
    interceptors = [ServerTracingInterceptor(), ErrorInterceptor(), AuthorizationInterceptor(own)]
    data = grpc.aio.server(interceptors=interceptors, options=SERVER_OPTIONS)
    admin = grpc.aio.server(options=_ADMIN_OPTIONS)
    names = services(data)
    servicer = _Health()
    for name in names:
        await servicer.set(name, health_pb2.HealthCheckResponse.SERVING)
    _add_common(data, servicer, names)
    channelz.add_channelz_servicer(admin)  # type: ignore[arg-type] # its stubs know only the other server
    _add_common(admin, servicer, [_CHANNELZ])
    try:
        with _naming(f"{prefix}listen", listen):
            port = data.add_secure_port(listen, credentials)
        socket_path = _bind_admin(admin, admin_target, f"{prefix}admin_listen")
        await admin.start()
        await data.start()
    except BaseException:
        await data.stop(None)
        await admin.stop(None)
        raise
    return RunningServers(port, servicer, data, admin, socket_path)


def _add_common(server: grpc.aio.Server, servicer: Any, names: Sequence[str]) -> None:
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    reflection.enable_server_reflection([*names, health.SERVICE_NAME, reflection.SERVICE_NAME], server)


def _bind_admin(server: grpc.aio.Server, target: str, setting: str) -> Path | None:
    """Add the admin listener's port; its socket, if it is one."""
    if not target.startswith(UNIX):
        address = loopback(target, setting)
        with _naming(setting, target):
            server.add_insecure_port(address)
        return None
    path = socket_path(target, setting)
    with private_files(), _naming(setting, target):
        server.add_insecure_port(f"{UNIX}{path}")
    return path


class _Health(health.aio.HealthServicer):  # type: ignore[name-defined,misc] # missing in its stubs
    """The library's, which has no method for the list that its contract has."""

    async def List(self, _request: object, _context: object) -> health_pb2.HealthListResponse:  # noqa: N802 - named there
        """How every service is."""
        asked = {name: health_pb2.HealthCheckRequest(service=name) for name in self._server_status}
        statuses = {name: await self.Check(request, None) for name, request in asked.items()}
        return health_pb2.HealthListResponse(statuses=statuses)


@contextlib.contextmanager
def _naming(setting: str, address: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ConfigError(
            f"cannot listen on {address}: another process has it, or it is no address of this host",
            field=setting,
        ) from error
