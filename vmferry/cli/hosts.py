"""Several source services at once, for commands that look at more than one host.

Promise: a host that does not answer delays nobody and hides nobody: the others are shown, and it is said of this one
what went wrong. Each is asked once; whoever wants to know again asks again.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Concatenate, Final, Generic, TypeVar

import typer

from vmferry.cli.connection import Source, TlsOption, as_command, call_error, option
from vmferry.cli.output import say
from vmferry.client.connection import Tries
from vmferry.client.places import check_address, host_identity
from vmferry.errors import (
    InvalidArgumentError,
    MigrationNotFoundError,
    PeerUnreachableError,
    VmferryError,
)
from vmferry.v1.migration_pb2 import GetMigrationRequest, Migration

Answer = TypeVar("Answer")
ANSWER_S: Final = 5.0
"""How long a host has to answer before the others are shown without it."""
_ONCE: Final = Tries(attempts=1)


@dataclass(frozen=True)
class Told(Generic[Answer]):
    """What a host answered, or why it did not."""

    host: str
    """Its identity."""
    address: str
    answer: Answer | None = None
    error: VmferryError | None = None

    @property
    def name(self) -> str:
        """The host's short name."""
        return self.host.rpartition("/")[2]

    def complaint(self) -> dict[str, str]:
        """For a document: who did not answer, and why."""
        assert self.error is not None
        return {
            "host": self.host,
            "address": self.address,
            "reason": self.error.reason,
            "message": self.error.message,
        }


@dataclass(frozen=True)
class Hosts:
    """Open connections to the source services of several hosts."""

    sources: Sequence[Source]

    @property
    def several(self) -> bool:
        """Whether it is more than one, so that it has to be said which is meant."""
        return len(self.sources) > 1

    def named(self, host: str) -> dict[str, str]:
        """For a document: the host that something is of, where that has to be said."""
        return {"host": host} if self.several else {}

    async def ask(
        self, question: Callable[[Source], Awaitable[Answer]], *, limit_s: float = 0.0
    ) -> list[Told[Answer]]:
        """Ask all at once, and wait no longer than the limit for any of them.

        Raises:
            VmferryError: there is only one, and it did not answer.
        """
        if not self.several:
            (only,) = self.sources
            return [Told(only.host.uri, only.address, await question(only))]
        return await asyncio.gather(
            *(_told(source, question, limit_s or ANSWER_S) for source in self.sources)
        )


async def _told(
    source: Source, question: Callable[[Source], Awaitable[Answer]], limit_s: float
) -> Told[Answer]:
    try:
        async with asyncio.timeout(limit_s):
            return Told(source.host.uri, source.address, await question(source))
    except TimeoutError:
        error: VmferryError = PeerUnreachableError(f"no answer within {limit_s:g} s")
    except VmferryError as met:
        error = met
    return Told(source.host.uri, source.address, error=error)


async def find_migration(hosts: Hosts, migration_id: str) -> tuple[Source, Migration]:
    """The migration, and the source that knows it.

    Raises:
        VmferryError: of the host that did not answer, as it might know it, or else that nobody does.
    """
    request = GetMigrationRequest(id=migration_id)
    told = await hosts.ask(lambda source: source.call(source.stub.GetMigration, request))
    for source, one in zip(hosts.sources, told, strict=True):
        if one.answer is not None:
            return source, one.answer.migration
    errors = [one.error for one in told if one.error is not None]
    raise next((error for error in errors if not isinstance(error, MigrationNotFoundError)), errors[0])


def unanswered(hosts: Hosts, told: Sequence[Told[Any]]) -> dict[str, list[dict[str, str]]]:
    """For a document of several hosts: those that did not answer."""
    silent = [one.complaint() for one in told if one.error is not None]
    return {"unanswered": silent} if hosts.several else {}


def say_silent(told: Sequence[Told[Any]]) -> None:
    """Tell a person which hosts did not answer."""
    for one in told:
        if one.error is not None:
            say(f"host {one.name} at {one.address}: {one.error.reason}: {one.error.message}")


def finish(told: Sequence[Told[Any]]) -> None:
    """End a command that has shown what there was, with the exit code of the first host that did not answer."""
    for one in told:
        if one.error is not None:
            raise typer.Exit(one.error.exit_code)


@contextlib.asynccontextmanager
async def open_hosts(places: Sequence[tuple[str, str]], tls_dir: Path) -> AsyncIterator[Hosts]:
    """Connect to source services, each given as its host's identity and ``HOST:PORT``."""
    # A single host is worth a second try; of several, one that does not answer holds the others up.
    tries = _ONCE if len(places) > 1 else None
    async with contextlib.AsyncExitStack() as stack:
        opened = [
            await stack.enter_async_context(
                Source.open(address, host, tls_dir, explain=call_error, tries=tries)
            )
            for host, address in places
        ]
        yield Hosts(opened)


def read_places(source: str, source_host: str, hosts: Sequence[str]) -> list[tuple[str, str]]:
    """The hosts that were named, each once.

    Raises:
        InvalidArgumentError: none was, or one in the wrong form.
    """
    places: dict[str, str] = {}
    if source or source_host:
        checked = check_address(source, field="--source")
        places[host_identity(source_host, field="--source-host").uri] = checked
    for text in hosts:
        uri, _, address = text.rpartition("=")
        checked = check_address(address, field="--host")
        places[host_identity(uri, field="--host").uri] = checked
    if not places:
        raise InvalidArgumentError(
            "no host is named",
            field="--host",
            remedy="Give --host URI=HOST:PORT for each host, or --source and --source-host for one.",
        )
    return list(places.items())


def calls_hosts(function: Callable[Concatenate[Hosts, ...], Awaitable[None]]) -> Callable[..., None]:
    """Turn a coroutine that looks at several hosts into a command with the options that say which."""

    @functools.wraps(function)
    def command(*, source: str, source_host: str, hosts: list[str] | None, tls: Path, **options: Any) -> None:
        async def run() -> None:
            async with open_hosts(read_places(source, source_host, hosts or ()), tls) as opened:
                await function(opened, **options)

        asyncio.run(run())

    return as_command(command, inspect.signature(function, eval_str=True), _OPTIONS)


_OPTIONS: Final = (
    option(
        "source",
        Annotated[
            str,
            typer.Option("--source", envvar="VMFERRY_SOURCE", metavar="HOST:PORT", help="A source service."),
        ],
        default="",
    ),
    option(
        "source_host",
        Annotated[
            str,
            typer.Option(
                "--source-host", envvar="VMFERRY_SOURCE_HOST", metavar="URI", help="Who must answer there."
            ),
        ],
        default="",
    ),
    option(
        "hosts",
        Annotated[
            list[str] | None,
            typer.Option(
                "--host",
                envvar="VMFERRY_HOSTS",
                metavar="URI=HOST:PORT",
                help="A host and where its source service listens; as often as there are hosts.",
            ),
        ],
        default=None,
    ),
    option("tls", TlsOption),
)
