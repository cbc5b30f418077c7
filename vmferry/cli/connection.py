"""The connection of a command to the source service it talks to.

Promise: it is mutually authenticated and goes to the host that was named or to none; whatever goes wrong on it is an
error of vmferry's catalogue.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Concatenate, Final, TypeVar

import grpc.aio
import typer

from vmferry.errors import InvalidArgumentError, PeerIdentityError, VmferryError
from vmferry.rpc.status import from_rpc_error
from vmferry.rpc.tracing import ClientTracingInterceptors
from vmferry.security.identity import Identity, Kind
from vmferry.security.tls import TlsFiles, is_identity_mismatch, open_channel
from vmferry.v1.migration_pb2_grpc import SourceServiceStub

if TYPE_CHECKING:  # the stub's type exists for checkers only
    from vmferry.v1.migration_pb2_grpc import SourceServiceAsyncStub

CALL_TIMEOUT_S: Final = 30.0
"""Limit of one call; the source may have to ask another host before it can answer."""

_ADDRESS = re.compile(r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):([0-9]{1,5})")
_MAX_PORT: Final = 65_535

Request = TypeVar("Request")
Response = TypeVar("Response")


@dataclass(frozen=True)
class Source:
    """An open connection to a source service."""

    stub: SourceServiceAsyncStub
    host: Identity
    """Who answers there; TLS has made sure."""
    tls_dir: Path
    """The caller's own certificates and, if it may sign tickets, its ticket key."""

    async def call(
        self, method: grpc.aio.UnaryUnaryMultiCallable[Request, Response], request: Request
    ) -> Response:
        """Make one call; what it meets is raised as an error of the catalogue."""
        try:
            return await method(request, timeout=CALL_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise call_error(error, self.host) from error


@contextlib.asynccontextmanager
async def open_source(address: str, host: str, tls_dir: Path) -> AsyncIterator[Source]:
    """Connect to the source service ``host`` at ``address``; closed at the end.

    Raises:
        InvalidArgumentError: address or host have the wrong form.
        ConfigError: the certificates are missing or unusable.
    """
    check_address(address, field="--source")
    expected = host_identity(host, field="--source-host")
    material = TlsFiles(tls_dir).load()
    async with open_channel(address, expected, material, interceptors=ClientTracingInterceptors()) as channel:
        yield Source(SourceServiceStub(channel), expected, tls_dir)


def calls_source(
    function: Callable[Concatenate[Source, ...], Awaitable[None]],
) -> Callable[..., None]:
    """Turn a coroutine that needs a source into a command with the options that say which."""

    @functools.wraps(function)
    def command(*, source: str, source_host: str, tls: Path, **options: Any) -> None:
        async def run() -> None:
            async with open_source(source, source_host, tls) as opened:
                await function(opened, **options)

        asyncio.run(run())

    own = list(inspect.signature(function, eval_str=True).parameters.values())[1:]
    keyword = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
    command.__signature__ = inspect.Signature([*keyword, *_OPTIONS])  # type: ignore[attr-defined] # read by typer
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in [*keyword, *_OPTIONS]}
    return command


def check_address(text: str, *, field: str) -> str:
    """Return ``text`` if it is HOST:PORT.

    Raises:
        InvalidArgumentError: it is anything else.
    """
    match = _ADDRESS.fullmatch(text)
    if match is None or not 1 <= int(match[2]) <= _MAX_PORT:
        raise InvalidArgumentError(f"{text!r} is not of the form HOST:PORT", field=field)
    return text


def host_identity(uri: str, *, field: str) -> Identity:
    """Read the identity of a host.

    Raises:
        InvalidArgumentError: it is malformed, or not a host's.
    """
    identity = Identity.parse(uri, field=field)
    if identity.kind is not Kind.VMHOST:
        raise InvalidArgumentError(
            f"{uri} is not a host: it must be spiffe://DOMAIN/vmhost/NAME", field=field
        )
    return identity


def call_error(error: grpc.aio.AioRpcError, host: Identity, *, side: str = "source") -> VmferryError:
    """What a failed call to the service of this side means to its caller."""
    if is_identity_mismatch(error):
        return PeerIdentityError(
            f"the service that answers is not {host}",
            field=f"--{side}-host",
            remedy=f"Check --{side} and --{side}-host against the service's certificate (vmferry certs show).",
        )
    return from_rpc_error(error)


def _option(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation)


TlsOption = Annotated[
    Path,
    typer.Option(
        "--tls",
        envvar="VMFERRY_TLS",
        metavar="DIR",
        help="Own certificates: ca.pem, tls.crt, tls.key; for tickets also ticket.crt, ticket.key.",
    ),
]

_OPTIONS: Final = (
    _option(
        "source",
        Annotated[
            str,
            typer.Option(
                "--source", envvar="VMFERRY_SOURCE", metavar="HOST:PORT", help="The source service."
            ),
        ],
    ),
    _option(
        "source_host",
        Annotated[
            str,
            typer.Option(
                "--source-host",
                envvar="VMFERRY_SOURCE_HOST",
                metavar="URI",
                help="Identity its certificate must carry: spiffe://DOMAIN/vmhost/NAME.",
            ),
        ],
    ),
    _option("tls", TlsOption),
)
