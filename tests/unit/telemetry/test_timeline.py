"""The story of a trace is told from its files, whatever order and state they are in."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from vmferry.cli.trace import trace
from vmferry.errors import ConfigError, InvalidArgumentError, TraceNotFoundError
from vmferry.telemetry.spans import SpanNode, SpanRecord, load_spans, span_tree
from vmferry.telemetry.timeline import render_timeline, tree_json

TRACE = "0af7651916cd43dd8448eb211c80319c"
OTHER = "0af7ffffffffffffffffffffffffffff"
MS = 1_000_000


def _span(
    name: str, parent: str, start: int, end: int, *, host: str = "a", failed: str = "", trace_id: str = TRACE
) -> SpanRecord:
    service = "source" if host == "a" else "dest"
    return SpanRecord(
        trace_id,
        f"id-{name}",
        parent and f"id-{parent}",
        name,
        service,
        host,
        start * MS,
        end * MS,
        bool(failed),
        failed,
    )


def _line(span: SpanRecord) -> str:
    """The span as one line of a span file."""
    attributes = [
        {"key": "service.name", "value": {"stringValue": span.service}},
        {"key": "host.name", "value": {"stringValue": span.host}},
    ]
    inner: dict[str, Any] = {
        "traceId": span.trace_id,
        "spanId": span.span_id,
        "name": span.name,
        "startTimeUnixNano": str(span.start_ns),
        "endTimeUnixNano": str(span.end_ns),
        "status": {"code": 2, "message": span.message} if span.failed else {},
    }
    if span.parent_id:
        inner["parentSpanId"] = span.parent_id
    batch = {"resource": {"attributes": attributes}, "scopeSpans": [{"spans": [inner]}]}
    return json.dumps({"resourceSpans": [batch]}) + "\n"


STORY = [
    _span("migrate", "", 1000, 1100),
    _span("precopy", "migrate", 1010, 1060),
    _span("round 1", "precopy", 1010, 1050),
    _span("round 2", "precopy", 1050, 1060),
    _span("switchover", "migrate", 1060, 1080),
    _span("load", "switchover", 1065, 1075, host="b", failed="the copy did not load"),
]


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Span files of two hosts, in the order in which spans end, with torn and foreign lines between them."""
    for host in "ab":
        (tmp_path / host).mkdir()
        own = sorted((span for span in STORY if span.host == host), key=lambda span: span.end_ns)
        half = len(own) // 2
        with (tmp_path / host / "first-1.jsonl").open("w") as file:
            file.writelines(map(_line, own[:half]))
            file.write(f'{{"resourceSpans":[{{"traceId":"{TRACE}\n')
            file.write(f'{{"something":"else {TRACE}"}}\n')
        with (tmp_path / host / "second-2.jsonl").open("w") as file:
            file.writelines(map(_line, own[half:]))
            file.write(_line(own[-1]))
            file.write(_line(_span("foreign", "", 1, 2, trace_id=OTHER)))
            file.write(_line(own[0])[:-20])
    return [tmp_path / "a", tmp_path / "b"]


def _names(nodes: list[SpanNode] | tuple[SpanNode, ...]) -> list[Any]:
    return [[node.span.name, *_names(node.children)] for node in nodes]


TREE = [["migrate", ["precopy", ["round 1"], ["round 2"]], ["switchover", ["load"]]]]


def test_spans_of_all_hosts_are_found_once(folders: list[Path]) -> None:
    """Torn lines, other documents, other traces and repeated lines change nothing; the order is that of time."""
    assert load_spans(folders, TRACE) == STORY


@pytest.mark.parametrize("prefix", ["0af7651", TRACE.upper(), f" {TRACE} "])
def test_unambiguous_beginning_is_enough(folders: list[Path], prefix: str) -> None:
    """A trace is found by how its id begins."""
    assert len(load_spans(folders, prefix)) == len(STORY)


def test_ambiguous_beginning_is_refused(folders: list[Path]) -> None:
    """Two traces are never mixed: both are named instead."""
    with pytest.raises(InvalidArgumentError, match=f"{TRACE}, {OTHER}"):
        load_spans(folders, "0af7")


@pytest.mark.parametrize("trace_id", ["", "xyz", "0" * 33, "../../etc"])
def test_what_is_no_id_is_refused(folders: list[Path], trace_id: str) -> None:
    """Only hexadecimal digits are looked for."""
    with pytest.raises(InvalidArgumentError, match="not a trace id"):
        load_spans(folders, trace_id)


def test_unknown_trace_is_not_found(folders: list[Path], tmp_path: Path) -> None:
    """A trace that is nowhere, and folders that do not exist, are told as such."""
    with pytest.raises(TraceNotFoundError, match="ffff"):
        load_spans(folders, "ffff")
    with pytest.raises(TraceNotFoundError, match="nowhere"):
        load_spans([tmp_path / "nowhere"], TRACE)


