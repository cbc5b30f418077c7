"""The table of page digests, against a naive one."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_128, xxh3_128_digest

from vmferry.bench.usage import own_memory_kib
from vmferry.memory.digest import DIGEST_SIZE, ZERO_PAGE_DIGEST, PageTable, digest_pages
from vmferry.memory.runs import PAGE_SIZE, PageRuns
from vmferry.memory.shelf import Shelf

PAGES = 40
CONTENTS = st.dictionaries(
    st.integers(min_value=0, max_value=PAGES - 1), st.integers(min_value=0, max_value=3)
)


def page_of(value: int) -> bytes:
    return bytes(PAGE_SIZE - 1) + bytes([value])


def buffer_of(contents: dict[int, int]) -> tuple[list[tuple[int, int]], memoryview]:
    """The runs of ``contents`` and their pages one behind the other."""
    runs = PageRuns((page, 1) for page in sorted(contents))
    return list(runs), memoryview(b"".join(page_of(contents[page]) for page in sorted(contents)))


@given(CONTENTS)
def test_a_noted_page_has_its_own_digest_and_the_others_are_zero(contents: dict[int, int]) -> None:
    """Each digest is at its page's place, whatever the runs are."""
    table = PageTable(PAGES)
    table.note_pages(*buffer_of(contents))
    for page in range(PAGES):
        assert table.get(page) == xxh3_128_digest(page_of(contents.get(page, 0)))
    naive = b"".join(xxh3_128_digest(page_of(contents.get(page, 0))) for page in range(PAGES))
    assert table.root() == xxh3_128_digest(naive)


@given(CONTENTS)
def test_splitting_loses_no_page_and_sends_no_zero_page(contents: dict[int, int]) -> None:
    """Zero pages and data pages are told apart, and the data is the data pages in order."""
    table, expected = PageTable(PAGES), PageTable(PAGES)
    runs, buffer = buffer_of(contents)
    expected.note_pages(runs, buffer)
    split = table.scan_pages(runs, buffer, digest_pages(buffer))
    assert PageRuns(split.zero_runs) == PageRuns((page, 1) for page in sorted(contents) if not contents[page])
    assert PageRuns(split.data_runs) == PageRuns((page, 1) for page in sorted(contents) if contents[page])
    assert bytes(split.data) == b"".join(
        page_of(contents[page]) for page in sorted(contents) if contents[page]
    )
    assert table.root() == expected.root()


def test_pages_without_zeros_are_not_copied() -> None:
    """In the common case the data is the caller's own buffer."""
    runs, buffer = buffer_of({1: 1, 2: 2, 9: 3})
    assert PageTable(PAGES).scan_pages(runs, buffer, digest_pages(buffer)).data is buffer


def test_a_page_with_the_digest_of_zero_but_another_content_is_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """A collision with the digest of the zero page loses no data: bytes decide."""
    monkeypatch.setattr("vmferry.memory.digest.xxh3_128_digest", lambda _: ZERO_PAGE_DIGEST)
    runs, buffer = buffer_of({3: 0, 4: 1})
    split = PageTable(PAGES).scan_pages(runs, buffer, digest_pages(buffer))
    assert (split.zero_runs, split.data_runs, bytes(split.data)) == ([(3, 1)], [(4, 1)], page_of(1))


@given(CONTENTS, CONTENTS)
def test_differing_names_exactly_the_changed_pages(before: dict[int, int], after: dict[int, int]) -> None:
    """Compared with what was noted, a page differs if and only if its content does."""
    table = PageTable(PAGES)
    table.note_pages(*buffer_of(before))
    runs, buffer = buffer_of(after)
    changed = [page for page in sorted(after) if after[page] != before.get(page, 0)]
    assert list(table.differing(runs, digest_pages(buffer))) == [(page, 1) for page in changed]


@given(st.lists(st.tuples(st.integers(0, 20_000), st.integers(1, 9000), st.integers(0, 2)), max_size=12))
def test_a_table_in_parts_is_as_one_in_a_piece(notes: list[tuple[int, int, int]]) -> None:
    """Whatever is noted over the borders of parts: the root is the digest of all digests, and each is found again."""
    pages = 20_000 + 9000
    table, whole = PageTable(pages), bytearray(ZERO_PAGE_DIGEST) * pages
    for first, count, content in notes:
        digests = (ZERO_PAGE_DIGEST if not content else bytes([content]) * DIGEST_SIZE) * count
        table.note_digests([(first, count)], digests)
        whole[first * DIGEST_SIZE : (first + count) * DIGEST_SIZE] = digests
    assert table.root() == xxh3_128_digest(whole)
    assert not list(table.differing([(0, pages)], bytes(whole)))
    assert table.get(4096) == whole[4096 * DIGEST_SIZE : 4097 * DIGEST_SIZE]


def test_a_table_costs_what_was_noted() -> None:
    """A region of a TiB in which little is anything but zero; also where zeros are noted."""
    before = own_memory_kib(os.getpid())
    table = PageTable(2**28)
    table.note_zero([(2**27, 1024)])
    table.note_digests([(2**26, 1)], bytes(DIGEST_SIZE))
    assert own_memory_kib(os.getpid()) - before < 16 * 1024
    assert table.get(2**26) == bytes(DIGEST_SIZE)
    assert table.get(2**26 + 1) == ZERO_PAGE_DIGEST


KEPT_PAGES = 192 * 4096
"""Pages whose digests are kept in memory where there is a shelf for the others: those of 3 GiB."""


