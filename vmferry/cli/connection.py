"""The connection of a command to the source service it talks to.

Promise: it is mutually authenticated and goes to the host that was named or to none; whatever goes wrong on it is an
error of vmferry's catalogue.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Concatenate, Final

import grpc.aio
import typer

from vmferry.client.connection import CALL_TIMEOUT_S
from vmferry.client.places import check_address, host_identity
from vmferry.client.source import SourceClient
from vmferry.errors import PeerIdentityError, VmferryError
from vmferry.rpc.status import from_rpc_error
from vmferry.security.identity import Identity
from vmferry.security.tls import is_identity_mismatch

__all__ = [
    "CALL_TIMEOUT_S",
    "Source",
    "TlsOption",
    "as_command",
    "call_error",
    "calls_source",
    "check_address",
    "host_identity",
    "option",
]

Source = SourceClient
"""An open connection to a source service."""


@contextlib.asynccontextmanager
async def open_source(address: str, host: str, tls_dir: Path) -> AsyncIterator[Source]:
    """Connect to the source service ``host`` at ``address``; closed at the end.

    Raises:
        InvalidArgumentError: address or host have the wrong form.
        ConfigError: the certificates are missing or unusable.
    """
    check_address(address, field="--source")
    host_identity(host, field="--source-host")
    async with SourceClient.open(address, host, tls_dir, explain=call_error) as opened:
        yield opened


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

    return as_command(command, inspect.signature(function, eval_str=True), _OPTIONS)


def as_command(
    command: Callable[..., None], signature: inspect.Signature, options: Sequence[inspect.Parameter]
) -> Callable[..., None]:
    """Give a command a function's own parameters, but for the first, and the options that say where it goes."""
    own = list(signature.parameters.values())[1:]
    keyword = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
    parameters = [*keyword, *options]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined] # read by typer
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def call_error(error: grpc.aio.AioRpcError, host: Identity, *, side: str = "source") -> VmferryError:
    """What a failed call to the service of this side means to its caller."""
    if is_identity_mismatch(error):
        return PeerIdentityError(
            f"the service that answers is not {host}",
            field=f"--{side}-host",
            remedy=f"Check --{side} and --{side}-host against the service's certificate (vmferry certs show).",
        )
    return from_rpc_error(error)


def option(name: str, annotation: Any, *, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    """An option of a command, as typer reads it; required if it has no default."""
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


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
    option(
        "source",
        Annotated[
            str,
            typer.Option(
                "--source", envvar="VMFERRY_SOURCE", metavar="HOST:PORT", help="The source service."
            ),
        ],
    ),
    option(
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
    option("tls", TlsOption),
)
