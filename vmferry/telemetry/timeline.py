"""The story of one trace as a picture for a terminal, and as trees for programs.

Promise: the spans of all hosts stand on one axis of time, that of the host that sent the machine; what their clocks
were found to be apart is said below, and so is a host of which that is not known.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from vmferry.telemetry.clocks import Clock, align, estimate_clocks
from vmferry.telemetry.spans import NS_PER_MS, SpanNode, SpanRecord, span_tree, walk

_NARROWEST_BAR: Final = 10
_GAP: Final = 2
_HEADINGS: Final = ("span", "host/service", "ms")


def tree_json(nodes: Sequence[SpanNode]) -> list[dict[str, Any]]:
    """The trees for programs; ``start_ms`` counts from the earliest span."""
    origin = min((node.span.start_ns for node, _ in walk(nodes)), default=0)
    return [_node_json(node, origin) for node in nodes]


def render_timeline(spans: Sequence[SpanRecord], width: int) -> RenderableType:
    """The trace as a picture for a terminal: an indented tree with a bar per span on one axis of time.

    Args:
        spans: of one trace, at least one.
        width: columns to use.
    """
    clocks = estimate_clocks(spans)
    spans = align(spans, clocks)
    start = min(span.start_ns for span in spans)
    length = max(span.end_ns for span in spans) - start
    rows = [_row(node.span, depth) for node, depth in walk(span_tree(spans))]
    texts = [_HEADINGS, *(texts for texts, _ in rows)]
    taken = sum(max(map(len, column)) + _GAP for column in zip(*texts, strict=True))
    columns = max(_NARROWEST_BAR, width - taken)

    table = Table(box=None, padding=(0, _GAP, 0, 0), pad_edge=False, header_style="bold")
    table.add_column(_HEADINGS[0], no_wrap=True)
    table.add_column(_HEADINGS[1], no_wrap=True, style="cyan")
    table.add_column("time", no_wrap=True, width=columns)
    table.add_column(_HEADINGS[2], no_wrap=True, justify="right")
    for (name, place, duration), span in rows:
        bar = Text(_bar(span, start, length, columns), style="red" if span.failed else "green")
        table.add_row(Text(name, style="red" if span.failed else ""), Text(place), bar, Text(duration))
    return Group(_heading(spans, length), table, *_notes(spans, clocks))


def _row(span: SpanRecord, depth: int) -> tuple[tuple[str, str, str], SpanRecord]:
    name, place = _printable("  " * depth + span.name), _printable(f"{span.host}/{span.service}")
    return (name, place, f"{span.duration_ms:,.1f}"), span


def _heading(spans: Sequence[SpanRecord], length_ns: int) -> Text:
    failed = sum(span.failed for span in spans)
    counts = f"{len(spans)} spans" + (f", {failed} failed" if failed else "")
    return Text(f"trace {spans[0].trace_id}   {length_ns / NS_PER_MS:,.1f} ms   {counts}")


def _notes(spans: Sequence[SpanRecord], clocks: Mapping[str, Clock]) -> list[Text]:
    notes = [f"failed: {_printable(span.name)}: {_printable(span.message)}" for span in spans if span.message]
    notes += [_printable(note) for note in clock_notes(spans, clocks)]
    return [Text(note, style="dim") for note in notes]


def clock_notes(spans: Iterable[SpanRecord], clocks: Mapping[str, Clock]) -> list[str]:
    """What is to be said about the clocks of the hosts in a drawing."""
    hosts = sorted({span.host for span in spans})
    if len(hosts) == 1:
        return []
    notes = [clocks[host].sentence() for host in hosts if host in clocks and clocks[host].calls]
    apart = [host for host in hosts if host not in clocks]
    if apart:
        notes.append(
            f"No call tells how the clock of {', '.join(apart)} compares: "
            "compare lengths there, not positions, with those of other hosts."
        )
    return notes


def _bar(span: SpanRecord, start: int, length: int, columns: int) -> str:
    first = min(columns - 1, (span.start_ns - start) * columns // max(1, length))
    size = round((span.end_ns - span.start_ns) * columns / max(1, length))
    return " " * first + ("█" * min(size, columns - first) if size >= 1 else "▏")


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _node_json(node: SpanNode, origin: int) -> dict[str, Any]:
    span = node.span
    return {
        "name": span.name,
        "service": span.service,
        "host": span.host,
        "start_ms": round((span.start_ns - origin) / NS_PER_MS, 3),
        "duration_ms": span.duration_ms,
        "failed": span.failed,
        "children": [_node_json(child, origin) for child in node.children],
    }
