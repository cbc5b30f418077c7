"""Draws what ``make bench ARGS="... --json"`` printed: total time, downtime and bytes on the wire, side by side.

    pip install --group plots
    python benchmarks/plots.py docs/benchmarks/*.json --into docs/benchmarks

Each bar is a median, with the least and the greatest as its whiskers. A mover none of whose migrations was right has
no bar, and says so.
"""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path
from typing import Any, Final

COLOURS: Final = {
    "ours": "#1b6ca8",
    "qemu": "#b0b0b0",
    "qemu-tls": "#e08e45",
    "qemu-multifd-tls": "#c0504d",
    "qemu-multifd-zstd-tls": "#7f6084",
}
FIGURES: Final = {
    "total": ("total_ms", "total time, s", 1e-3, False),
    "downtime": ("downtime_ms", "downtime as reported, ms", 1.0, True),
    "guest-gap": ("guest_gap_ms", "longest gap seen by the guest, ms", 1.0, True),
    "wire": ("wire_bytes", "bytes on the wire, MB", 1e-6, False),
}


def rows(paths: list[Path]) -> list[dict[str, Any]]:
    """All rows of some documents."""
    found: list[dict[str, Any]] = []
    for path in paths:
        document = json.loads(path.read_text(encoding="utf-8"))
        found += document.get("rows", [document])
    return [row for row in found if row.get("peers")]


def draw(found: list[dict[str, Any]], name: str, into: Path) -> Path:
    """One picture: a group of bars for each row."""
    plot = importlib.import_module("matplotlib.pyplot")
    figure, heading, scale, logarithmic = FIGURES[name]
    canvas, axes = plot.subplots(figsize=(9, 1.1 + 0.28 * sum(len(row["peers"]) + 2 for row in found)))
    at, ticks, seen = 0.0, [], set()
    for row in found:
        movers = {"ours": row["ours"]} | {peer: told["figures"] for peer, told in row["peers"].items()}
        for who, told in movers.items():
            spread = told[figure]
            if spread is None:
                axes.text(0, at, f" {who}: none was right", va="center", fontsize=7)
            else:
                low, middle, high = (spread[key] * scale for key in ("min", "median", "max"))
                label = who if who not in seen else None
                axes.barh(at, middle, color=COLOURS[who], label=label, height=0.85)
                axes.errorbar(middle, at, xerr=[[middle - low], [high - middle]], color="black", lw=0.8)
                axes.text(high, at, f"  {middle:.3g}", va="center", fontsize=7)
                seen.add(who)
            at += 1
        ticks.append((at - len(movers) / 2 - 0.5, f"{row['network']}\n{row['guest']}"))
        at += 0.8
    axes.set_yticks([place for place, _ in ticks], [text for _, text in ticks], fontsize=7)
    axes.invert_yaxis()
    if logarithmic:
        axes.set_xscale("log")
    axes.set_xlabel(heading)
    axes.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=5, frameon=False)
    canvas.tight_layout()
    path = into / f"{name}.png"
    canvas.savefig(path, dpi=90, metadata={"Software": None})
    plot.close(canvas)
    return path


def main() -> None:
    """Draw all of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("documents", type=Path, nargs="+")
    parser.add_argument("--into", type=Path, required=True, help="folder for the pictures")
    asked = parser.parse_args()
    importlib.import_module("matplotlib").use("Agg")
    found = rows(asked.documents)
    for name in FIGURES:
        draw(found, name, asked.into)


if __name__ == "__main__":
    main()
