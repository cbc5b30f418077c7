"""Memory files on hugetlbfs: written, read and reserved as others are; how much of it there is."""

from __future__ import annotations

import mmap
import random
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hugepages import huge_folder
from vmferry.errors import ConfigError, InsufficientMemoryError
from vmferry.memory.hugepages import HUGE_PAGE_BYTES, available_bytes, check_folder, path_page_bytes
from vmferry.memory.regions import RamFile
from vmferry.memory.runs import PAGE_SIZE, PageRuns

HUGE_PAGES = 8
SIZE = HUGE_PAGES * HUGE_PAGE_BYTES
IN_ONE = HUGE_PAGE_BYTES // PAGE_SIZE


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A hugetlbfs with room for one file, and nothing more."""
    with huge_folder(SIZE >> 20) as mounted:
        yield mounted


@pytest.fixture
def ram(folder: Path) -> Iterator[RamFile]:
    """A file there."""
    path = folder / "machine.ram"
    try:
        with RamFile.create(path, SIZE) as file:
            yield file
    finally:
        path.unlink()


def test_a_file_system_is_known_for_what_it_is(folder: Path, tmp_path: Path) -> None:
    """Only hugetlbfs counts, also for a folder that does not exist yet; others are refused with what to type."""
    assert path_page_bytes(folder) == HUGE_PAGE_BYTES
    assert path_page_bytes(tmp_path) == path_page_bytes(Path("/dev/shm")) == 0
    check_folder(folder / "not" / "yet")
    with pytest.raises(ConfigError) as caught:
        check_folder(tmp_path / "not" / "yet")
    assert caught.value.field == "huge_dir"
    assert "mount -t hugetlbfs" in caught.value.instance_remedy


def test_random_writes_read_back(ram: RamFile) -> None:
    """Runs within, across and beside the edges of huge pages hold what was written, and nothing else changed."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    source = random.Random(seed)
    shadow = bytearray(SIZE)
    edges = [(IN_ONE - 1, 2), (IN_ONE, 1), (3 * IN_ONE - 5, IN_ONE + 10), (ram.page_count - 1, 1)]
    tries = [[edge] for edge in edges] + [
        [(first, source.randrange(1, 4)) for first in range(at, ram.page_count - 4, 97)]
        for at in source.sample(range(97), 8)
    ]
    for runs in tries:
        data = source.randbytes(sum(count for _, count in runs) * PAGE_SIZE)
        ram.write_pages(runs, memoryview(data))
        position = 0
        for first, count in runs:
            end = position + count * PAGE_SIZE
            shadow[first * PAGE_SIZE : (first + count) * PAGE_SIZE] = data[position:end]
            position = end
    content = bytearray(SIZE)
    assert ram.read_pages([(0, ram.page_count)], content) == SIZE
    assert content == shadow


def test_reading_takes_no_memory_and_everything_is_data(ram: RamFile, folder: Path) -> None:
    """Holes cannot be told there, so all pages count as data; reading them leaves them holes."""
    assert ram.data_runs() == PageRuns.whole(ram.page_count)
    content = bytearray(b"x" * SIZE)
    ram.read_pages([(0, ram.page_count)], content)
    assert not any(content)
    assert ram.allocated_bytes == 0
    assert available_bytes(folder) == SIZE


def test_what_is_reserved_is_taken_and_what_is_not_there_is_refused(ram: RamFile, folder: Path) -> None:
    """The file that there is room for takes it all; the next one is told so, and no signal ends the process."""
    ram.reserve(0, SIZE)
    assert ram.allocated_bytes == SIZE
    assert available_bytes(folder) == 0
    path = folder / "other.ram"
    try:
        with RamFile.create(path, SIZE) as other:
            with pytest.raises(InsufficientMemoryError):
                other.reserve(0, HUGE_PAGE_BYTES)
            with pytest.raises(InsufficientMemoryError):
                other.write_pages([(5, 1)], memoryview(bytes(PAGE_SIZE)))
            assert other.allocated_bytes == 0
    finally:
        path.unlink()
    ram.write_pages([(0, ram.page_count)], memoryview(b"y" * SIZE))


def test_writing_maps_one_huge_page_at_a_time(ram: RamFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """However much is written: the memory of a service does not grow with the machine."""
    windows: list[mmap.mmap] = []
    real = mmap.mmap

    def recorded(fd: int, length: int, *, offset: int) -> mmap.mmap:
        assert all(window.closed for window in windows)
        assert length == HUGE_PAGE_BYTES
        windows.append(real(fd, length, offset=offset))
        return windows[-1]

    monkeypatch.setattr(mmap, "mmap", recorded)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for batch in PageRuns.whole(ram.page_count).batches(256):
        ram.write_pages(batch, memoryview(bytes(256 * PAGE_SIZE)))
    assert len(windows) >= HUGE_PAGES
    assert all(window.closed for window in windows)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 8 << 10
