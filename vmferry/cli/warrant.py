"""``vmferry warrant``: signs what lets a host empty itself, for callers that do not use ``vmferry drain``."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Annotated

import typer

from vmferry.cli.output import JsonOption, print_document
from vmferry.security.identity import Identity
from vmferry.security.tickets import TicketSigner
from vmferry.security.warrants import MAX_WARRANT_S, Allowance, issue_warrant
from vmferry.v1.ticket_pb2 import SignedWarrant, Warrant

MIB = 1024 * 1024


def warrant(
    *,
    signer: Annotated[Path, typer.Option(help="Folder with ticket.crt and ticket.key.")],
    source: Annotated[str, typer.Option(help="Host to be emptied, spiffe://DOMAIN/vmhost/NAME.")],
    destination: Annotated[list[str], typer.Option(help="Host that machines may go to; may be repeated.")],
    machine_id: Annotated[list[str], typer.Option(help="UUID of a machine that may go; may be repeated.")],
    memory_mib: Annotated[int, typer.Option(help="Most memory that any of them may have.", min=1)],
    vcpus: Annotated[int, typer.Option(help="Most virtual CPUs that any of them may have.", min=1)] = 1,
    valid_s: Annotated[int, typer.Option(help="Seconds in which they must have begun.")] = MAX_WARRANT_S,
    json: JsonOption = False,
) -> None:
    """Print a warrant for emptying one host, in base64, as DrainHost takes it; 'vmferry drain' signs its own."""
    largest = Allowance(memory_mib * MIB, vcpus)
    signed = issue_warrant(
        TicketSigner.load(signer),
        source=Identity.parse(source, field="source"),
        destinations=[Identity.parse(one, field="destination") for one in destination],
        machines=dict.fromkeys(machine_id, largest),
        valid_s=valid_s,
    )
    text = base64.b64encode(signed).decode("ascii")
    if not json:
        print(text)
        return
    made = Warrant.FromString(SignedWarrant.FromString(signed).warrant)
    print_document(
        {
            "warrant": text,
            "warrant_id": made.warrant_id.hex(),
            "source": made.source,
            "destinations": list(made.destinations),
            "machine_ids": [one.machine_id for one in made.machines],
            "not_before": made.not_before.ToJsonString(),
            "expire_time": made.expire_time.ToJsonString(),
        }
    )
