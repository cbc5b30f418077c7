"""RAM files and where a process maps them."""

from __future__ import annotations

import errno
import mmap
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmferry.errors import (
    ChunkRejectedError,
    InsufficientMemoryError,
    MachineDeadError,
    MachineFailedError,
    TrackerUnavailableError,
)
from vmferry.memory import regions
from vmferry.memory.digest import ZERO_PAGE_DIGEST, PageBuffer, digest_pages
from vmferry.memory.regions import RamFile, Region, data_runs, find_mapping
from vmferry.memory.runs import PAGE_SIZE, PageRuns

PAGES = 32
SIZE = PAGES * PAGE_SIZE
PIECE = 128 * 1024
"""What is looked at in one go."""


@pytest.fixture
def ram() -> Iterator[RamFile]:
    """A small RAM file that exists in memory only."""
    fd = os.memfd_create("test-regions")
    os.ftruncate(fd, SIZE)
    with RamFile(fd, Path(f"/proc/self/fd/{fd}"), SIZE) as file:
        yield file


def region_of(ram: RamFile) -> Region:
    return Region("ram0", ram.path, ram.size_bytes)


def page_of(value: int) -> bytes:
    return bytes([value]) * PAGE_SIZE


@settings(max_examples=50)
@given(st.sets(st.integers(min_value=0, max_value=PAGES - 1)))
def test_data_runs_are_the_pages_written(pages: set[int]) -> None:
    """Only pages that were written are data; the rest of a new file is holes."""
    fd = os.memfd_create("test-holes")
    with os.fdopen(fd, "wb"):
        os.ftruncate(fd, SIZE)
        for page in pages:
            os.pwrite(fd, b"x", page * PAGE_SIZE + 17)
        assert data_runs(fd, SIZE) == PageRuns((page, 1) for page in sorted(pages))


def test_data_behind_the_region_is_not_reported(ram: RamFile) -> None:
    """A file that is larger than its region has nothing to tell about the rest."""
    os.ftruncate(ram.fileno(), 2 * SIZE)
    os.pwrite(ram.fileno(), b"x" * 2 * PAGE_SIZE, SIZE - PAGE_SIZE)
    os.pwrite(ram.fileno(), b"x", 2 * SIZE - 1)
    assert list(ram.data_runs()) == [(PAGES - 1, 1)]


def test_pages_come_back_as_written(ram: RamFile) -> None:
    """Pages written by run are read by run, in the order of the runs."""
    data = b"".join(page_of(value) for value in (1, 2, 3, 4))
    ram.write_pages([(2, 3), (9, 1)], memoryview(data))
    buffer = bytearray(6 * PAGE_SIZE)
    assert ram.read_pages([(9, 1), (1, 2), (4, 1)], buffer) == 4 * PAGE_SIZE
    assert buffer == page_of(4) + page_of(0) + page_of(1) + page_of(3) + bytes(2 * PAGE_SIZE)


