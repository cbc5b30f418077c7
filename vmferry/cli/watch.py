"""``vmferry watch``, and the following of a migration that other commands share.

Promise: what is returned is the last state the source reported, never a guess; a lost connection is taken up
again, and changes nothing about the migration.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Annotated, Final

import grpc.aio
import typer

from vmferry.cli.connection import Source, calls_source
from vmferry.cli.output import JsonOption, as_document, milliseconds, print_document, say, size
from vmferry.cli.progress import ProgressView, outcome_name, progress_view
from vmferry.errors import ExitCode, PeerUnreachableError, ServiceStoppingError, catalogue
from vmferry.rpc.status import from_rpc_error
from vmferry.v1 import migration_pb2
from vmferry.v1.migration_pb2 import Migration, WatchMigrationRequest

MigrationArgument = Annotated[str, typer.Argument(metavar="MIGRATION", help="Id of the migration.")]


@dataclass(frozen=True)
class Patience:
    """How long a follower waits for what may never come."""

    reconnect_s: float = 60.0
    """For a source that went silent to answer again."""
    unknown_s: float = 15.0
    """For an outcome that is unknown to become known."""
    end_s: float = 1.0
    """For the source to close the stream of a migration that has ended; cutting it off would look like a failure."""
    retry_s: float = 0.5
    """Between two attempts to reach the source."""


PATIENCE: Final = Patience()


@calls_source
async def watch(source: Source, *, migration_id: MigrationArgument, json: JsonOption = False) -> None:
    """Show a migration's progress until it ends; the exit code tells how."""
    with progress_view() as view:
        migration = await follow(source, migration_id, view)
    finish(migration, json=json)


async def follow(
    source: Source,
    migration_id: str,
    view: ProgressView,
    *,
    last: Migration | None = None,
) -> Migration:
    """Show a migration until it has ended, or its outcome has stayed unknown for a while.

    Args:
        source: where it leaves.
        migration_id: which.
        view: where it is shown.
        last: what is known already; a source that was never reached is not waited for.

    Raises:
        PeerUnreachableError: the source does not answer (any more).
        MigrationNotFoundError: it knows no such migration.
    """
    now = asyncio.get_running_loop().time
    try:
        async with asyncio.timeout(None) as limit:
            while True:
                try:
                    async for response in source.stub.WatchMigration(WatchMigrationRequest(id=migration_id)):
                        last = response.migration
                        view.show(last)
                        patience_s = _patience_s(last)
                        if patience_s is None or limit.when() is None:
                            limit.reschedule(None if patience_s is None else now() + patience_s)
                except grpc.aio.AioRpcError as error:
                    _require_retry(error, last)
                if last is not None and _ended(last):
                    return last
                if limit.when() is None:
                    limit.reschedule(now() + PATIENCE.reconnect_s)
                    view.note("the connection to the source is lost; trying again")
                await asyncio.sleep(PATIENCE.retry_s)
    except TimeoutError:
        assert last is not None
        if _patience_s(last) is not None:
            return last
        raise PeerUnreachableError(
            f"the source did not answer for {PATIENCE.reconnect_s:g} s; the migration may go on without this command",
            remedy=f"When the source answers again: vmferry watch {migration_id}",
        ) from None


def _ended(migration: Migration) -> bool:
    return migration.phase == migration_pb2.MIGRATION_PHASE_ENDED


def _patience_s(migration: Migration) -> float | None:
    """How long to wait for more after this state, which may be the last one; None for as long as it takes."""
    if _ended(migration):
        return PATIENCE.end_s
    return PATIENCE.unknown_s if migration.outcome == migration_pb2.MIGRATION_OUTCOME_UNKNOWN else None


def finish(migration: Migration, *, json: bool) -> None:
    """Print how a migration came out, and end the command with the exit code that says so."""
    if json:
        print_document(as_document(migration))
    else:
        _print_summary(migration)
    raise typer.Exit(exit_code(migration))


def exit_code(migration: Migration) -> ExitCode:
    """The exit code of a migration that ended, or whose outcome is unknown."""
    match migration.outcome:
        case migration_pb2.MIGRATION_OUTCOME_COMPLETED:
            return ExitCode.OK
        case migration_pb2.MIGRATION_OUTCOME_CANCELLED:
            return ExitCode.CANCELLED
        case migration_pb2.MIGRATION_OUTCOME_UNKNOWN:
            return ExitCode.UNKNOWN
    known = catalogue().get(migration.reason.reason)
    return known.exit_code if known else ExitCode.FAILED


def _print_summary(migration: Migration) -> None:
    print(f"{migration.machine}: {outcome_name(migration)}; owner: {migration.owner or 'not known yet'}")
    if migration.HasField("downtime"):
        downtime, total = milliseconds(migration.downtime), milliseconds(migration.total)
        print(
            f"  downtime {downtime:.1f} ms, total {total / 1e3:.2f} s, {migration.progress.round} rounds, ",
            end="",
        )
        print(f"{size(migration.progress.wire_bytes)} on the wire")
        if migration.progress.reconnects:
            again = size(migration.progress.repeated_bytes)
            print(f"  {migration.progress.reconnects} lanes reopened, {again} sent again")
    if migration.HasField("verification"):
        found = migration.verification
        print(f"  compared {size(found.compared_bytes)} byte for byte: {found.different_pages} pages differ")
    if migration.trace_id:
        print(f"  trace: vmferry trace {migration.trace_id}")
    if migration.reason.reason:
        say(f"  {migration.reason.reason}: {migration.reason.message}")
        say(f"  remedy: {migration.reason.remedy}")
    if migration.outcome == migration_pb2.MIGRATION_OUTCOME_UNKNOWN:
        say(f"  both hosts: vmferry recover {migration.machine}")


def _require_retry(error: grpc.aio.AioRpcError, last: Migration | None) -> None:
    found = from_rpc_error(error)
    if last is None or not isinstance(found, (PeerUnreachableError, ServiceStoppingError)):
        raise found from error
