"""What is read from a guest's serial port: ticks with their times, lines with their numbers."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vmferry.bench.compare import slow_down
from vmferry.bench.ticks import Piece, Signs, last_line, read

MS = 1_000_000


def ticking(*times_ms: int, port: int = 0) -> list[Piece]:
    """A port at which a tick arrives at each of these times."""
    return [Piece(port, at * MS, ".") for at in times_ms]


def test_the_longest_gap_counts_if_it_reaches_into_the_span() -> None:
    """A pause that began before the span, or ends behind it, is one of it; one elsewhere is not."""
    signs = read(ticking(0, 100, 101, 102, 140, 141, 500))
    assert signs.longest_gap_ms(101 * MS, 141 * MS) == 38.0
    assert signs.longest_gap_ms(50 * MS, 101 * MS) == 100.0
    assert signs.longest_gap_ms(141 * MS, 200 * MS) == 359.0
    assert signs.longest_gap_ms(600 * MS, 700 * MS) is None


def test_the_switch_is_between_the_ports() -> None:
    """The gap of the switch is from the last tick here to the first there, whatever gaps there were besides."""
    signs = read([*ticking(0, 50, 60), *ticking(75, 76, 200, port=1)])
    assert signs.switch_gap_ms() == 15.0
    assert signs.longest_gap_ms(0, 100 * MS) == 124.0


def test_a_guest_that_stayed_has_no_switch() -> None:
    """Where all ticks came from one port there was none."""
    assert read(ticking(0, 1, 2)).switch_gap_ms() is None


@given(st.integers(0, 60), st.integers(0, 60))
def test_a_line_counts_however_it_was_cut(first: int, second: int) -> None:
    """A line and its ticks are the same in whatever pieces they arrived, and its time is that of its end."""
    text = "..\nT n=150 w=1234 b=0 a=1 d=1\n...\nT n=200 w=5"
    cuts = sorted([min(first, len(text)), min(second, len(text))])
    parts = [text[: cuts[0]], text[cuts[0] : cuts[1]], text[cuts[1] :]]
    signs = read([Piece(0, number, part) for number, part in enumerate(parts)])
    (line,) = signs.lines
    assert (line.ticks, line.pages_written, line.bad, line.asked, line.done) == (150, 1234, 0, 1, 1)
    end = text.index("\n", 3)
    assert line.at_ns == next(number for number in range(3) if len("".join(parts[: number + 1])) > end)
    assert len(signs.ticks) == 5


def test_the_last_line_is_a_whole_one() -> None:
    """What has not arrived as a whole is not believed."""
    line = last_line("\nT n=50 w=1 b=0 a=0 d=0\n....\nT n=100 w=2 b=")
    assert line is not None
    assert line.ticks == 50
    assert last_line("...") is None


def lines(*told: tuple[int, int]) -> Signs:
    """Lines at times in milliseconds, with the pages written."""
    return read([Piece(0, at * MS, f"T n=1 w={pages} b=0 a=0 d=0\n") for at, pages in told])


def test_the_rate_of_writing_is_taken_between_lines() -> None:
    """Ends of a span that lie between two lines are interpolated; beyond the lines nothing is known."""
    signs = lines((0, 0), (100, 100), (200, 100), (300, 200))
    assert signs.write_rate(50 * MS, 150 * MS) == 500.0
    assert signs.write_rate(50 * MS, 400 * MS) is None


def test_a_guest_that_writes_half_as_fast_is_slowed_down_by_half() -> None:
    """Its work is its writing, or its ticks if it does not write."""
    writing = lines((0, 0), (100, 1000), (200, 1500), (300, 2000))
    assert slow_down(writing, (10 * MS, 100 * MS), (100 * MS, 290 * MS), writes=True) == 0.5
    ticks = read(ticking(*range(100), *range(100, 200, 4)))
    assert slow_down(ticks, (0, 100 * MS), (100 * MS, 200 * MS), writes=False) == 0.75
