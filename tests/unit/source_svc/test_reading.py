"""A round's pages reach the lanes each once, whichever thread asks; memory that is zero is passed by."""

from __future__ import annotations

import contextvars
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from source_svc.compressing import Compression
from source_svc.reading import PageSupply, Round
from vmferry.memory.digest import PageTable
from vmferry.memory.regions import RamFile
from vmferry.memory.runs import PAGE_SIZE, PageRuns
from vmferry.transfer.compression import RAW
from vmferry.transfer.frames import Batches, BuiltChunk, ChunkBuilder
from vmferry.transfer.traffic import Traffic

PAGES = 256
BATCH = 4


@pytest.fixture
def ram() -> Iterator[RamFile]:
    """Memory that is zero."""
    with (
        tempfile.TemporaryDirectory(prefix="vf-", dir="/dev/shm") as folder,
        RamFile.create(Path(folder) / "ram", PAGES * PAGE_SIZE) as made,
    ):
        yield made


def supply(
    ram: RamFile, traffic: Traffic, *, number: int, builders: int = 1, compare: bool = False
) -> PageSupply:
    """All pages of a machine's memory."""
    runs, table = PageRuns.whole(PAGES), PageTable(PAGES)
    return PageSupply(
        Round(number, Batches(runs, lambda: BATCH), compare),
        [ChunkBuilder(ram, table) for _ in range(builders)],
        Compression([RAW], readers=builders, traffic=lambda: traffic),
        traffic,
        page_count=PAGES,
    )


def pages(chunk: BuiltChunk) -> list[int]:
    """Pages that a chunk has data of."""
    return [
        page
        for run in chunk.frame.head.runs
        for page in range(run.first_page, run.first_page + run.page_count)
    ]


def write(ram: RamFile, page: int) -> None:
    ram.write_pages([(page, 1)], memoryview(b"x" * PAGE_SIZE))


def test_memory_that_is_zero_is_passed_by(ram: RamFile) -> None:
    """A new receiver is told of nothing but the pages that hold something; all that was read is counted."""
    write(ram, 20)
    write(ram, 201)
    traffic = Traffic()
    found = supply(ram, traffic, number=1)
    assert [pages(chunk) for chunk in iter(lambda: found.next(0.0), None)] == [[20], [201]]
    assert (found.left, traffic.zero_pages) == (0, PAGES - 2)


def test_a_later_round_names_what_has_become_zero(ram: RamFile) -> None:
    """The destination holds something there by now."""
    traffic = Traffic()
    found = supply(ram, traffic, number=2)
    chunks = list(iter(lambda: found.next(0.0), None))
    assert sum(run.page_count for chunk in chunks for run in chunk.frame.head.zero_runs) == PAGES
    assert traffic.zero_pages == PAGES
    comparing = supply(ram, traffic, number=3, compare=True)
    assert list(iter(lambda: comparing.next(0.0), None))
    assert traffic.zero_pages == PAGES, "to compare is not to send"


def test_threads_get_each_page_once_and_tell_in_the_round_they_belong_to(ram: RamFile) -> None:
    """As many threads as there are builders ask; what they tell belongs to whoever began the round."""
    for page in range(PAGES):
        write(ram, page)
    where = contextvars.ContextVar("where", default="nowhere")
    seen: set[str] = set()

    class Telling(Traffic):
        def busy_s(self, now: float) -> float:
            seen.add(where.get())
            return super().busy_s(now)

    where.set("the round")
    threads = 4
    found = supply(ram, Telling(), number=1, builders=threads)
    barrier = threading.Barrier(threads)

    def ask() -> list[int]:
        barrier.wait()
        return [page for chunk in iter(lambda: found.next(0.0), None) for page in pages(chunk)]

    with ThreadPoolExecutor(threads) as pool:
        taken = [one.result() for one in [pool.submit(ask) for _ in range(threads)]]
    assert sorted(page for one in taken for page in one) == list(range(PAGES))
    assert seen == {"the round"}


def test_what_was_stopped_makes_nothing_more(ram: RamFile) -> None:
    """However much is left: whoever waits for the lanes to close does not wait for the rest of memory."""
    write(ram, 0)
    write(ram, PAGES - 1)
    found = supply(ram, Traffic(), number=1)
    assert found.next(0.0) is not None
    found.stop()
    assert found.next(0.0) is None
    assert found.left == PAGES - BATCH
