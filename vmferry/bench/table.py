"""The comparison as people read it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from rich.table import Table

from vmferry.bench.figures import OURS, RATIOS, Crossing, Spread, of, ratios, spreads

_COLUMNS: Final[tuple[tuple[str, str, Callable[[float], str]], ...]] = (
    ("total s", "total_ms", lambda value: f"{value / 1000:.2f}"),
    ("whole s", "whole_ms", lambda value: f"{value / 1000:.2f}"),
    ("downtime ms", "downtime_ms", lambda value: f"{value:.1f}"),
    ("guest gap ms", "guest_gap_ms", lambda value: f"{value:.1f}"),
    ("wire MB", "wire_bytes", lambda value: f"{value / 1e6:.1f}"),
    ("CPU s", "cpu_s", lambda value: f"{value:.2f}"),
    ("slow-down %", "slow_down", lambda value: f"{value * 100:.0f}"),
)
_RATIO_OF: Final = {figure: name for name, figure in RATIOS.items()}


def make_table(title: str, crossings: Sequence[Crossing], peers: Sequence[str]) -> Table:
    """Medians with their spread, and below each peer's the ratio to ours."""
    table = Table(title=title, title_justify="left")
    table.add_column("")
    table.add_column("right")
    for heading, _, _ in _COLUMNS:
        table.add_column(heading, justify="right")
    ours = of(crossings, OURS)
    for who in (OURS, *peers):
        mine = of(crossings, who)
        found = spreads(mine)
        table.add_row(
            who,
            f"{sum(crossing.counts for crossing in mine)}/{len(mine)}",
            *(_cell(found[figure], shown) for _, figure, shown in _COLUMNS),
        )
        if who != OURS:
            compared = ratios(ours, mine)
            values = [compared.get(_RATIO_OF.get(figure, "")) for _, figure, _ in _COLUMNS]
            if any(values):
                table.add_row("  ÷ ours", "", *(f"{value:.2f}" if value else "" for value in values))
        table.add_section()
    return table


def others(crossings: Sequence[Crossing]) -> list[str]:
    """A sentence for each crossing that counts in no median."""
    return [f"{crossing.who}: {crossing.verdict}" for crossing in crossings if not crossing.counts]


def sentence(crossing: Crossing) -> str:
    """One crossing, as it is told while others are under way."""
    figures = (
        f"total {_figure(crossing.total_ms)} ms, downtime {_figure(crossing.downtime_ms)} ms, "
        f"guest gap {_figure(crossing.guest_gap_ms)} ms, {(crossing.wire_bytes or 0) / 1e6:.1f} MB on the wire"
    )
    return f"  {crossing.who:<22} {crossing.verdict}: {figures}"


def _cell(spread: Spread | None, shown: Callable[[float], str]) -> str:
    if spread is None:
        return "-"
    return f"{shown(spread.median)} ({shown(spread.min)}-{shown(spread.max)})"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
