"""``vmferry certs``: a throw-away authority for demonstrations and tests, and a look at what a folder holds."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from cryptography import x509

from vmferry.cli.output import JsonOption, print_document, say
from vmferry.errors import InvalidArgumentError
from vmferry.security.authority import LEAF_DAYS, authority_trust_domain, init_authority, issue
from vmferry.security.identity import Identity, Kind, load_certificate
from vmferry.security.material import TlsFiles
from vmferry.security.tickets import TicketSigner

app = typer.Typer(help="Make and look at certificates.", no_args_is_help=True)


@app.command("init")
def init_command(
    directory: Annotated[Path, typer.Option("--dir", help="Folder to make the authority in.")],
    trust_domain: Annotated[str, typer.Option(help="Lower-case DNS name, such as example.org.")],
) -> None:
    """Make an authority for demonstrations and tests; its key is not encrypted."""
    init_authority(directory, trust_domain)
    say(f"Authority of {trust_domain} is in {directory}; ca.key there must stay secret.")


@app.command("issue")
def issue_command(
    authority: Annotated[Path, typer.Option("--ca", help="Folder of the authority.")],
    out: Annotated[Path, typer.Option(help="Folder to write ca.pem, tls.crt and tls.key to.")],
    host: Annotated[str | None, typer.Option(help="Name of a host, for both its services.")] = None,
    controller: Annotated[str | None, typer.Option(help="Name of a scheduler.")] = None,
    admin: Annotated[str | None, typer.Option(help="Name of a person.")] = None,
    days: Annotated[int, typer.Option(help="Days until it expires.")] = LEAF_DAYS,
    force: Annotated[bool, typer.Option("--force", help="Renew: replace what is there.")] = False,
) -> None:
    """Issue a certificate for one host, controller or admin; the latter two can also sign tickets."""
    names = {Kind.VMHOST: host, Kind.CONTROLLER: controller, Kind.ADMIN: admin}
    chosen = [(kind, name) for kind, name in names.items() if name is not None]
    if len(chosen) != 1:
        raise InvalidArgumentError("give exactly one of --host, --controller and --admin", field="host")
    identity = Identity(authority_trust_domain(authority), *chosen[0])
    issue(authority, identity, out, days=days, force=force)
    say(f"{identity} is in {out}, good for {days} days.")


@app.command("show")
def show_command(
    directory: Annotated[Path, typer.Argument(help="Folder with ca.pem, tls.crt and tls.key.")],
    json: JsonOption = False,
) -> None:
    """Check the files in a folder as a service would, and say who they are and how long they last."""
    facts = describe(directory)
    if json:
        print_document(facts)
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        shown = ", ".join(value) if isinstance(value, list) else value
        print(f"{name.replace('_', ' '):{width}}  {shown}")


def describe(directory: Path) -> dict[str, str | int | list[str]]:
    """What ``show`` prints; raises ConfigError as a service would when starting with these files."""
    material = TlsFiles(directory).load()
    left = material.not_after - datetime.now(UTC)
    facts: dict[str, str | int | list[str]] = {
        "identity": material.identity.uri,
        "server_name": material.identity.server_name,
        "not_after": f"{material.not_after:%Y-%m-%dT%H:%M:%SZ}",
        "days_left": left.days,
        "serial": f"{load_certificate(material.cert_pem).serial_number:x}",
        "key_sha256": material.key_sha256.hex(),
        "authorities": [
            certificate.subject.rfc4514_string()
            for certificate in x509.load_pem_x509_certificates(material.ca_pem)
        ],
    }
    if (directory / "ticket.crt").exists():
        facts["signs_tickets_as"] = TicketSigner.load(directory).identity.uri
    return facts
