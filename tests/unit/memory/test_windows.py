"""Pages reached through mappings: the same bytes as through system calls, and never more mapped than promised."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmferry.errors import ChunkRejectedError
from vmferry.memory.regions import RamFile
from vmferry.memory.runs import PAGE_SIZE
from vmferry.memory.windows import KEPT, WINDOW_BYTES, Windows

SIZE = 4 * WINDOW_BYTES
PAGES = SIZE // PAGE_SIZE
NEAR_AN_EDGE = WINDOW_BYTES // PAGE_SIZE - 20


@pytest.fixture(scope="module")
def ram() -> Iterator[RamFile]:
    """A file of a few windows, of which all but the last page is taken."""
    fd = os.memfd_create("test-windows")
    os.ftruncate(fd, SIZE)
    with RamFile(fd, Path(f"/proc/self/fd/{fd}"), SIZE) as file:
        file.reserve(0, SIZE - PAGE_SIZE)
        file.map_pages(writable=True)
        yield file


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(1, 45)), min_size=1, max_size=4), st.binary(min_size=1)
)
def test_what_is_put_is_what_memory_holds(ram: RamFile, steps: list[tuple[int, int]], seed: bytes) -> None:
    """Long runs and short ones, over the edge of a window or not: written, shown and read back alike."""
    runs, at = [], NEAR_AN_EDGE
    for gap, count in steps:
        runs.append((at + gap, count))
        at += gap + count
    size = sum(count for _, count in runs) * PAGE_SIZE
    data = (seed * (size // len(seed) + 1))[:size]
    assert b"".join(bytes(piece) for piece in ram.put(runs, memoryview(data))) == data
    back = bytearray(size)
    assert ram.read_pages(runs, back) == size
    assert back == data
    plain = b"".join(os.pread(ram.fileno(), count * PAGE_SIZE, first * PAGE_SIZE) for first, count in runs)
    assert plain == data


def test_memory_that_was_not_taken_is_not_touched_by_a_mapping(ram: RamFile) -> None:
    """A run that reaches beyond what is surely there goes by system calls, which can say that there is no memory."""
    first = PAGES - 32
    list(ram.put([(first, 31)], memoryview(bytes(31 * PAGE_SIZE))))
    before = ram.allocated_bytes
    data = os.urandom(32 * PAGE_SIZE)
    windows, ram._windows = ram._windows, None
    assert b"".join(bytes(piece) for piece in ram.put([(first, 32)], memoryview(data))) == data
    ram._windows = windows
    assert ram.allocated_bytes == before + PAGE_SIZE
    assert not ram._mapped(first * PAGE_SIZE, 33 * PAGE_SIZE)


def test_data_that_does_not_fill_its_runs_is_refused(ram: RamFile) -> None:
    """Before anything is written."""
    with pytest.raises(ChunkRejectedError):
        list(ram.put([(0, 17)], memoryview(bytes(16 * PAGE_SIZE))))


def test_few_windows_stay_mapped() -> None:
    """Whoever walks over a whole file has mapped only what is in use and a few besides; closing unmaps all."""
    fd = os.memfd_create("test-few")
    size = 8 * WINDOW_BYTES + 5 * PAGE_SIZE
    try:
        os.ftruncate(fd, size)
        os.posix_fallocate(fd, 0, size)
        windows = Windows(fd, size, writable=False)
        seen = 0
        for view in windows.views(0, size):
            seen += len(view)
            assert windows.mapped_bytes <= (KEPT + 1) * WINDOW_BYTES
        assert seen == size
        windows.close()
        assert windows.mapped_bytes == 0
    finally:
        os.close(fd)


def test_threads_do_not_take_windows_from_each_other(ram: RamFile) -> None:
    """More threads than windows are kept, each at a place of its own, over and over."""

    def work(number: int) -> bool:
        first = number * (PAGES // 8)
        for turn in range(20):
            data = bytes([number * 20 + turn]) * (64 * PAGE_SIZE)
            if b"".join(bytes(piece) for piece in ram.put([(first, 64)], memoryview(data))) != data:
                return False
        return True

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(work, range(7)))


def test_huge_pages_and_closed_files_have_no_windows() -> None:
    """Unmapping twice does no harm, and a file that is closed has nothing mapped."""
    fd = os.memfd_create("test-closed")
    os.ftruncate(fd, WINDOW_BYTES)
    file = RamFile(fd, Path(f"/proc/self/fd/{fd}"), WINDOW_BYTES)
    file.reserve(0, WINDOW_BYTES)
    file.map_pages(writable=True)
    list(file.put([(0, 64)], memoryview(bytes(64 * PAGE_SIZE))))
    file.unmap_pages()
    file.unmap_pages()
    file.close()
    maps = Path("/proc/self/maps").read_text()
    assert "test-closed" not in maps


def test_looking_at_a_hole_takes_no_memory() -> None:
    """Of a file of which nothing is known to be there, whatever is mapped: holes read as zero and stay holes."""
    fd = os.memfd_create("test-holes")
    os.ftruncate(fd, WINDOW_BYTES)
    with RamFile(fd, Path(f"/proc/self/fd/{fd}"), WINDOW_BYTES) as file:
        file.map_pages(writable=True)
        back = bytearray(b"x") * (64 * PAGE_SIZE)
        file.read_pages([(0, 64)], back)
        assert back == bytes(64 * PAGE_SIZE)
        assert file.allocated_bytes == 0
