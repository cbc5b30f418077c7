"""``vmferry watch``, and the following of a migration that other commands share.

Promise: what is returned is the last state the source reported, never a guess; a lost connection is taken up
again, and changes nothing about the migration.
"""

from __future__ import annotations

import contextlib
from typing import Annotated, Final

import typer

from vmferry.cli.clocks import clock_words
from vmferry.cli.connection import Source
from vmferry.cli.hosts import Hosts, calls_hosts, find_migration
from vmferry.cli.output import JsonOption, as_document, milliseconds, print_document, say, size
from vmferry.cli.progress import ProgressView, outcome_name, progress_view
from vmferry.client.watching import Patience
from vmferry.errors import ExitCode, catalogue
from vmferry.v1 import migration_pb2
from vmferry.v1.migration_pb2 import Migration

MigrationArgument = Annotated[str, typer.Argument(metavar="MIGRATION", help="Id of the migration.")]


PATIENCE: Final = Patience()


@calls_hosts
async def watch(hosts: Hosts, *, migration_id: MigrationArgument, json: JsonOption = False) -> None:
    """Show a migration's progress until it ends; the exit code tells how."""
    source = hosts.sources[0]
    if hosts.several:
        source, _ = await find_migration(hosts, migration_id)
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
    states = source.watch(
        migration_id,
        last=last,
        patience=PATIENCE,
        on_lost=lambda: view.note("the connection to the source is lost; trying again"),
    )
    async with contextlib.aclosing(states):
        async for seen in states:
            last = seen
            view.show(last)
    assert last is not None
    return last


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
        if words := clock_words(migration.clock):
            print(f"  {words}")
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
