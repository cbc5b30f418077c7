"""All commands of ``vmferry``, put together."""

from __future__ import annotations

import platform
from importlib.metadata import version as package_version
from typing import Annotated

import typer

from vmferry import __version__
from vmferry.cli import (
    bench,
    bounds,
    certs,
    demo,
    events,
    fleet,
    handoff,
    health,
    machine,
    migrate,
    playground,
    recover,
    status,
    ticket,
    top,
    trace,
    update,
    watch,
)
from vmferry.cli.drain import drain, drain_status, undrain
from vmferry.cli.output import JsonOption, print_document
from vmferry.cli.probe import probe
from vmferry.cli.warrant import warrant

app = typer.Typer(name="vmferry", no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.callback()
def root(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback with an error.")] = False,
) -> None:
    """Move running virtual machines between hosts."""
    context.obj.debug = debug


def version(json: JsonOption = False) -> None:
    """Print the versions of vmferry and of what it stands on."""
    found = {"vmferry": __version__, "python": platform.python_version()}
    found |= {name: package_version(name) for name in ("grpcio", "protobuf", "unicorn")}
    if json:
        print_document(found)
    else:
        print("\n".join(f"{name} {number}" for name, number in found.items()))


app.command()(demo.demo)
app.command()(drain)
app.command()(undrain)
app.command("drain-status")(drain_status)
app.command()(warrant)
app.command()(playground.playground)
app.command()(migrate.plan)
app.command()(migrate.migrate)
app.command()(migrate.cancel)
app.command()(update.update)
app.command("switch-now")(migrate.switch_now)
app.command("set")(bounds.set_)
app.command()(status.status)
app.command("list")(status.list_)
app.command()(watch.watch)
app.command()(top.top)
app.command()(recover.recover)
app.command()(trace.trace)
app.command()(ticket.ticket)
app.command()(health.health)
app.command()(probe)
app.command()(version)
machine.app.command()(events.events)
app.add_typer(machine.app, name="machine")
app.add_typer(handoff.app, name="handoff")
app.add_typer(certs.app, name="certs")
app.add_typer(bench.app, name="bench")
app.add_typer(fleet.app, name="fleet")