def put(file: RamFile, runs: list[tuple[int, int]], data: bytes) -> bytes:
    """Put data into memory; the digests of what is read back, a few pages at a time."""
    back = PageBuffer(32)
    return b"".join(map(back.digests, file.put(runs, memoryview(data), back.whole)))


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(1, 90)), min_size=1, max_size=4), st.binary(min_size=1)
)
def test_what_is_put_is_what_memory_holds(steps: list[tuple[int, int]], seed: bytes) -> None:
    """Long runs and short ones: written, digested and read back alike."""
    runs, at = [], 0
    for gap, count in steps:
        runs.append((at + gap, count))
        at += gap + count
    size = sum(count for _, count in runs) * PAGE_SIZE
    data = (seed * (size // len(seed) + 1))[:size]
    fd = os.memfd_create("test-put")
    os.ftruncate(fd, at * PAGE_SIZE)
    with RamFile(fd, Path(f"/proc/self/fd/{fd}"), at * PAGE_SIZE) as file:
        assert put(file, runs, data) == digest_pages(data)
        plain = b"".join(os.pread(fd, count * PAGE_SIZE, first * PAGE_SIZE) for first, count in runs)
        assert plain == data
        assert file.allocated_bytes == size


def test_threads_that_put_at_a_time_see_each_its_own(ram: RamFile) -> None:
    """What is digested is what the thread put, over and over, while others put elsewhere."""

    def work(number: int) -> bool:
        for turn in range(50):
            data = page_of(number * 50 + turn) * 4
            if put(ram, [(number * 4, 4)], data) != digest_pages(data):
                return False
        return True

    with ThreadPoolExecutor(5) as threads:
        assert all(threads.map(work, range(5)))


@given(st.sets(st.integers(min_value=0, max_value=2 * PIECE - 1), max_size=2), st.integers(1, PIECE))
@settings(deadline=None)
def test_memory_is_zero_only_if_every_byte_is(bytes_set: set[int], cut: int) -> None:
    """One bit anywhere in the runs is found, whatever the pieces it is looked at in; outside of them it is not."""
    fd = os.memfd_create("test-zero")
    os.ftruncate(fd, 2 * PIECE)
    with RamFile(fd, Path(f"/proc/self/fd/{fd}"), 2 * PIECE) as file:
        for at in bytes_set:
            os.pwrite(fd, b"\x01", at)
        whole, first = 2 * PIECE // PAGE_SIZE, -(-cut // PAGE_SIZE)
        assert file.is_zero([(0, whole)]) is not bool(bytes_set)
        assert file.is_zero([(0, first)]) is all(at >= first * PAGE_SIZE for at in bytes_set)
        assert file.is_zero([(0, first), (first, whole - first)]) is not bool(bytes_set)


def test_a_write_that_memory_does_not_keep_is_seen(ram: RamFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """The digests are of what can be read back, not of what was to be written."""
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: write(fd, bytes(len(data)), at))
    assert put(ram, [(1, 2)], page_of(7) * 2) == ZERO_PAGE_DIGEST * 2


@given(st.lists(st.integers(0, 255), min_size=1, max_size=5))
def test_a_buffer_that_is_used_again_tells_of_its_present_pages(values: list[int]) -> None:
    """Whatever it held before, the first pages are those that were put there last."""
    buffer, pages = PageBuffer(5), b"".join(map(page_of, values))
    buffer.whole[:] = bytes(range(256)) * (5 * PAGE_SIZE // 256)
    buffer.whole[: len(pages)] = pages
    assert buffer.digests(len(values)) == digest_pages(pages)


def test_looking_at_a_hole_takes_no_memory(ram: RamFile) -> None:
    """Holes read as zero and stay holes."""
    back = bytearray(b"x") * SIZE
    ram.read_pages([(0, PAGES)], back)
    assert back == bytes(SIZE)
    assert ram.allocated_bytes == 0


@pytest.mark.parametrize(
    "runs", [[(PAGES, 1)], [(PAGES - 1, 2)], [(-1, 1)], [(0, 0)], [(0, 1), (1 << 60, 1)]]
)
def test_runs_outside_the_region_are_refused_before_anything_is_written(
    ram: RamFile, runs: list[tuple[int, int]]
) -> None:
    """A hostile chunk changes no byte of the file, and does not make it longer."""
    with pytest.raises(ChunkRejectedError):
        ram.write_pages(runs, memoryview(bytes(PAGE_SIZE * 2)))
    with pytest.raises(ChunkRejectedError):
        ram.read_pages(runs, bytearray(2 * PAGE_SIZE))
    assert ram.allocated_bytes == 0
    assert os.fstat(ram.fileno()).st_size == SIZE


@pytest.mark.parametrize("size", [PAGE_SIZE, 2 * PAGE_SIZE - 1, 3 * PAGE_SIZE])
def test_data_that_does_not_fit_its_runs_is_refused(ram: RamFile, size: int) -> None:
    """Too few and too many bytes for the runs are both refused, and nothing is written."""
    with pytest.raises(ChunkRejectedError):
        ram.write_pages([(0, 2)], memoryview(bytes(size)))
    with pytest.raises(ChunkRejectedError):
        put(ram, [(0, 2)], bytes(size))
    assert ram.allocated_bytes == 0


def test_a_punched_page_is_zero_and_costs_nothing(ram: RamFile) -> None:
    """Punching makes pages zero, gives their memory back and keeps the size."""
    ram.write_pages([(0, 4)], memoryview(page_of(9) * 4))
    ram.punch(1, 2)
    assert list(ram.data_runs()) == [(0, 1), (3, 1)]
    assert ram.allocated_bytes == 2 * PAGE_SIZE
    assert os.fstat(ram.fileno()).st_size == SIZE
    with pytest.raises(ChunkRejectedError):
        ram.punch(PAGES - 1, 2)


def test_reserving_takes_memory_and_more_than_there_is_is_refused(
    ram: RamFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reserved memory is allocated; a host without memory gives the error that callers know."""
    ram.reserve(0, 4 * PAGE_SIZE)
    assert ram.allocated_bytes == 4 * PAGE_SIZE

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(regions.os, "posix_fallocate", full)
    with pytest.raises(InsufficientMemoryError):
        ram.reserve(0, SIZE)


def test_memory_is_touched_before_it_is_set_aside_and_still_known_to_be_zero(
    ram: RamFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it was written to, and none of it counts as data; what lies beside it stays as it is."""
    touched: list[tuple[int, int]] = []
    write = os.pwrite

    def noted(descriptor: int, data: memoryview, offset: int) -> int:
        touched.append((offset, len(data)))
        return write(descriptor, data, offset)

    ram.write_pages([(0, 1)], memoryview(page_of(7)))
    monkeypatch.setattr(regions.os, "pwrite", noted)
    ram.reserve_warm(PAGE_SIZE, 4 * PAGE_SIZE)
    assert (touched[0][0], sum(size for _, size in touched)) == (PAGE_SIZE, 4 * PAGE_SIZE)
    assert ram.allocated_bytes == 5 * PAGE_SIZE
    assert list(ram.data_runs()) == [(0, 1)]


def test_a_created_file_is_new_private_and_all_holes(tmp_path: Path) -> None:
    """A RAM file is never an existing one, and only its owner may open it."""
    path = tmp_path / "ram"
    with RamFile.create(path, SIZE) as ram:
        assert path.stat().st_mode & 0o777 == 0o600
        assert not ram.data_runs()
    with pytest.raises(FileExistsError):
        RamFile.create(path, SIZE)
    with RamFile.open(path, SIZE) as ram, pytest.raises(OSError, match="Bad file descriptor"):
        ram.write_pages([(0, 1)], memoryview(page_of(1)))
    with RamFile.open(path, SIZE, writable=True) as ram:
        ram.write_pages([(0, 1)], memoryview(page_of(1)))
    with pytest.raises(MachineFailedError, match="not"):
        RamFile.open(path, SIZE + PAGE_SIZE)
    with pytest.raises(MachineFailedError, match="cannot be opened"):
        RamFile.open(tmp_path / "absent", SIZE)


def test_a_file_that_cannot_have_its_size_is_not_left_behind(tmp_path: Path) -> None:
    """When the size is refused, the name is free again."""
    path = tmp_path / "ram"
    with pytest.raises(InsufficientMemoryError):
        RamFile.create(path, (1 << 62) // PAGE_SIZE * PAGE_SIZE)
    assert not path.exists()


def test_closing_twice_does_no_harm(ram: RamFile) -> None:
    """The second close must not close a descriptor that somebody else was given meanwhile."""
    ram.close()
    other = os.dup(0)
    ram.close()
    os.close(other)


def test_reading_a_large_file_does_not_make_the_process_larger(ram: RamFile) -> None:
    """64 MiB are read through a 1 MiB buffer with less than 16 MiB of growth."""
    os.ftruncate(ram.fileno(), 64 << 20)
    large = RamFile(os.dup(ram.fileno()), ram.path, 64 << 20)
    with large:
        large.reserve(0, 64 << 20)
        buffer = bytearray(1 << 20)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for batch in PageRuns.whole(large.page_count).batches(256):
            large.read_pages(batch, buffer)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 16 << 10


def test_a_shared_mapping_of_the_whole_file_is_found(ram: RamFile) -> None:
    """The address is the one at which a write reaches the file, also when the kernel lists pieces."""
    with mmap.mmap(ram.fileno(), SIZE) as memory:
        address = find_mapping(os.getpid(), region_of(ram)).address
        memory.madvise(mmap.MADV_DONTFORK, 4 * PAGE_SIZE, 2 * PAGE_SIZE)
        assert find_mapping(os.getpid(), region_of(ram)).address == address
        memory[5 * PAGE_SIZE] = 77
        with Path("/proc/self/mem").open("rb") as own:
            own.seek(address + 5 * PAGE_SIZE)
            assert own.read(1) == b"\x4d"


def test_an_absent_mapping_is_refused(ram: RamFile) -> None:
    """A file that is open but not mapped is no guest memory."""
    with pytest.raises(TrackerUnavailableError, match="is not mapped"):
        find_mapping(os.getpid(), region_of(ram))


def test_a_private_mapping_is_refused(ram: RamFile) -> None:
    """What is written to a private mapping never reaches the file."""
    with (
        mmap.mmap(ram.fileno(), SIZE, flags=mmap.MAP_PRIVATE),
        pytest.raises(TrackerUnavailableError, match="private"),
    ):
        find_mapping(os.getpid(), region_of(ram))


def test_a_partial_mapping_is_refused(ram: RamFile) -> None:
    """A region must be mapped from its first byte to its last."""
    with (
        mmap.mmap(ram.fileno(), SIZE - PAGE_SIZE),
        pytest.raises(TrackerUnavailableError, match="only in part"),
    ):
        find_mapping(os.getpid(), region_of(ram))
    with (
        mmap.mmap(ram.fileno(), SIZE - PAGE_SIZE, offset=PAGE_SIZE),
        pytest.raises(TrackerUnavailableError, match="gap"),
    ):
        find_mapping(os.getpid(), region_of(ram))


def test_a_second_mapping_is_refused(ram: RamFile) -> None:
    """A write through a second mapping would not be seen."""
    with (
        mmap.mmap(ram.fileno(), SIZE),
        mmap.mmap(ram.fileno(), PAGE_SIZE),
        pytest.raises(TrackerUnavailableError, match="more than once"),
    ):
        find_mapping(os.getpid(), region_of(ram))


def test_a_process_that_ended_is_dead(ram: RamFile) -> None:
    """A machine that is gone, or a zombie, is reported as dead and not as badly mapped."""
    with subprocess.Popen([sys.executable, "-I", "-S", "-c", ""]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        with pytest.raises(MachineDeadError):
            find_mapping(process.pid, region_of(ram))
    with pytest.raises(MachineDeadError):
        find_mapping(process.pid, region_of(ram))


def test_a_region_is_whole_pages() -> None:
    """A size that is no multiple of the page size can only be a mistake."""
    with pytest.raises(ValueError, match="whole number of pages"):
        Region("ram0", Path("/x"), PAGE_SIZE + 1)
    assert Region("ram0", Path("/x"), SIZE).page_count == PAGES
