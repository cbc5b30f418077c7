"""``vmferry handoff``: an operator decides what two hosts cannot settle, since one of them is lost for ever.

Promise: without evidence, or the exact confirmation, nothing is decided and what is at stake is shown; what is
decided is the very migration that was shown, never one that has begun since.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Annotated

import grpc.aio
import typer

from vmferry.cli.connection import (
    CALL_TIMEOUT_S,
    Source,
    TlsOption,
    call_error,
    calls_source,
    check_address,
    host_identity,
)
from vmferry.cli.output import JsonOption, as_document, label, print_document, say
from vmferry.errors import InvalidArgumentError
from vmferry.handoff.choices import CONFIRMATION
from vmferry.rpc.tracing import ClientTracingInterceptors
from vmferry.security.tls import TlsFiles, open_channel
from vmferry.v1.handoff_pb2 import ForceAcceptRequest
from vmferry.v1.handoff_pb2_grpc import DestinationServiceStub
from vmferry.v1.machine_pb2 import MachineRight
from vmferry.v1.migration_pb2 import ForceReclaimRequest
from vmferry.v1.override_pb2 import Override, OverrideReport

app = typer.Typer(
    help="Decide about a hand-off whose other host is lost for ever (docs/handoff.md).", no_args_is_help=True
)

MachineArgument = Annotated[str, typer.Argument(metavar="MACHINE", help="Name on this host, or UUID.")]
MigrationOption = Annotated[
    str, typer.Option("--migration", metavar="ID", help="Decide about this one only; default: the one shown.")
]
EvidenceOption = Annotated[
    str,
    typer.Option("--evidence", metavar="ID", help="What switched the other host off, for the record."),
]
ConfirmOption = Annotated[
    str, typer.Option("--confirm", metavar="TEXT", help=f'Instead of evidence, exactly: "{CONFIRMATION}".')
]
MemoryOption = Annotated[
    bool,
    typer.Option("--with-memory", help="Go on from the memory here, which may be older than the disks."),
]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Say what would happen and what it risks; change nothing.")
]

Ask = Callable[[Override, bool], Awaitable[OverrideReport]]
"""Sends an operator's word; with True it only asks."""


@app.command()
@calls_source
async def force_reclaim(
    source: Source,
    *,
    machine: MachineArgument,
    migration: MigrationOption = "",
    evidence: EvidenceOption = "",
    confirm: ConfirmOption = "",
    with_memory: MemoryOption = False,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
) -> None:
    """Take a machine back at its source: its destination is off, and will never say what became of it."""

    async def ask(override: Override, only_asked: bool) -> OverrideReport:
        request = ForceReclaimRequest(override=override, validate_only=only_asked)
        return (await source.call(source.stub.ForceReclaim, request)).report

    said = _said(machine, migration, evidence, confirm, with_memory=with_memory)
    await _decide(ask, said, dry_run=dry_run, json=json)


@app.command()
def force_accept(
    *,
    machine: MachineArgument,
    destination: Annotated[
        str,
        typer.Option(
            "--destination",
            envvar="VMFERRY_DESTINATION",
            metavar="HOST:PORT",
            help="The destination service that holds the copy.",
        ),
    ],
    destination_host: Annotated[
        str,
        typer.Option(
            "--destination-host",
            envvar="VMFERRY_DESTINATION_HOST",
            metavar="URI",
            help="Identity its certificate must carry: spiffe://DOMAIN/vmhost/NAME.",
        ),
    ],
    tls: TlsOption,
    migration: MigrationOption = "",
    evidence: EvidenceOption = "",
    confirm: ConfirmOption = "",
    with_memory: MemoryOption = False,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
) -> None:
    """Take a machine at its destination: a complete copy waits there, and its source is off for ever."""
    said = _said(machine, migration, evidence, confirm, with_memory=with_memory)

    async def run() -> None:
        check_address(destination, field="--destination")
        host = host_identity(destination_host, field="--destination-host")
        channel = open_channel(
            destination, host, TlsFiles(tls).load(), interceptors=ClientTracingInterceptors()
        )
        async with channel:
            stub = DestinationServiceStub(channel)

            async def ask(override: Override, only_asked: bool) -> OverrideReport:
                request = ForceAcceptRequest(override=override, validate_only=only_asked)
                try:
                    return (await stub.ForceAccept(request, timeout=CALL_TIMEOUT_S)).report
                except grpc.aio.AioRpcError as error:
                    raise call_error(error, host, side="destination") from error

            await _decide(ask, said, dry_run=dry_run, json=json)

    asyncio.run(run())


def _said(machine: str, migration: str, evidence: str, confirm: str, *, with_memory: bool) -> Override:
    return Override(
        machine=machine,
        migration_id=migration,
        evidence=evidence,
        confirmation=confirm,
        with_memory=with_memory,
    )


async def _decide(ask: Ask, said: Override, *, dry_run: bool, json: bool) -> None:
    """Show what is at stake, and decide about exactly that."""
    report = await ask(said, True)
    if not dry_run and (said.evidence or said.confirmation):
        said.migration_id = report.migration_id
        report = await ask(said, False)
    if json:
        print_document(as_document(report))
    else:
        print("\n".join(_lines(report)))
    if dry_run:
        say("nothing was changed")
    elif not (said.evidence or said.confirmation):
        raise InvalidArgumentError(
            "nothing was changed: say what shows that the other copy cannot run",
            field="--evidence",
            remedy=f'Give --evidence ID, or --confirm "{CONFIRMATION}".',
        )


def _lines(report: OverrideReport) -> list[str]:
    lines = [
        f"machine     {report.machine} ({report.machine_id})",
        f"migration   {report.migration_id}",
        f"right       {label(MachineRight, report.right, 'MACHINE_RIGHT_')}",
    ]
    if report.other_host:
        lines.append(f"other host  {report.other_host}")
    if report.done:
        lines.append(f"decided     by {report.operator}, on: {report.evidence}")
    memory = "goes on from the memory here" if report.with_memory else "is to be started anew"
    lines.append(f"the guest   {memory}; right to run number {report.epoch}")
    lines += [f"{'done' if report.done else 'would':<12}{effect}" for effect in report.effects]
    lines += [f"risk        {risk}" for risk in report.risks]
    return lines