def test_unreadable_file_is_told(tmp_path: Path) -> None:
    """A span file that cannot be read is an error, not a hole in the story."""
    (tmp_path / "source-1.jsonl").mkdir()
    with pytest.raises(ConfigError, match="source-1"):
        load_spans([tmp_path], TRACE)


@given(st.randoms(use_true_random=False))
def test_tree_does_not_depend_on_the_order_of_spans(shuffler: random.Random) -> None:
    """Children come before their parents in the files; the tree is the same from any order."""
    spans = STORY[:]
    shuffler.shuffle(spans)
    assert _names(span_tree(spans)) == TREE


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 9), st.integers(0, 9)), max_size=30), st.data())
def test_every_span_is_in_the_tree_once(shape: list[tuple[int, int, int]], data: st.DataObject) -> None:
    """Whatever parents are missing, no span is lost or shown twice."""
    spans = [
        _span(str(number), str(parent) if parent < number else "missing", start, start + length)
        for number, (parent, start, length) in enumerate(shape)
    ]
    kept = [span for span in spans if data.draw(st.booleans())]

    def ids(nodes: tuple[SpanNode, ...]) -> list[str]:
        return [name for node in nodes for name in (node.span.span_id, *ids(node.children))]

    assert sorted(ids(tuple(span_tree(kept)))) == sorted(span.span_id for span in kept)


def test_orphan_is_a_root() -> None:
    """A span whose parent was lost with its process stands by itself, with its children."""
    assert _names(span_tree(STORY[1:])) == [["precopy", ["round 1"], ["round 2"]], ["switchover", ["load"]]]


def test_json_counts_from_the_earliest_span() -> None:
    """The document nests as the tree does, in milliseconds."""
    (root,) = tree_json(span_tree(STORY))
    assert (root["name"], root["service"], root["start_ms"], root["duration_ms"]) == (
        "migrate",
        "source",
        0,
        100,
    )
    load = root["children"][1]["children"][0]
    assert (load["name"], load["host"], load["start_ms"], load["duration_ms"]) == ("load", "b", 65, 10)
    assert load["failed"]
    assert tree_json([]) == []


def _drawn(spans: list[SpanRecord], width: int) -> list[str]:
    console = Console(width=width, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(render_timeline(spans, width))
    return capture.get().splitlines()


def test_timeline_draws_each_span_where_it_was() -> None:
    """Every span has one line with its name, place, bar and duration; bars begin and end in proportion."""
    lines = _drawn(STORY, 120)
    assert max(map(len, lines)) <= 120
    assert lines[0].split()[:2] == ["trace", TRACE]
    assert "6 spans, 1 failed" in lines[0]
    rows = {span.name: lines[2 + position] for position, span in enumerate(STORY)}
    for name, row in rows.items():
        assert row.strip().startswith(name)
    assert rows["load"].split()[1] == "b/dest"
    assert rows["migrate"].split()[-1] == "100.0"
    whole, half = rows["migrate"].count("█"), rows["precopy"].count("█")
    assert abs(half * 2 - whole) <= 2
    assert rows["round 1"].rindex("█") <= rows["round 2"].index("█")
    assert any("failed: load: the copy did not load" in line for line in lines)
    assert any("clock" in line for line in lines)


def test_timeline_of_one_host_has_no_warning_about_clocks() -> None:
    """Where there is one clock nothing is said of several."""
    assert not any("clock" in line for line in _drawn(STORY[:3], 100))


def test_names_from_a_file_cannot_command_the_terminal() -> None:
    """Control characters and markup in a span's name are shown, not obeyed."""
    lines = _drawn([_span("\x1b[2Jbad [red]name[/red]", "", 0, 1)], 100)
    assert "?[2Jbad [red]name[/red]" in "\n".join(lines)


@pytest.fixture
def command() -> Any:
    from typer import Typer

    app = Typer()
    app.command()(trace)
    return app


def test_command_prints_one_document(folders: list[Path], command: Any) -> None:
    """``vmferry trace --json`` prints the tree and nothing else."""
    arguments = [TRACE[:8], "--json", "--dir", str(folders[0]), "--dir", str(folders[1])]
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    assert document["trace_id"] == TRACE
    assert document["spans"] == tree_json(span_tree(STORY))
    assert result.stderr == ""


def test_command_draws_the_timeline(folders: list[Path], command: Any) -> None:
    """``vmferry trace`` draws on stdout, without colours where nobody looks."""
    result = CliRunner().invoke(command, [TRACE, "--dir", str(folders[0]), "--dir", str(folders[1])])
    assert result.exit_code == 0
    assert "switchover" in result.stdout
    assert "\x1b" not in result.stdout
