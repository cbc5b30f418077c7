"""A trace as a drawing that can be kept and opened anywhere."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from typer import Typer
from typer.testing import CliRunner

from vmferry.cli.trace import trace
from vmferry.errors import InvalidArgumentError
from vmferry.telemetry.drawing import pause_of, render_html, render_svg
from vmferry.telemetry.spans import SpanRecord

MS = 1_000_000
SVG = "{http://www.w3.org/2000/svg}"


def span(
    name: str, start: float, end: float, parent: str = "", host: str = "a", **more: object
) -> SpanRecord:
    """A span in milliseconds."""
    found = SpanRecord(
        "ab" * 16, f"{host}-{name}", parent, name, "s", host, round(start * MS), round(end * MS)
    )
    return replace(found, **more)


STORY = [
    span("migrate", 1000, 1100),
    span("vmferry.v1.DestinationService/Begin", 1010, 1030, "a-migrate"),
    span(
        "vmferry.v1.DestinationService/Begin", 6012, 6028, "a-vmferry.v1.DestinationService/Begin", host="b"
    ),
    span("pause", 1060, 1062, "a-migrate"),
    span("commit", 1070, 1090, "a-migrate", attributes={"vmferry.downtime_ms": "28.5"}),
    span("load", 6064, 6068, "a-migrate", host="b", failed=True, message="it <did> not & \x1b load"),
]


def bars(svg: str) -> dict[str, tuple[str, float, float]]:
    """Each span's bar: its class, start and width, by what the pointer shows on it."""
    root = ET.fromstring(svg)
    found = {}
    for group in root.iter(f"{SVG}g"):
        title, bar = group.find(f"{SVG}title"), group.find(f"{SVG}rect")
        assert title is not None
        assert bar is not None
        found[str(title.text)] = (bar.attrib["class"], float(bar.attrib["x"]), float(bar.attrib["width"]))
    return found


def test_each_span_has_its_bar_on_one_axis() -> None:
    """Bars are in proportion; those of the other host are shifted by what its clock is ahead, which is said."""
    svg = render_svg(STORY)
    found = bars(svg)
    assert len(found) == len(STORY)
    (migrate,) = [bar for says, bar in found.items() if says.startswith("migrate")]
    (begin,) = [bar for says, bar in found.items() if "Begin on b" in says]
    scale = migrate[2] / 100
    assert begin[1] == pytest.approx(migrate[1] + 12 * scale, abs=0.2)
    assert begin[2] == pytest.approx(16 * scale, abs=0.2)
    assert begin[0] != migrate[0]
    assert "clock of b is 5,000.000 ms ahead of that of a, \N{PLUS-MINUS SIGN} 2.000 ms by 1 calls" in svg


def test_the_pause_is_marked() -> None:
    """From the beginning of the span that paused, as long as was measured, and not longer."""
    assert pause_of(STORY) == (1060 * MS, round(1088.5 * MS))
    assert pause_of(STORY[:3]) is None
    root = ET.fromstring(render_svg(STORY))
    (mark,) = [one for one in root.iter(f"{SVG}rect") if one.attrib["class"] == "pause"]
    (migrate,) = [bar for says, bar in bars(render_svg(STORY)).items() if says.startswith("migrate")]
    assert float(mark.attrib["width"]) == pytest.approx(28.5 * migrate[2] / 100, abs=0.2)
    assert "the guest's pause: 28.5 ms" in "".join(root.itertext())


@pytest.mark.parametrize("render", [render_svg, render_html])
def test_it_needs_nothing_and_runs_nothing(render: object) -> None:
    """No script and no address of anything else is in it, and what spans say is text."""
    assert callable(render)
    text = render(STORY)
    assert "it &lt;did&gt; not &amp; ? load" in text
    for word in ("<script", "onload", "href", "@import", "url("):
        assert word not in text
    assert set(re.findall(r"https?://[^\"' ]+", text)) == {"http://www.w3.org/2000/svg"}
    assert "prefers-color-scheme" in text


def test_the_page_tells_what_spans_say() -> None:
    """HTML has a row for each span with start, length and attributes."""
    text = render_html(STORY)
    assert text.count("<tr>") == 1 + len(STORY)
    assert "vmferry.downtime_ms = 28.5" in text
    assert '<td class="n">12.000</td><td class="n">16.000</td>' in text


def test_command_writes_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``--out`` makes the kind of file its name says, says so, and leaves stdout alone; other kinds are refused."""
    app = Typer()
    app.command()(trace)
    monkeypatch.setattr("vmferry.cli.trace.load_spans", lambda *_: STORY)
    for name, begins in (("t.svg", "<svg"), ("t.html", "<!doctype html>")):
        result = CliRunner().invoke(app, ["ab", "--out", str(tmp_path / name)])
        assert (result.exit_code, result.stdout) == (0, "")
        assert name in result.stderr
        assert (tmp_path / name).read_text(encoding="utf-8").startswith(begins)
    for refused in (tmp_path / "t.png", tmp_path / "nowhere" / "t.svg"):
        result = CliRunner().invoke(app, ["ab", "--out", str(refused)])
        assert isinstance(result.exception, InvalidArgumentError)
        assert result.exception.field == "--out"
        assert not refused.exists()
