"""Properties of page runs, against plain Python sets."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmferry.memory.runs import PageRuns

PAGES = st.sets(st.integers(min_value=0, max_value=80))


def runs_of(pages: set[int]) -> PageRuns:
    runs = PageRuns()
    for page in sorted(pages):
        runs.add(page, 1)
    return runs


def pages_of(runs: PageRuns) -> list[int]:
    return [page for first, count in runs for page in range(first, first + count)]


@given(PAGES)
def test_runs_hold_exactly_the_pages_added_in_as_few_runs_as_possible(pages: set[int]) -> None:
    """What goes in comes out, in order; adjacent pages are one run; the counts agree."""
    runs = runs_of(pages)
    assert pages_of(runs) == sorted(pages)
    assert runs.page_count == len(pages)
    assert len(runs) == sum(1 for page in pages if page - 1 not in pages)
    assert bool(runs) == bool(pages)


@given(PAGES, PAGES)
def test_set_operations_agree_with_sets(left: set[int], right: set[int]) -> None:
    """Union, intersection and difference are those of sets, and their results are again in normal form."""
    assert runs_of(left).union(runs_of(right)) == runs_of(left | right)
    assert runs_of(left).intersection(runs_of(right)) == runs_of(left & right)
    assert runs_of(left).difference(runs_of(right)) == runs_of(left - right)


@given(PAGES, st.integers(min_value=1, max_value=30))
def test_batches_are_full_except_the_last_and_lose_nothing(pages: set[int], limit: int) -> None:
    """Batches joined are the runs again; every one but the last has exactly the limit."""
    batches = list(runs_of(pages).batches(limit))
    assert pages_of(PageRuns(run for batch in batches for run in batch)) == sorted(pages)
    sizes = [sum(count for _, count in batch) for batch in batches]
    assert all(size == limit for size in sizes[:-1])
    assert all(0 < size <= limit for size in sizes[-1:])


def test_whole_is_one_run() -> None:
    """A whole region is one run, an empty one none."""
    assert list(PageRuns.whole(7)) == [(0, 7)]
    assert list(PageRuns.whole(0)) == []


@pytest.mark.parametrize("run", [(4, 1), (3, 9), (5, 0), (0, 1)])
def test_a_run_out_of_order_or_empty_is_refused(run: tuple[int, int]) -> None:
    """A caller that adds runs in the wrong order is told, and the set stays as it was."""
    runs = PageRuns([(2, 3)])
    with pytest.raises(ValueError, match="empty or not behind"):
        runs.add(*run)
    assert list(runs) == [(2, 3)]


def test_a_batch_of_no_pages_is_refused() -> None:
    """A limit of zero would never end."""
    with pytest.raises(ValueError, match="can hold nothing"):
        next(PageRuns.whole(3).batches(0))


def test_a_fragmented_region_of_4_gib_stays_below_10_mib() -> None:
    """Every second page of a million costs less than 10 MiB."""
    runs = PageRuns((page, 1) for page in range(0, 1 << 20, 2))
    assert len(runs) == 1 << 19
    assert sys.getsizeof(runs._flat) < 10 << 20


def test_the_representation_stays_short() -> None:
    """A log line shows the beginning only."""
    text = repr(PageRuns((page, 1) for page in range(0, 1000, 2)))
    assert text.startswith("<PageRuns 500 pages in 500 runs: 0+1, 2+1")
    assert len(text) < 120
