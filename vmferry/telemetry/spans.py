"""The spans of one trace, read back from the span files of any number of hosts.

Promise: given the folders with the span files of the hosts, every span of a trace is found once, whatever order they
were written in; lines that a crash left unfinished are passed over; a span whose parent is nowhere stands by itself.
Times are those of each host's own clock; ``clocks`` compares these.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from vmferry.errors import ConfigError, InvalidArgumentError, TraceNotFoundError
from vmferry.telemetry import semconv

_TRACE_ID = re.compile(r"[0-9a-f]{1,32}")
NS_PER_MS: Final = 1_000_000
_STATUS_ERROR: Final = 2
"""``STATUS_CODE_ERROR`` in OTLP; its JSON has numbers for enums."""
_SHOWN_TRACES: Final = 3


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
    attributes: Mapping[str, str] = field(default_factory=dict, hash=False)
    """What else it says, as text."""

    @property
    def duration_ms(self) -> float:
        """How long it took, to the microsecond."""
        return round((self.end_ns - self.start_ns) / NS_PER_MS, 3)


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


def walk(nodes: Iterable[SpanNode], depth: int = 0) -> Iterator[tuple[SpanNode, int]]:
    """Every span of the trees, with how deep it lies."""
    for node in nodes:
        yield node, depth
        yield from walk(node.children, depth + 1)


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
        attributes=_attributes(span),
    )


def _attributes(holder: dict[str, Any]) -> dict[str, str]:
    return {item["key"]: str(next(iter(item["value"].values()), "")) for item in holder.get("attributes", ())}
