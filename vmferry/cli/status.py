"""``vmferry status`` and ``vmferry list``: what a source knows of its migrations and machines."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Annotated

import typer
from google.protobuf.timestamp_pb2 import Timestamp

from vmferry.cli.hosts import Hosts, calls_hosts, find_migration, finish, say_silent, unanswered
from vmferry.cli.machine import print_machines
from vmferry.cli.output import JsonOption, as_document, milliseconds, print_document, print_table
from vmferry.cli.prediction import outcome_lines
from vmferry.cli.progress import facts, outcome_name, phase_name
from vmferry.cli.units import moment
from vmferry.cli.watch import MigrationArgument
from vmferry.errors import InvalidArgumentError
from vmferry.v1.migration_pb2 import (
    MIGRATION_PHASE_ENDED,
    ListMigrationsRequest,
    Migration,
    MigrationOutcome,
    MigrationPhase,
)


class Phase(enum.StrEnum):
    """How far a migration has come."""

    QUEUED = "queued"
    NEGOTIATING = "negotiating"
    ANNOUNCED = "announced"
    RESERVING = "reserving"
    PRECOPYING = "precopying"
    SWITCHING = "switching"
    HANDING_OFF = "handing_off"
    RELEASING = "releasing"
    ENDED = "ended"


class Outcome(enum.StrEnum):
    """How a migration came out."""

    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    UNKNOWN = "unknown"


@calls_hosts
async def status(hosts: Hosts, *, migration_id: MigrationArgument, json: JsonOption = False) -> None:
    """Print what is known of one migration; exit code 0 if it was found, whatever came of it."""
    _, migration = await find_migration(hosts, migration_id)
    if json:
        print_document(as_document(migration))
    else:
        print("\n".join(_details(migration)))


@calls_hosts
async def list_(
    hosts: Hosts,
    *,
    machine: Annotated[str, typer.Option("--machine", help="Only migrations of this machine.")] = "",
    open_only: Annotated[bool, typer.Option("--open", help="Only migrations that have not ended.")] = False,
    ended: Annotated[bool, typer.Option("--ended", help="Only migrations that have ended.")] = False,
    to_host: Annotated[str, typer.Option("--to-host", metavar="URI", help="Only those to this host.")] = "",
    phase: Annotated[
        list[Phase] | None, typer.Option("--phase", help="Only in this phase; may be repeated.")
    ] = None,
    outcome: Annotated[
        list[Outcome] | None, typer.Option("--outcome", help="Only that came out so; may be repeated.")
    ] = None,
    since: Annotated[
        str,
        typer.Option(
            "--since", metavar="TIME", help="Only accepted since then: a time, or a span such as 2h."
        ),
    ] = "",
    before: Annotated[str, typer.Option("--before", metavar="TIME", help="Only accepted before then.")] = "",
    limit: Annotated[
        int,
        typer.Option("--limit", metavar="COUNT", min=0, help="Only so many, the newest; 0: all there are."),
    ] = 0,
    machines: Annotated[bool, typer.Option("--machines", help="List machines instead.")] = False,
    json: JsonOption = False,
) -> None:
    """List the migrations that sources know, ended ones of their history included, newest first, or machines."""
    request = ListMigrationsRequest(
        machine=machine,
        open_only=open_only,
        destination=to_host,
        phases=[MigrationPhase.Value(f"MIGRATION_PHASE_{one.name}") for one in phase or ()],
        outcomes=[MigrationOutcome.Value(f"MIGRATION_OUTCOME_{one.name}") for one in outcome or ()],
    )
    if ended:
        request.phases.append(MIGRATION_PHASE_ENDED)
    if since:
        request.created_since.FromDatetime(moment(since, field="--since", ahead=False))
    if before:
        request.created_before.FromDatetime(moment(before, field="--before", ahead=False))
    if machines:
        if request != ListMigrationsRequest() or limit:
            raise InvalidArgumentError(
                "--machines lists machines, and goes with no option about migrations", field="--machines"
            )
        await _list_machines(hosts, json=json)
        return
    told = await hosts.ask(lambda source: source.migrations(request, limit=limit))
    found = [(one.name, migration) for one in told for migration in one.answer or ()]
    found.sort(key=lambda pair: pair[1].create_time.ToNanoseconds(), reverse=True)
    found = found[:limit] if limit else found
    if json:
        migrations = [as_document(migration) for _, migration in found]
        print_document({"migrations": migrations, **unanswered(hosts, told)})
    else:
        _print_migrations(hosts, found)
        say_silent(told)
    finish(told)


async def _list_machines(hosts: Hosts, *, json: bool) -> None:
    told = await hosts.ask(lambda source: source.list_machines())
    found = [(one.name, machine) for one in told for machine in one.answer or ()]
    if json:
        documents = [as_document(machine) | hosts.named(host) for host, machine in found]
        print_document({"machines": documents, **unanswered(hosts, told)})
    else:
        print_machines(
            [machine for _, machine in found], hosts=[host for host, _ in found] if hosts.several else ()
        )
        say_silent(told)
    finish(told)


def _print_migrations(hosts: Hosts, found: Sequence[tuple[str, Migration]]) -> None:
    rows = [
        (
            migration.id,
            migration.machine,
            *([host] if hosts.several else []),
            phase_name(migration),
            outcome_name(migration),
            migration.destination.host,
            _time(migration.create_time),
        )
        for host, migration in found
    ]
    source = ["SOURCE"] if hosts.several else []
    headings = ("ID", "MACHINE", *source, "PHASE", "OUTCOME", "DESTINATION", "ACCEPTED")
    print_table(headings, rows, empty="no migrations")


def _details(migration: Migration) -> list[str]:
    lines = [
        f"migration   {migration.id}",
        f"machine     {migration.machine} ({migration.machine_id})",
        f"from        {migration.source}",
        f"to          {migration.destination.host} at {migration.destination.address}",
        f"phase       {phase_name(migration)}",
        f"outcome     {outcome_name(migration)}",
        f"owner       {migration.owner or 'not known yet'}",
        f"progress    round {migration.progress.round}, {facts(migration)}",
        f"accepted    {_time(migration.create_time)}",
        f"trace       {migration.trace_id}",
    ]
    if migration.caller:
        lines += [f"asked for   by {migration.caller}, request {migration.request_id}"]
    if migration.options.HasField("deadline"):
        lines += [f"deadline    {_time(migration.options.deadline)}"]
    if migration.HasField("queue"):
        lines += [f"queue       {facts(migration)}; priority {migration.options.priority}"]
    if migration.path:
        lines += [f"path        {migration.path}: {migration.path_reason}"]
    for timing in migration.timings:
        name = MigrationPhase.Name(timing.phase).removeprefix("MIGRATION_PHASE_").lower()
        lines.append(f"  {name:<12} {milliseconds(timing.elapsed):10.1f} ms")
    lines += outcome_lines(migration)
    if migration.reason.reason:
        lines += [f"reason      {migration.reason.reason}: {migration.reason.message}"]
        lines += [f"remedy      {migration.reason.remedy}"]
    return lines


def _time(timestamp: Timestamp) -> str:
    return timestamp.ToDatetime().strftime("%Y-%m-%d %H:%M:%SZ")
