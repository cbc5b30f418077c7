"""The entry of the ``vmferry`` command, and the one place where an error becomes words and an exit code.

Promise: every error of vmferry's catalogue leaves as a sentence, the field or option at fault, the reason and a
remedy on stderr, with the exit code docs/cli.md lists; a traceback is shown only with ``--debug``.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass

import typer

from vmferry.cli.output import say, say_error
from vmferry.errors import ExitCode, VmferryError
from vmferry.security.tls13 import enforce_tls13


@dataclass
class _Settings:
    """What the root command tells this module."""

    debug: bool = False


def main() -> int:
    """The entry of the process."""
    enforce_tls13()
    # gRPC's own library writes to stderr past Python; what it has to say comes out as our errors.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    return run(sys.argv[1:])


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code; Ctrl-C is 130, as typer has it."""
    from vmferry.cli.commands import app  # noqa: PLC0415 - loads grpc, which must find TLS 1.2 shut out

    settings = _Settings()
    try:
        result = app(
            args=list(arguments),
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
    except Exception as error:  # noqa: BLE001 - the outermost edge: the user gets words, never a bare traceback
        _show_traceback(settings)
        say(f"vmferry: error: unexpected {type(error).__name__}: {error}")
        say("  remedy: This is a bug in vmferry: please report it with the output of 'vmferry --debug ...'.")
        return ExitCode.FAILED
    return result if isinstance(result, int) else ExitCode.OK


def _say_usage(error: typer.TyperException) -> int:
    context = getattr(error, "ctx", None)
    message = error.format_message()
    if message.startswith("Usage: "):  # called without arguments: the message is the help
        say(message)
        return ExitCode.USAGE
    say(f"vmferry: error: {message}")
    if context is not None:
        say(f"  remedy: See '{context.command_path} --help'.")
    return ExitCode.USAGE


def _show_traceback(settings: _Settings) -> None:
    if settings.debug:
        traceback.print_exc(file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
