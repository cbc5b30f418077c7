"""``vmferry ticket``: signs the permission slip of one migration."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Annotated

import typer

from vmferry.cli.output import JsonOption, print_document
from vmferry.security.identity import Identity
from vmferry.security.tickets import MAX_VALID_S, TicketSigner
from vmferry.v1.ticket_pb2 import SignedTicket, Ticket

MIB = 1024 * 1024


def ticket(
    signer: Annotated[Path, typer.Option(help="Folder with ticket.crt and ticket.key.")],
    machine_id: Annotated[str, typer.Option(help="UUID of the machine.")],
    source: Annotated[str, typer.Option(help="Host it leaves, spiffe://DOMAIN/vmhost/NAME.")],
    destination: Annotated[str, typer.Option(help="Host it goes to, spiffe://DOMAIN/vmhost/NAME.")],
    memory_mib: Annotated[int, typer.Option(help="Most memory the machine may have.")],
    vcpus: Annotated[int, typer.Option(help="Most virtual CPUs it may have.")] = 1,
    valid_s: Annotated[int, typer.Option(help="Seconds in which the migration must begin.")] = MAX_VALID_S,
    json: JsonOption = False,
) -> None:
    """Print a ticket for one migration, in base64, as StartMigration takes it. It is a secret until it is used."""
    signed = TicketSigner.load(signer).issue(
        machine_id=machine_id,
        source=Identity.parse(source, field="source"),
        destination=Identity.parse(destination, field="destination"),
        max_memory_bytes=memory_mib * MIB,
        max_vcpus=vcpus,
        valid_s=valid_s,
    )
    text = base64.b64encode(signed).decode("ascii")
    if not json:
        print(text)
        return
    made = Ticket.FromString(SignedTicket.FromString(signed).ticket)
    print_document(
        {
            "ticket": text,
            "migration_id": made.migration_id.hex(),
            "machine_id": made.machine_id,
            "source": made.source,
            "destination": made.destination,
            "not_before": made.not_before.ToJsonString(),
            "start_by": made.start_by.ToJsonString(),
        }
    )
