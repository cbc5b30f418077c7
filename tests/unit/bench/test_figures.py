"""Medians, spreads and ratios, and which migrations count in them."""

from __future__ import annotations

from dataclasses import replace

from vmferry.bench.figures import Crossing, Spread, document, ratios, spreads
from vmferry.bench.table import make_table, others

RIGHT = Crossing("ours", "completed", guest_ok=True, total_ms=100.0, whole_ms=200.0, downtime_ms=5.0)


def crossings(who: str, *totals_ms: float) -> list[Crossing]:
    """Migrations that were right."""
    return [replace(RIGHT, who=who, total_ms=total) for total in totals_ms]


def test_a_spread_has_its_median_in_the_middle() -> None:
    """Of an even number of values it is the mean of the two in the middle; unknown ones are left out."""
    assert Spread.of([3.0, None, 1.0, 10.0]) == Spread(1.0, 3.0, 10.0)
    assert Spread.of([1.0, 2.0]) == Spread(1.0, 1.5, 2.0)
    assert Spread.of([None]) is None


def test_only_what_was_right_counts() -> None:
    """A damaged guest, one nobody looked at, and a failure are in no median, and are named."""
    damaged = replace(RIGHT, guest_ok=False, total_ms=1.0)
    unknown = replace(RIGHT, guest_ok=None, total_ms=1.0)
    failed = Crossing("ours", "not converged within 60 s")
    every = [*crossings("ours", 100.0, 120.0), damaged, unknown, failed]
    total = spreads(every)["total_ms"]
    assert total == Spread(100.0, 110.0, 120.0)
    told = document(every, [])["ours"]
    assert (told["runs"], told["right"]) == (5, 2)
    assert told["others"] == ["guest damaged", "guest damaged", "not converged within 60 s"]
    assert others(every) == [f"ours: {verdict}" for verdict in told["others"]]


def test_a_ratio_above_one_speaks_for_us() -> None:
    """It is the peer's median divided by ours; where one of them is missing there is none."""
    found = ratios(crossings("ours", 100.0, 110.0, 300.0), crossings("qemu-tls", 220.0))
    assert found["total"] == 2.0
    assert found["cpu"] is None
    assert ratios([], crossings("qemu-tls", 220.0))["total"] is None


def test_a_peer_that_is_alone_stands_at_the_top() -> None:
    """A row against one peer is one flat document, as the command promises; every migration is in it."""
    every = [*crossings("ours", 100.0), *crossings("qemu-tls", 150.0)]
    alone = document(every, ["qemu-tls"])
    assert alone["peer"]["total_ms"] == {"min": 150.0, "median": 150.0, "max": 150.0}
    assert alone["ratio"]["total"] == 1.5
    assert len(alone["crossings"]) == 2
    several = document(every, ["qemu-tls", "qemu"])
    assert "peer" not in several
    assert several["peers"]["qemu-tls"]["ratio"]["total"] == 1.5
    assert several["peers"]["qemu"]["figures"]["runs"] == 0


def test_the_table_has_a_row_for_each_and_one_for_each_ratio() -> None:
    """A peer of which nothing was right has no ratio."""
    every = [*crossings("ours", 100.0), *crossings("qemu-tls", 150.0), Crossing("qemu", "failed: no")]
    table = make_table("row", every, ["qemu-tls", "qemu"])
    assert list(table.columns[0].cells) == ["ours", "qemu-tls", "  ÷ ours", "qemu"]
    assert list(table.columns[1].cells) == ["1/1", "1/1", "", "0/1"]
    assert list(table.columns[2].cells) == ["0.10 (0.10-0.10)", "0.15 (0.15-0.15)", "1.50", "-"]