def test_a_table_of_a_large_machine_takes_little_memory(tmp_path: Path) -> None:
    """64 GiB that are full: all digests are found again, also those that changed, and the root is of all of them."""
    before = own_memory_kib(os.getpid())
    pages, step = 2**24, 4096
    table, expected = PageTable(pages, Shelf(tmp_path)), xxh3_128()
    for page in range(0, pages, step):
        table.note_digests([(page, step)], page.to_bytes(DIGEST_SIZE) * step)
    for page in range(0, pages, step):
        changed = b"c" * DIGEST_SIZE
        table.note_digests([(page + 7, 1)], changed)
        expected.update(page.to_bytes(DIGEST_SIZE) * 7 + changed + page.to_bytes(DIGEST_SIZE) * (step - 8))
    assert table.root() == expected.digest()
    assert own_memory_kib(os.getpid()) - before < 32 * 1024
    assert list(tmp_path.iterdir()) == []


@given(
    st.lists(
        st.tuples(st.integers(-9000, 9000), st.integers(1, 9000), st.integers(0, 2)), min_size=1, max_size=6
    )
)
def test_a_table_that_is_partly_on_a_shelf_is_as_one_in_memory(
    tmp_path_factory: pytest.TempPathFactory, notes: list[tuple[int, int, int]]
) -> None:
    """Whatever is noted around the place where memory ends."""
    pages = KEPT_PAGES + 20_000
    table, other = PageTable(pages, Shelf(tmp_path_factory.getbasetemp())), PageTable(pages)
    for first in range(0, KEPT_PAGES, 4096):  # as much as is kept in memory
        for each in (table, other):
            each.note_digests([(first, 1)], b"k" * DIGEST_SIZE)
    for offset, count, content in notes:
        digests = (ZERO_PAGE_DIGEST if not content else bytes([content]) * DIGEST_SIZE) * count
        for each in (table, other):
            each.note_digests([(KEPT_PAGES + offset, count)], digests)
    assert table.root() == other.root()
    for offset, count, _ in notes:
        first = KEPT_PAGES + offset
        assert [table.get(page) for page in (first, first + count - 1)] == [
            other.get(page) for page in (first, first + count - 1)
        ]
        assert not list(table.differing([(first, 1)], other.get(first)))


def test_a_shelf_without_room_costs_memory_and_nothing_else(tmp_path: Path) -> None:
    """It says so once; all digests are there."""
    told: list[OSError] = []
    pages = KEPT_PAGES + 3 * 4096
    table, other = PageTable(pages, Shelf(tmp_path / "missing", told.append)), PageTable(pages)
    for page in range(0, pages, 4096):
        for each in (table, other):
            each.note_digests([(page, 1)], b"x" * DIGEST_SIZE)
    assert [type(error) for error in told] == [FileNotFoundError]
    assert table.root() == other.root()


def test_threads_note_pages_of_one_part_on_a_shelf(tmp_path: Path) -> None:
    """As in memory."""
    for _ in range(20):
        table, gate = PageTable(KEPT_PAGES + 4096, Shelf(tmp_path)), threading.Barrier(4)
        for page in range(0, KEPT_PAGES, 4096):
            table.note_digests([(page, 1)], b"k" * DIGEST_SIZE)

        def note(number: int, table: PageTable = table, gate: threading.Barrier = gate) -> None:
            gate.wait()
            table.note_digests([(KEPT_PAGES + number, 1)], bytes([number + 1]) * DIGEST_SIZE)

        with ThreadPoolExecutor(4) as threads:
            list(threads.map(note, range(4)))
        assert [table.get(KEPT_PAGES + number)[0] for number in range(4)] == [1, 2, 3, 4]


def test_threads_note_pages_of_one_part() -> None:
    """What one notes as the first in a part is not lost because another does so at the same time."""
    for _ in range(50):
        table, gate = PageTable(4096), threading.Barrier(4)

        def note(number: int, table: PageTable = table, gate: threading.Barrier = gate) -> None:
            gate.wait()
            table.note_digests([(number, 1)], bytes([number + 1]) * DIGEST_SIZE)

        with ThreadPoolExecutor(4) as threads:
            list(threads.map(note, range(4)))
        assert [table.get(number)[0] for number in range(4)] == [1, 2, 3, 4]


def test_noting_zero_needs_no_bytes() -> None:
    """Pages noted as zero are as in a new table."""
    table = PageTable(PAGES)
    table.note_pages([(2, 3)], b"x" * 3 * PAGE_SIZE)
    assert table.root() != PageTable(PAGES).root()
    table.note_zero([(2, 3)])
    assert table.root() == PageTable(PAGES).root()


@pytest.mark.parametrize("runs", [[(PAGES, 1)], [(PAGES - 1, 2)], [(-1, 1)], [(0, 2)], [(0, 0), (1, 1)], []])
def test_runs_that_do_not_fit_are_refused_and_change_nothing(runs: list[tuple[int, int]]) -> None:
    """A wrong run must never shift the digests behind it."""
    table = PageTable(PAGES)
    with pytest.raises(ValueError, match=r"run|pages"):
        table.note_pages(runs, b"x" * PAGE_SIZE)
    assert table.root() == PageTable(PAGES).root()


def test_a_single_page_can_be_set_and_read_within_bounds_only() -> None:
    """Set and get refuse what is no page or no digest."""
    table = PageTable(PAGES)
    digest = bytes(range(DIGEST_SIZE))
    table.set(PAGES - 1, digest)
    assert table.get(PAGES - 1) == digest
    for page in (-1, PAGES):
        with pytest.raises(ValueError, match="page"):
            table.get(page)
        with pytest.raises(ValueError, match="page"):
            table.set(page, digest)
    with pytest.raises(ValueError, match="digest"):
        table.set(0, digest[1:])
