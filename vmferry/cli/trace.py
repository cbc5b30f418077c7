"""``vmferry trace``: what happened in a migration, when, and on which host."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vmferry.cli.output import JsonOption, console, print_document
from vmferry.config import HostConfig
from vmferry.telemetry.timeline import load_spans, render_timeline, span_tree, tree_json


def trace(
    trace_id: Annotated[
        str, typer.Argument(help="Trace of the migration (trace_id in its status), or how it begins.")
    ],
    dirs: Annotated[
        list[Path] | None,
        typer.Option(
            "--dir", help="Folder with span files; name one per host. Default: this host's.", metavar="PATH"
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Show the timeline of a migration from the span files of its hosts."""
    spans = load_spans(dirs or [HostConfig().trace_dir], trace_id)
    if json:
        print_document({"trace_id": spans[0].trace_id, "spans": tree_json(span_tree(spans))})
        return
    screen = console(stderr=False)
    screen.print(render_timeline(spans, screen.width))
