"""What the command line prints, and where.

Promise: data goes to stdout and everything else to stderr; a JSON document, when asked for, is alone on stdout;
nothing is coloured unless a person looks at it, and never with ``NO_COLOR``.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Final

import typer
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from rich.console import Console
from rich.table import Table

from vmferry.errors import VmferryError

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]

_LONG: Final = {
    FieldDescriptor.CPPTYPE_INT64,
    FieldDescriptor.CPPTYPE_UINT64,
}
_UNITS: Final = ("B", "KiB", "MiB", "GiB", "TiB")
_STEP: Final = 1024
_WIDE: Final = 200
"""Columns of a table that goes into a file or a pipe, where nothing may be cut off."""


def console(*, stderr: bool = True) -> Console:
    """A console that knows whether a person looks at it."""
    stream = sys.stderr if stderr else sys.stdout
    person = stream.isatty() and os.environ.get("TERM") != "dumb"
    plain = not person or bool(os.environ.get("NO_COLOR"))
    return Console(
        stderr=stderr,
        force_terminal=person,
        color_system=None if plain else "auto",
        highlight=False,
        soft_wrap=not person,
        width=None if person else _WIDE,
    )


def harmless(text: str) -> str:
    """The same on a terminal: other hosts have a part in such texts, and must not get to command it."""
    return "".join(
        char if char.isprintable() or char in "\n\t" else "\N{REPLACEMENT CHARACTER}" for char in text
    )


def say(text: str) -> None:
    """Tell a person something that is not data."""
    print(harmless(text), file=sys.stderr, flush=True)


def say_error(error: VmferryError) -> None:
    """Tell a person what went wrong, where, and what to do."""
    say(f"vmferry: error: {error.message}")
    if error.field:
        say(f"  field:  {error.field}")
    say(f"  reason: {error.reason}")
    if error.instance_remedy:
        say(f"  remedy: {error.instance_remedy}")


def print_document(value: Mapping[str, Any] | Sequence[Any]) -> None:
    """Print the one JSON document of a command."""
    print(json.dumps(value, indent=2, ensure_ascii=False), flush=True)


def print_table(headings: Sequence[str], rows: Iterable[Sequence[str]], *, empty: str) -> None:
    """Print rows in columns as data; ``empty`` goes to stderr when there is none."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in headings:
        table.add_column(heading, no_wrap=True)
    for row in rows:
        table.add_row(*row)
    if table.row_count:
        console(stderr=False).print(table)
    else:
        say(empty)


def as_document(message: Message) -> dict[str, Any]:
    """A message as JSON with the field names of the .proto files and every field present.

    It is protobuf's own JSON mapping, which :func:`google.protobuf.json_format.ParseDict` reads back, except that
    64-bit numbers are numbers and not strings: none of ours is too large for a reader that only knows doubles.
    """
    document = MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return _tidied(document, message.DESCRIPTOR)


def _tidied(document: dict[str, Any], descriptor: Any) -> dict[str, Any]:
    """The same with numbers as numbers, and fields in the order of the .proto file."""
    found: dict[str, Any] = {}
    for field in descriptor.fields:
        if field.name not in document:
            continue
        value = document[field.name]
        if field.cpp_type in _LONG:
            value = [int(item) for item in value] if field.is_repeated else int(value)
        elif field.message_type is not None and not field.message_type.GetOptions().map_entry:
            # Well-known types such as Duration are strings in JSON.
            tidy = partial(_tidied_message, descriptor=field.message_type)
            value = [tidy(item) for item in value] if field.is_repeated else tidy(value)
        found[field.name] = value
    return found


def _tidied_message(value: Any, descriptor: Any) -> Any:
    return _tidied(value, descriptor) if isinstance(value, dict) else value


def milliseconds(duration: Duration) -> float:
    """A duration as milliseconds, to the microsecond."""
    return round(duration.seconds * 1e3 + duration.nanos / 1e6, 3)


def size(number: float) -> str:
    """A number of bytes as a person reads it."""
    for unit in _UNITS[:-1]:
        if abs(number) < _STEP:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= _STEP
    return f"{number:.1f} {_UNITS[-1]}"


def label(enumeration: Any, value: int, prefix: str) -> str:
    """The name of a protobuf enum value without its prefix, in lower case; what nobody has said is not known."""
    if not value:
        return "not-known"
    try:
        name: str = enumeration.Name(value)
    except ValueError:  # a newer service may know more
        return str(value)
    return name.removeprefix(prefix).lower().replace("_", "-")
