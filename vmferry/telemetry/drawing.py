"""A trace as a drawing to keep: SVG, or a page of HTML around it.

Promise: the file needs nothing else and runs nothing; whatever stands in a span is text in it; the spans of all hosts
are on one axis, each host in its own colour; the guest's pause is marked; light and dark follow the reader's choice.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from vmferry.telemetry.clocks import Clock, align, estimate_clocks
from vmferry.telemetry.spans import NS_PER_MS, SpanRecord, span_tree, walk
from vmferry.telemetry.timeline import clock_notes

_WIDTH: Final = 1200
_NAMES: Final = 330
"""Room for names, left of the axis."""
_RIGHT: Final = 110
"""Room for durations, right of it."""
_ROW: Final = 22
_TOP: Final = 118
_NOTE: Final = 18
_TICKS: Final = 6
_DOWNTIME: Final = "vmferry.downtime_ms"
_STYLE: Final = """
svg{--page:#fff;--text:#1c2624;--quiet:#5c6966;--line:#e1e5e2;--pause:#f9dedb;--bad:#a8322a;
--h0:#1f6f78;--h1:#b06a12;--h2:#6b4fa0;--h3:#4d6b2f;background:var(--page);
font:13px system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
@media (prefers-color-scheme:dark){svg{--page:#111716;--text:#e4ebe8;--quiet:#9aa8a4;--line:#2a3532;
--pause:#421f1c;--bad:#f0948c;--h0:#6cc3cc;--h1:#e7b75d;--h2:#b9a3e6;--h3:#a3c983}}
text{fill:var(--text)}.quiet{fill:var(--quiet)}.title{font-size:17px;font-weight:600}.line{stroke:var(--line)}
.pause{fill:var(--pause)}.bad,text.bad{fill:var(--bad)}
.h0{fill:var(--h0)}.h1{fill:var(--h1)}.h2{fill:var(--h2)}.h3{fill:var(--h3)}
"""
_PAGE: Final = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
body{{margin:1.5rem;font-family:system-ui,sans-serif}}
@media (prefers-color-scheme:dark){{body{{background:#111716;color:#e4ebe8}}}}
figure{{margin:0;overflow-x:auto}}
table{{border-collapse:collapse;margin-top:2rem;font-size:.85rem}}
th,td{{text-align:left;padding:.2rem .8rem .2rem 0;vertical-align:top}}
td.n{{text-align:right;font-variant-numeric:tabular-nums}}
</style>
</head>
<body>
<figure>{svg}</figure>
<table>
<thead><tr><th>span</th><th>host/service</th><th>start, ms</th><th>took, ms</th><th>says</th></tr></thead>
<tbody>
{rows}
</tbody>
</table>
</body>
</html>
"""


def render_svg(spans: Sequence[SpanRecord]) -> str:
    """The trace as an SVG document.

    Args:
        spans: of one trace, at least one.
    """
    clocks = estimate_clocks(spans)
    return _Drawing(align(spans, clocks), clocks).svg()


def render_html(spans: Sequence[SpanRecord]) -> str:
    """The same within a page, with all that the spans say in a table."""
    clocks = estimate_clocks(spans)
    drawing = _Drawing(align(spans, clocks), clocks)
    title = f"trace {spans[0].trace_id}"
    return _PAGE.format(title=_text(title), svg=drawing.svg(), rows="\n".join(drawing.table()))


def pause_of(spans: Iterable[SpanRecord]) -> tuple[int, int] | None:
    """When the guest was paused, by the source's clock: from its span ``pause`` on, for as long as was measured."""
    by_name = {span.name: span for span in spans}
    begun = by_name.get("pause")
    measured = [span.attributes[_DOWNTIME] for span in by_name.values() if _DOWNTIME in span.attributes]
    if begun is None or not measured:
        return None
    return begun.start_ns, begun.start_ns + round(float(measured[0]) * NS_PER_MS)


class _Drawing:
    def __init__(self, spans: Sequence[SpanRecord], clocks: Mapping[str, Clock]) -> None:
        self._rows = [(node.span, depth) for node, depth in walk(span_tree(spans))]
        self._start = min(span.start_ns for span in spans)
        self._length = max(1, max(span.end_ns for span in spans) - self._start)
        self._hosts = sorted({span.host for span in spans}, key=lambda host: (host not in clocks, host))
        self._notes = [f"failed: {span.name}: {span.message}" for span in spans if span.message]
        self._notes += clock_notes(spans, clocks)
        self._pause = pause_of(spans)

    def svg(self) -> str:
        bottom = _TOP + _ROW * len(self._rows)
        height = bottom + 20 + _NOTE * len(self._notes)
        label = _text(self._heading())
        parts = [
            (
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" '
                f'height="{height}" role="img" aria-label="{label}">'
            ),
            f"<title>{label}</title><style>{_STYLE}</style>",
            f'<text class="title" x="20" y="34">{label}</text>',
            *self._legend(),
            *self._marked(bottom),
            *self._axis(bottom),
            *(self._row(number, span, depth) for number, (span, depth) in enumerate(self._rows)),
            *(
                f'<text class="quiet" x="20" y="{bottom + 24 + _NOTE * number}">{_text(note)}</text>'
                for number, note in enumerate(self._notes)
            ),
            "</svg>",
        ]
        return "\n".join(parts) + "\n"

    def table(self) -> list[str]:
        rows = []
        for span, depth in self._rows:
            says = "; ".join(f"{key} = {value}" for key, value in sorted(span.attributes.items()))
            cells = [
                f"<td>{'&#160;' * 2 * depth}{_text(span.name)}</td>",
                f"<td>{_text(f'{span.host}/{span.service}')}</td>",
                f'<td class="n">{(span.start_ns - self._start) / NS_PER_MS:,.3f}</td>',
                f'<td class="n">{span.duration_ms:,.3f}</td>',
                f"<td>{_text(says)}</td>",
            ]
            rows.append(f"<tr>{''.join(cells)}</tr>")
        return rows

    def _heading(self) -> str:
        return (
            f"trace {self._rows[0][0].trace_id}   {self._length / NS_PER_MS:,.1f} ms, {len(self._rows)} spans"
        )

    def _legend(self) -> list[str]:
        parts, x = [], 20
        for host in self._hosts:
            parts.append(f'<rect class="{self._colour(host)}" x="{x}" y="51" width="12" height="12" rx="3"/>')
            parts.append(f'<text x="{x + 18}" y="62">{_text(f"host {host}")}</text>')
            x += 40 + 8 * len(f"host {host}")
        return parts

    def _axis(self, bottom: int) -> list[str]:
        step = _nice(self._length / NS_PER_MS / _TICKS)
        parts = []
        for number in range(int(self._length / NS_PER_MS / step) + 1):
            x = self._x(self._start + int(number * step * NS_PER_MS))
            parts.append(f'<line class="line" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP - 6}" y2="{bottom}"/>')
            parts.append(
                f'<text class="quiet" x="{x:.1f}" y="{_TOP - 12}" text-anchor="middle">'
                f"{number * step:,.10g} ms</text>"
            )
        return parts

    def _marked(self, bottom: int) -> list[str]:
        """The guest's pause."""
        if self._pause is None:
            return []
        start, end = self._pause
        x, width = self._x(start), max(1.0, self._x(end) - self._x(start))
        says = f"the guest's pause: {(end - start) / NS_PER_MS:,.1f} ms"
        # Near the right edge there is no room for the words on the other side.
        return [
            (
                f'<rect class="pause" x="{x:.1f}" y="{_TOP - 28}" width="{width:.1f}" height="{bottom - _TOP + 28}">'
                f"<title>{_text(says)}</title></rect>"
            ),
            (
                f'<text class="bad" x="{min(x + width, _WIDTH - 8):.1f}" y="{_TOP - 34}" text-anchor="end">'
                f"{_text(says)}</text>"
            ),
        ]

    def _row(self, number: int, span: SpanRecord, depth: int) -> str:
        y = _TOP + _ROW * number
        x = self._x(span.start_ns)
        width = max(1.5, self._x(span.end_ns) - x)
        colour, words = ("bad", ' class="bad"') if span.failed else (self._colour(span.host), "")
        name = span.name.rpartition("/")[2]  # of a call, its method
        says = f"{span.name} on {span.host}/{span.service}: {span.duration_ms:,.3f} ms. {span.message}"
        return (
            f"<g><title>{_text(says.strip())}</title>"
            f'<text{words} x="{20 + 14 * depth}" y="{y + 15}">{_text(name)}</text>'
            f'<rect class="{colour}" x="{x:.1f}" y="{y + 5}" width="{width:.1f}" height="12" rx="2"/>'
            f'<text class="quiet" x="{_WIDTH - 20}" y="{y + 15}" text-anchor="end">'
            f"{span.duration_ms:,.1f} ms</text></g>"
        )

    def _x(self, moment_ns: int) -> float:
        return _NAMES + (moment_ns - self._start) * (_WIDTH - _NAMES - _RIGHT) / self._length

    def _colour(self, host: str) -> str:
        return f"h{self._hosts.index(host) % 4}"


def _nice(value: float) -> float:
    """The next of 1, 2, 5, 10, ... that is not below."""
    power = 10.0 ** math.floor(math.log10(max(value, 1e-6)))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= value * 0.999)


def _text(text: str) -> str:
    return html.escape("".join(letter if letter.isprintable() else "?" for letter in text))
