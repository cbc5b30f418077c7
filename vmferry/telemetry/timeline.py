"""The story of one trace, read back from the span files of any number of hosts.

Promise: given the folders with the span files of the hosts, every span of a trace is found once, whatever order they
were written in; lines that a crash left unfinished are passed over; a span whose parent is nowhere stands by itself.
Times are those of each host's own clock and are never corrected, and the drawing says so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from vmferry.errors import ConfigError, InvalidArgumentError, TraceNotFoundError
from vmferry.telemetry import semconv

_TRACE_ID = re.compile(r"[0-9a-f]{1,32}")
_NS_PER_MS: Final = 1_000_000
_STATUS_ERROR: Final = 2
"""``STATUS_CODE_ERROR`` in OTLP; its JSON has numbers for enums."""
_SHOWN_TRACES: Final = 3
_NARROWEST_BAR: Final = 10
_GAP: Final = 2
_HEADINGS: Final = ("span", "host/service", "ms")


@dataclass(frozen=True)
class SpanRecord:
    """One ended span, as a file tells of it."""

    trace_id: str
    span_id: str
    parent_id: str
    """Empty if it has none."""
    name: str
    service: str
    host: str
    start_ns: int
    """Start by the clock of its host, nanoseconds after 1970."""
    end_ns: int
    failed: bool = False
    message: str = ""
    """Why it failed, if it did and says so."""

    @property
    def duration_ms(self) -> float:
        """How long it took, to the microsecond."""
        return round((self.end_ns - self.start_ns) / _NS_PER_MS, 3)


@dataclass(frozen=True)
class SpanNode:
    """A span and the spans it caused, earliest first."""

    span: SpanRecord
    children: tuple[SpanNode, ...]


def load_spans(directories: Sequence[Path], trace_id: str) -> list[SpanRecord]:
    """The spans of a trace, earliest first.

    Args:
        directories: folders with span files (``*.jsonl``); one that does not exist has none.
        trace_id: the trace's id, or its beginning if no other trace begins so.

    Raises:
        InvalidArgumentError: the id is not hexadecimal, or several traces begin with it.
        ConfigError: a span file cannot be read.
        TraceNotFoundError: no span of this trace is there.
    """
    wanted = trace_id.strip().lower()
    if not _TRACE_ID.fullmatch(wanted):
        raise InvalidArgumentError(
            f"{trace_id!r} is not a trace id: 1 to 32 hexadecimal digits", field="trace_id"
        )
    found = {
        (span.trace_id, span.span_id): span
        for path in _files(directories)
        for span in _spans_of(path, wanted)
    }
    traces = sorted({span.trace_id for span in found.values()})
    if not traces:
        places = ", ".join(map(str, directories)) or "no folder"
        raise TraceNotFoundError(f"no spans of trace {wanted} in {places}", trace_id=wanted)
    if len(traces) > 1:
        shown = ", ".join(traces[:_SHOWN_TRACES]) + (", …" if len(traces) > _SHOWN_TRACES else "")
        raise InvalidArgumentError(f"{len(traces)} traces begin with {wanted}: {shown}", field="trace_id")
    return sorted(found.values(), key=_in_time)


def _in_time(span: SpanRecord) -> tuple[int, int, str]:
    return (
        span.start_ns,
        -span.end_ns,
        span.span_id,
    )  # of two that start together, the longer is the outer one


def span_tree(spans: Iterable[SpanRecord]) -> list[SpanNode]:
    """The spans as trees; a span whose parent is not among them is a root."""
    ordered = sorted(spans, key=_in_time)
    known = {span.span_id for span in ordered}
    children: dict[str, list[SpanRecord]] = {}
    for span in ordered:
        children.setdefault(span.parent_id if span.parent_id in known else "", []).append(span)

    def node(span: SpanRecord) -> SpanNode:
        return SpanNode(span, tuple(node(child) for child in children.get(span.span_id, ())))

    return [node(root) for root in children.get("", ())]


def tree_json(nodes: Sequence[SpanNode]) -> list[dict[str, Any]]:
    """The trees for programs; ``start_ms`` counts from the earliest span."""
    origin = min((node.span.start_ns for node, _ in _walk(nodes)), default=0)
    return [_node_json(node, origin) for node in nodes]


def render_timeline(spans: Sequence[SpanRecord], width: int) -> RenderableType:
    """The trace as a picture for a terminal: an indented tree with a bar per span on one axis of time.

    Args:
        spans: of one trace, at least one.
        width: columns to use.
    """
    start = min(span.start_ns for span in spans)
    length = max(span.end_ns for span in spans) - start
    rows = [_row(node.span, depth) for node, depth in _walk(span_tree(spans))]
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
    return Group(_heading(spans, length), table, *_notes(spans))


def _row(span: SpanRecord, depth: int) -> tuple[tuple[str, str, str], SpanRecord]:
    name, place = _printable("  " * depth + span.name), _printable(f"{span.host}/{span.service}")
    return (name, place, f"{span.duration_ms:,.1f}"), span


def _heading(spans: Sequence[SpanRecord], length_ns: int) -> Text:
    failed = sum(span.failed for span in spans)
    counts = f"{len(spans)} spans" + (f", {failed} failed" if failed else "")
    return Text(f"trace {spans[0].trace_id}   {length_ns / _NS_PER_MS:,.1f} ms   {counts}")


def _notes(spans: Sequence[SpanRecord]) -> list[Text]:
    notes = [f"failed: {_printable(span.name)}: {_printable(span.message)}" for span in spans if span.message]
    if len({span.host for span in spans}) > 1:
        notes.append(
            "Bars stand where their own host's clock puts them: compare lengths, not positions, across hosts."
        )
    return [Text(note, style="dim") for note in notes]


def _bar(span: SpanRecord, start: int, length: int, columns: int) -> str:
    first = min(columns - 1, (span.start_ns - start) * columns // max(1, length))
    size = round((span.end_ns - span.start_ns) * columns / max(1, length))
    return " " * first + ("█" * min(size, columns - first) if size >= 1 else "▏")


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _walk(nodes: Iterable[SpanNode], depth: int = 0) -> Iterator[tuple[SpanNode, int]]:
    for node in nodes:
        yield node, depth
        yield from _walk(node.children, depth + 1)


def _node_json(node: SpanNode, origin: int) -> dict[str, Any]:
    span = node.span
    return {
        "name": span.name,
        "service": span.service,
        "host": span.host,
        "start_ms": round((span.start_ns - origin) / _NS_PER_MS, 3),
        "duration_ms": span.duration_ms,
        "failed": span.failed,
        "children": [_node_json(child, origin) for child in node.children],
    }


def _files(directories: Iterable[Path]) -> list[Path]:
    return sorted({path for directory in directories for path in directory.glob("*.jsonl")})


def _spans_of(path: Path, wanted: str) -> Iterator[SpanRecord]:
    try:
        with path.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if wanted in line:
                    yield from _spans_of_line(line, wanted)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", field="dir") from error


def _spans_of_line(line: str, wanted: str) -> Iterator[SpanRecord]:
    try:
        batches = json.loads(line)["resourceSpans"]
        for batch in batches:
            resource = _attributes(batch["resource"])
            for scope in batch["scopeSpans"]:
                for span in scope["spans"]:
                    if span["traceId"].startswith(wanted):
                        yield _record(span, resource)
    except (ValueError, LookupError, TypeError, AttributeError):
        return  # not a whole line of a span file: its writer was killed in the middle of it


def _record(span: dict[str, Any], resource: dict[str, str]) -> SpanRecord:
    status = span.get("status", {})
    return SpanRecord(
        trace_id=span["traceId"],
        span_id=span["spanId"],
        parent_id=span.get("parentSpanId", ""),
        name=span["name"],
        service=resource.get(semconv.SERVICE_NAME, "?"),
        host=resource.get(semconv.HOST_NAME, "?"),
        start_ns=int(span["startTimeUnixNano"]),
        end_ns=int(span["endTimeUnixNano"]),
        failed=status.get("code") == _STATUS_ERROR,
        message=status.get("message", ""),
    )


def _attributes(resource: dict[str, Any]) -> dict[str, str]:
    return {
        item["key"]: str(next(iter(item["value"].values()), "")) for item in resource.get("attributes", ())
    }
