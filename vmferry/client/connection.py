"""A connection to one host's source service, and what is repeated on it.

Promise: it is mutually authenticated and goes to the host that was named or to none; whatever goes wrong is an error
of vmferry's catalogue; a call is repeated only by :meth:`Connection.ask`, for what may be done twice.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self, TypeVar

import grpc.aio

from vmferry.client.places import check_address, host_identity
from vmferry.client.watching import AWAY
from vmferry.errors import PeerIdentityError, TimedOutError, VmferryError
from vmferry.rpc.status import from_rpc_error
from vmferry.rpc.tracing import ClientTracingInterceptors
from vmferry.security.identity import Identity
from vmferry.security.material import TlsMaterial
from vmferry.security.renewal import CurrentMaterial
from vmferry.security.tls import TlsFiles, is_identity_mismatch, open_channel
from vmferry.v1.drain_pb2_grpc import DrainServiceStub
from vmferry.v1.migration_pb2_grpc import SourceServiceStub

if TYPE_CHECKING:  # the stubs' types exist for checkers only
    from vmferry.v1.drain_pb2_grpc import DrainServiceAsyncStub
    from vmferry.v1.migration_pb2_grpc import SourceServiceAsyncStub

CALL_TIMEOUT_S: Final = 30.0
"""Limit of one call; the source may have to ask another host before it can answer."""

Request = TypeVar("Request")
Response = TypeVar("Response")
Explain = Callable[[grpc.aio.AioRpcError, Identity], VmferryError]


@dataclass(frozen=True)
class Tries:
    """How often a call that may be repeated is made while nobody answers."""

    attempts: int = 4
    pause_s: float = 0.5


def call_error(error: grpc.aio.AioRpcError, host: Identity) -> VmferryError:
    """What a failed call to a service of this host means to its caller."""
    if is_identity_mismatch(error):
        return PeerIdentityError(
            f"the service that answers is not {host}",
            field="host",
            remedy="Compare address and host with the service's certificate (vmferry certs show).",
        )
    return from_rpc_error(error)


@dataclass
class Connection:
    """An open connection to a source service; made by :meth:`open`."""

    address: str
    host: Identity
    """Who answers there; TLS makes sure."""
    tls_dir: Path
    """The caller's own certificates and, if it may sign tickets, its ticket key."""
    tries: Tries = field(default_factory=Tries)
    explain: Explain = call_error
    """Makes an error of the catalogue of a failed call."""

    def __post_init__(self) -> None:
        self._material = CurrentMaterial(TlsFiles(self.tls_dir))
        self._channels: list[grpc.aio.Channel] = []
        self._connect()

    @classmethod
    @contextlib.asynccontextmanager
    async def open(
        cls,
        address: str,
        host: str,
        tls_dir: Path,
        *,
        explain: Explain = call_error,
        tries: Tries | None = None,
    ) -> AsyncIterator[Self]:
        """Connect to the source service of ``host`` at ``address``; closed at the end.

        Raises:
            InvalidArgumentError: address or host have the wrong form.
            ConfigError: the certificates are missing or unusable.
        """
        expected = host_identity(host, field="host")
        client = cls(check_address(address, field="address"), expected, tls_dir, tries or Tries(), explain)
        try:
            yield client
        finally:
            await client.close()

    async def close(self) -> None:
        """End all connections."""
        for channel in self._channels:
            await channel.close(None)

    @property
    def channel(self) -> grpc.aio.Channel:
        """The connection in use, for stubs of other services of the same port."""
        return self._channels[-1]

    async def call(
        self, method: grpc.aio.UnaryUnaryMultiCallable[Request, Response], request: Request
    ) -> Response:
        """Make one call, once; what it meets is raised as an error of the catalogue."""
        try:
            return await method(request, timeout=CALL_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise self.explain(error, self.host) from error

    async def ask(self, ask: Callable[[], Awaitable[Response]]) -> Response:
        """Make a call that may be repeated, again and again while nobody answers.

        Args:
            ask: makes the call; called anew each time, as the connection may be another by then.
        """
        for _ in range(self.tries.attempts - 1):
            try:
                return await ask()
            except (*AWAY, TimedOutError):
                await asyncio.sleep(self.tries.pause_s)
                self.connect_anew()
        return await ask()

    # The connection

    def _connect(self) -> None:
        self._proof: TlsMaterial = self._material.get()
        self._channels.append(
            open_channel(self.address, self.host, self._proof, interceptors=ClientTracingInterceptors())
        )
        self.stub: SourceServiceAsyncStub = SourceServiceStub(self._channels[-1])
        self.drain_stub: DrainServiceAsyncStub = DrainServiceStub(self._channels[-1])

    def connect_anew(self) -> None:
        """Prove who this is with a newer certificate, if there is one: a channel keeps its own for life."""
        if self._material.get() is not self._proof:
            self._connect()
