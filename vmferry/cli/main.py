"""The ``vmferry`` command: its parts put together, and the one place where an error becomes words and an exit code.

Promise: every error of vmferry's catalogue leaves as a sentence, the field or option at fault, the reason and a remedy
on stderr, with the exit code docs/cli.md lists; a traceback is shown only with ``--debug``.
"""

from __future__ import annotations

import platform
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version as package_version
from typing import Annotated, Final

import typer

from vmferry.cli import certs, demo, machine, migrate, status, ticket, trace, watch
from vmferry.cli.output import JsonOption, print_document, say, say_error
from vmferry.cli.probe import probe
from vmferry.errors import ExitCode, VmferryError

INTERRUPTED: Final = 130
"""What a shell reports for a command that Ctrl-C ended; typer turns KeyboardInterrupt into it."""


@dataclass
class _Settings:
    debug: bool = False


app = typer.Typer(name="vmferry", no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def root(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback with an error.")] = False,
) -> None:
    """Move running virtual machines between hosts."""
    context.ensure_object(_Settings).debug = debug


def version(json: JsonOption = False) -> None:
    """Print the versions of vmferry and of what it stands on."""
    found = {"vmferry": package_version("vmferry"), "python": platform.python_version()}
    found |= {name: package_version(name) for name in ("grpcio", "protobuf", "unicorn")}
    if json:
        print_document(found)
    else:
        print("\n".join(f"{name} {number}" for name, number in found.items()))


app.command()(demo.demo)
app.command()(migrate.plan)
app.command()(migrate.migrate)
app.command()(migrate.cancel)
app.command()(status.status)
app.command("list")(status.list_)
app.command()(watch.watch)
app.command()(trace.trace)
app.command()(ticket.ticket)
app.command()(probe)
app.command()(version)
app.add_typer(machine.app, name="machine")
app.add_typer(certs.app, name="certs")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    settings = _Settings()
    try:
        result = app(
            args=None if arguments is None else list(arguments),
            prog_name="vmferry",
            standalone_mode=False,
            obj=settings,
        )
    except VmferryError as error:
        _show_traceback(settings)
        say_error(error)
        return error.exit_code
    except typer.TyperException as error:
        return _say_usage(error)
    except Exception as error:  # noqa: BLE001 - the outermost edge: nothing may reach the user as a traceback
        _show_traceback(settings)
        say(f"vmferry: error: unexpected {type(error).__name__}: {error}")
        say("  remedy: This is a bug in vmferry: please report it with the output of 'vmferry --debug …'.")
        return ExitCode.FAILED
    return result if isinstance(result, int) else ExitCode.OK


def _say_usage(error: typer.TyperException) -> int:
    context = getattr(error, "ctx", None)
    say(f"vmferry: error: {error.format_message()}")
    if context is not None:
        say(f"  usage:  {context.command_path} --help")
    return ExitCode.USAGE


def _show_traceback(settings: _Settings) -> None:
    if settings.debug:
        traceback.print_exc(file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
