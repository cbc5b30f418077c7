"""``vmferry machine events``: what this host's machines were told of, and what came of it.

Promise: it reads what lies on disk and changes nothing; it also tells of machines that have left this host.
"""

from __future__ import annotations

import datetime as dt
from typing import Annotated

import typer

from vmferry.cli.machine import ConfigOption, directory_of
from vmferry.cli.output import JsonOption, print_document, print_table
from vmferry.config import HostConfig, load_config
from vmferry.errors import MachineNotFoundError
from vmferry.events.files import BoardFiles
from vmferry.events.states import Board, Event


def events(
    name: Annotated[str, typer.Argument(metavar="MACHINE", help="Name or UUID.")],
    config: ConfigOption = None,
    json: JsonOption = False,
) -> None:
    """Show a machine's Scheduled Events: those to come, and how the last ones went."""
    host = load_config(config)
    rows = rows_of(_board(name, host))
    if json:
        print_document({"events": rows})
    else:
        head = ("announced", "type", "status", "approved by", "lasted", "event")
        cells = [[row[key] or "-" for key in _COLUMNS] for row in rows]
        print_table(head, cells, empty="no event was announced to it here")


_COLUMNS = ("announced", "type", "status", "approved_by", "lasted_s", "id")


def rows_of(board: Board) -> list[dict[str, str]]:
    """What is to be said of each event, the oldest first."""
    past = [
        _row(one.event, one.ending.value, "" if one.lasted_s is None else f"{one.lasted_s:.3f}", one.why)
        for one in board.ended
    ]
    return [*past, *(_row(event, event.status.value.lower(), "", "") for event in board.events)]


def _row(event: Event, status: str, lasted_s: str, why: str) -> dict[str, str]:
    return {
        "id": event.id,
        "type": event.type.value,
        "status": status,
        "announced": _moment(event.announced_s),
        "not_before": _moment(event.not_before_s),
        "started": _moment(event.started_s) if event.started_s else "",
        "approved_by": event.approved_by,
        "lasted_s": lasted_s,
        "why": why,
    }


def _moment(unix_s: float) -> str:
    return dt.datetime.fromtimestamp(unix_s, dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _board(name: str, host: HostConfig) -> Board:
    files = BoardFiles(host.events_dir)
    try:
        return files.load(directory_of(host).find(name).spec.uuid)
    except MachineNotFoundError:
        if name in files.machines():
            return files.load(name)
        raise
