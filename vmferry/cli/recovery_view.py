"""What ``vmferry recover`` found, as a person reads it at night.

Promise: everything that matters fits in 100 columns, and what is to be typed stands alone on its line, to be copied.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from google.protobuf.timestamp_pb2 import Timestamp
from rich.table import Table
from rich.text import Text

from vmferry.cli.machine import since
from vmferry.cli.output import console, harmless, label
from vmferry.errors import MachineNotFoundError, VmferryError
from vmferry.v1 import machine_pb2
from vmferry.v1.journal_pb2 import JournalRecord, RecordKind
from vmferry.v1.recovery_pb2 import Choice, Journal, MachineInspection

_WIDTH: Final = 98
_ABOUT_COLUMNS: Final = 48
_LABEL: Final = 12
_SHOWN_ID: Final = 8


@dataclass
class End:
    """One host that was asked, and what came of it."""

    who: str
    """``here`` or ``there``."""
    address: str
    host: str
    inspection: MachineInspection | None = None
    error: VmferryError | None = None
    """Why it could not be asked."""
    missing: str = ""
    """The option without which it cannot be asked."""
    done: list[str] = field(default_factory=list)
    """What was done there."""


def print_ends(ends: list[End]) -> None:
    """Print what every host knows, what was done, and what may be chosen."""
    screen = console(stderr=False)
    for end in ends:
        for line in _head(end):
            print(harmless(line))
        if end.inspection is not None:
            screen.print(_journals(end.inspection))
            for line in _notes(end.inspection):
                print(harmless(line))
            for line in _choices(end.inspection):
                print(harmless(line))
        print()
    print("\n".join(_verdict(ends)))


def _head(end: End) -> Iterator[str]:
    at = f" at {end.address}" if end.address else ""
    yield f"{end.who}: {end.host or 'host without a readable certificate'}{at}"
    if end.error is not None:
        unheard = isinstance(end.error, MachineNotFoundError)
        what = "knows nothing of the machine" if unheard else f"{end.error.reason}: {end.error.message}"
        yield from _row("not known" if unheard else "not asked", what)
    if end.missing:
        yield from _row("not asked", f"its journals would be shown with {end.missing}")
    for text in end.done:
        yield from _row("done", text)
    if end.inspection is not None:
        yield from _facts(end.inspection)


def _facts(seen: MachineInspection) -> Iterator[str]:
    machine = seen.machine
    yield from _row("machine", f"{machine.name or '(no entry here)'} {machine.uuid}")
    right = label(machine_pb2.MachineRight, machine.right, "MACHINE_RIGHT_")
    yield from _row("right", f"{right}, epoch {machine.epoch}")
    memory = "its memory is here" if seen.has_memory else "its memory is not here"
    process = f", process {machine.pid}" if machine.pid else ""
    state = label(machine_pb2.MachineState, machine.state, "MACHINE_STATE_")
    yield from _row("guest", f"{state} ({seen.hypervisor}); {memory}{process}")
    if seen.attempt_state:
        ref = seen.open_attempt
        text = f"{seen.attempt_state}: migration {ref.migration_id.hex()}, number {ref.attempt}, "
        yield from _row("attempt", f"{text}epoch {ref.epoch_from} to {ref.epoch_to}")
    if seen.peer.host:
        yield from _row("other end", _peer(seen))
    who = f"the {seen.service} service" if seen.service else "the files, without a service"
    yield from _row("said by", f"{who}; journals {seen.incarnation or 'of unknown incarnation'}")
    if machine.HasField("blockage"):
        found = machine.blockage
        yield from _row("blocked", f"{found.reason}{since(found)}")
        yield from _row("", found.message)
        yield from _row("do", found.remedy)


def _peer(seen: MachineInspection) -> str:
    peer = seen.peer
    text = peer.host + (f" at {peer.address}" if peer.address else "")
    if peer.HasField("heard_time"):
        text += f"; last heard {_time(peer.heard_time)}: {peer.heard}"
    elif seen.service:
        text += "; not heard since the service started"
    return f"{text}; since then {peer.failure}" if peer.failure else text


def _journals(seen: MachineInspection) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", show_edge=False)
    for heading in ("  JOURNAL", "WRITTEN", "RECORD"):
        table.add_column(heading, no_wrap=True)
    table.add_column("ABOUT", max_width=_ABOUT_COLUMNS, overflow="fold")
    for one in seen.journals:
        for record in one.records:
            kind = label(RecordKind, record.kind, "RECORD_KIND_").upper().replace("-", "_")
            cells = (f"  {one.role}", _time(record.write_time), kind, _about(record))
            table.add_row(*(Text(harmless(cell)) for cell in cells))
        if not one.records:
            table.add_row(Text(f"  {one.role}"), Text("-"), Text("-"), Text(_why_empty(one)))
    return table


def _why_empty(one: Journal) -> str:
    if one.exists:
        return "no record that can be read" if one.damage else "no record"
    return "no file"


def _notes(seen: MachineInspection) -> Iterator[str]:
    """What is wrong with the journals."""
    for one in seen.journals:
        if one.damage:
            yield from _row("DAMAGED", f"{one.role}: {one.damage}")
        if one.torn_tail:
            yield from _row("TORN", f"{one.role}: the last record may be missing, whichever it was")


def _about(record: JournalRecord) -> str:
    parts = [f"epoch {record.epoch}"] if record.epoch else []
    if record.HasField("attempt"):
        ref = record.attempt
        parts.append(
            f"{ref.migration_id.hex()[:_SHOWN_ID]} number {ref.attempt}, epoch {ref.epoch_from} to {ref.epoch_to}"
        )
        if record.kind in {RecordKind.RECORD_KIND_BEGUN, RecordKind.RECORD_KIND_ACCEPTED}:
            parts += [
                f"{ref.source} to {ref.destination}",
                *([f"at {ref.destination_address}"] * bool(ref.destination_address)),
            ]
    parts += [f"by {record.operator}"] if record.operator else []
    parts += [record.note] if record.note else []
    return "; ".join(parts)


def _choices(seen: MachineInspection) -> Iterator[str]:
    """What may be chosen, where there is something to choose."""
    if not seen.machine.HasField("blockage") and not seen.attempt_state:
        return
    yield "  choices here:"
    for choice in seen.choices:
        yield from _choice(choice)


def _choice(choice: Choice) -> Iterator[str]:
    if not choice.possible:
        yield from _row(choice.name, f"not now: {choice.why_not}", indent=4)
        return
    yield from _row(choice.name, f"risk: {choice.risk}", indent=4)
    yield f"    {'':<{_LABEL + 3}}$ {choice.command}"


def _verdict(ends: list[End]) -> Iterator[str]:
    blocked = [
        end for end in ends if end.inspection is not None and end.inspection.machine.HasField("blockage")
    ]
    for end in blocked:
        assert end.inspection is not None
        yield f"blocked {end.who}: {end.inspection.machine.blockage.reason}"
    if not blocked:
        unasked = [end for end in ends if end.inspection is None]
        yield "nothing is blocked here; the other host was not seen" if unasked else "nothing is blocked"


def _row(name: str, text: str, *, indent: int = 2) -> Iterator[str]:
    width = _LABEL + (3 if indent > 2 else 0)  # noqa: PLR2004 - the outer margin
    first = f"{'':<{indent}}{name:<{width}}"
    yield from textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=first,
        subsequent_indent=" " * len(first),
        break_long_words=False,
        break_on_hyphens=False,
    ) or [first]


def _time(timestamp: Timestamp) -> str:
    return timestamp.ToDatetime().strftime("%Y-%m-%d %H:%M:%SZ")
