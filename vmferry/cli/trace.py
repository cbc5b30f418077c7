"""``vmferry trace``: what happened in a migration, when, and on which host."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Final

import typer

from vmferry.cli.output import JsonOption, console, print_document, say
from vmferry.config import HostConfig
from vmferry.errors import InvalidArgumentError
from vmferry.telemetry.clocks import Clock, estimate_clocks
from vmferry.telemetry.drawing import render_html, render_svg
from vmferry.telemetry.spans import SpanRecord, load_spans, span_tree
from vmferry.telemetry.timeline import render_timeline, tree_json

_DRAWINGS: Final[dict[str, Callable[[list[SpanRecord]], str]]] = {
    ".svg": render_svg,
    ".html": render_html,
    ".htm": render_html,
}


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
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="Draw it into this file instead: FILE.svg or FILE.html."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Show the timeline of a migration from the span files of its hosts."""
    draw = _drawing(out)
    spans = load_spans(dirs or [HostConfig().trace_dir], trace_id)
    if out is not None and draw is not None:
        _write(out, draw(spans))
    if json:
        clocks = [_clock(one) for one in estimate_clocks(spans).values() if one.calls]
        print_document(
            {"trace_id": spans[0].trace_id, "spans": tree_json(span_tree(spans)), "clocks": clocks}
        )
    elif out is None:
        screen = console(stderr=False)
        screen.print(render_timeline(spans, screen.width))


def _drawing(out: Path | None) -> Callable[[list[SpanRecord]], str] | None:
    if out is None:
        return None
    try:
        return _DRAWINGS[out.suffix.lower()]
    except KeyError:
        raise InvalidArgumentError(f"{out} is neither .svg nor .html", field="--out") from None


def _write(out: Path, text: str) -> None:
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InvalidArgumentError(f"cannot write {out}: {error.strerror}", field="--out") from error
    say(f"drawn in {out}")


def _clock(clock: Clock) -> dict[str, object]:
    return {
        "host": clock.host,
        "reference": clock.reference,
        "offset_ms": clock.offset_ns / 1e6,
        "error_ms": clock.error_ns / 1e6,
        "calls": clock.calls,
    }
