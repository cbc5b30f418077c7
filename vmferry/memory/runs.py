"""Ordered sets of pages, kept as runs.

Promise: a set costs sixteen bytes for each run of adjacent pages and nothing for each page, so that even a
4 GiB region whose every second page was written needs about 8 MiB. Pages are numbered within ONE region.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator
from heapq import merge
from typing import Final

PAGE_SIZE: Final = 4096


class PageRuns:
    """An ordered set of pages as runs ``(first_page, count)``: ascending, never empty, never adjacent."""

    __slots__ = ("_flat", "_pages")

    def __init__(self, runs: Iterable[tuple[int, int]] = ()) -> None:
        self._flat = array("Q")
        self._pages = 0
        self.extend(runs)

    @classmethod
    def whole(cls, page_count: int) -> PageRuns:
        """All pages of a region of ``page_count`` pages."""
        return cls([(0, page_count)] if page_count else [])

    def add(self, first_page: int, count: int) -> None:
        """Append a run that lies behind everything added so far; a run that touches the last one joins it."""
        self.extend([(first_page, count)])

    def extend(self, runs: Iterable[tuple[int, int]]) -> None:
        """Append ascending runs.

        Raises:
            ValueError: a run is empty, or begins before the end of the one before it.
        """
        flat = self._flat
        end = flat[-2] + flat[-1] if flat else -1
        floor = max(end, 0)
        for first, count in runs:
            if count < 1 or first < floor:
                raise ValueError(f"run of {count} pages at {first} is empty or not behind page {floor}")
            if first == end:
                flat[-1] += count
            else:
                flat.append(first)
                flat.append(count)
            end = floor = first + count
            self._pages += count

    @property
    def page_count(self) -> int:
        """How many pages are in the set."""
        return self._pages

    def __iter__(self) -> Iterator[tuple[int, int]]:
        flat = iter(self._flat)
        return zip(flat, flat, strict=True)

    def __len__(self) -> int:
        return len(self._flat) // 2

    def __bool__(self) -> bool:
        return bool(self._flat)

    def __eq__(self, other: object) -> bool:
        return self._flat == other._flat if isinstance(other, PageRuns) else NotImplemented

    __hash__ = None  # type: ignore[assignment]  # a set that grows has no hash

    def __repr__(self) -> str:
        shown = ", ".join(f"{first}+{count}" for _, (first, count) in zip(range(8), self, strict=False))
        return (
            f"<PageRuns {self._pages} pages in {len(self)} runs: {shown}{', ...' if len(self) > 8 else ''}>"  # noqa: PLR2004 (how many are shown)
        )

    def union(self, other: PageRuns) -> PageRuns:
        """The pages that are in either set."""
        if not self or not other:
            return PageRuns(self or other)
        return PageRuns(_without_overlap(merge(self, other)))

    def intersection(self, other: PageRuns) -> PageRuns:
        """The pages that are in both sets."""
        return PageRuns(_overlaps(iter(self), iter(other)))

    def difference(self, other: PageRuns) -> PageRuns:
        """The pages that are in this set and not in the other."""
        return PageRuns(_remainders(self, iter(other)))

    def batches(self, max_pages: int | Callable[[], int]) -> Iterator[list[tuple[int, int]]]:
        """The runs in order, in groups of at most ``max_pages`` pages each; a long run is cut.

        Args:
            max_pages: a number, or what is asked for one before each group.
        """
        limit = max_pages if callable(max_pages) else lambda: max_pages
        if limit() < 1:
            raise ValueError(f"a batch of {limit()} pages can hold nothing")
        batch: list[tuple[int, int]] = []
        room = limit()
        for run_first, run_count in self:
            first, count = run_first, run_count
            while count:
                taken = min(count, room)
                batch.append((first, taken))
                first, count, room = first + taken, count - taken, room - taken
                if not room:
                    yield batch
                    batch, room = [], limit()
        if batch:
            yield batch


def _without_overlap(runs: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Cut from each run what earlier ones covered; ``runs`` ascend by first page."""
    covered = 0
    for first, count in runs:
        start, end = max(first, covered), first + count
        if start < end:
            yield start, end - start
            covered = end


def _remainders(
    runs: Iterable[tuple[int, int]], holes: Iterator[tuple[int, int]]
) -> Iterator[tuple[int, int]]:
    """What is left of ascending runs when ascending ``holes`` are cut out."""
    hole_first, hole_count = next(holes, (0, 0))
    for first, count in runs:
        start, end = first, first + count
        while hole_count and hole_first < end:
            if hole_first > start:
                yield start, hole_first - start
            start = max(start, min(hole_first + hole_count, end))
            if hole_first + hole_count > end:
                break
            hole_first, hole_count = next(holes, (0, 0))
        if start < end:
            yield start, end - start


def _overlaps(left: Iterator[tuple[int, int]], right: Iterator[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """What two ascending sequences of runs have in common."""
    nothing = (0, 0)
    (left_first, left_count), (right_first, right_count) = next(left, nothing), next(right, nothing)
    while left_count and right_count:
        left_end, right_end = left_first + left_count, right_first + right_count
        first, end = max(left_first, right_first), min(left_end, right_end)
        if first < end:
            yield first, end - first
        if left_end <= right_end:
            left_first, left_count = next(left, nothing)
        else:
            right_first, right_count = next(right, nothing)
