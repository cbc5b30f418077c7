"""What the destination's loop puts in by itself, and what it leaves to a thread."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from xxhash import xxh3_128_digest

from dest_svc.intake import DirectMemory, pages_at_once
from vmferry.errors import ChunkRejectedError, HashMismatchError
from vmferry.memory.digest import PageTable
from vmferry.memory.regions import RamFile
from vmferry.memory.runs import PAGE_SIZE
from vmferry.negotiation.encodings import LZ4, NONE
from vmferry.transfer.encodings import Encoder
from vmferry.transfer.frames import MAX_PAGES_PER_CHUNK
from vmferry.transfer.wire import ChunkFrame, chunk_frame
from vmferry.v1.transfer_pb2 import ENCODING_LZ4, ENCODING_NONE, Chunk, DeviceState, PageRun, TransferRequest

PAGES, TAKEN, AT_ONCE = 64, 48, 16


@pytest.fixture
def ram(tmp_path: Path) -> Iterator[RamFile]:
    with RamFile.create(tmp_path / "destination.ram", PAGES * PAGE_SIZE) as ram:
        yield ram


@pytest.fixture
def memory(ram: RamFile) -> DirectMemory:
    return into(ram, at_once=AT_ONCE)


def into(ram: RamFile, *, at_once: int) -> DirectMemory:
    machine: Any = SimpleNamespace(ram=SimpleNamespace(page_count=PAGES))
    return DirectMemory(
        machine,
        ram,
        PageTable(PAGES),
        (NONE, LZ4),
        taken_bytes=lambda: TAKEN * PAGE_SIZE,
        at_once=at_once,
    )


def chunk(
    *runs: tuple[int, int], zero: tuple[tuple[int, int], ...] = (), lz4: bool = False, mark: bool = False
) -> ChunkFrame:
    data = os.urandom(PAGE_SIZE // 2) * 2 * sum(count for _, count in runs)
    return chunk_frame(
        Chunk(
            runs=[PageRun(first_page=first, page_count=count) for first, count in runs],
            zero_runs=[PageRun(first_page=first, page_count=count) for first, count in zero],
            encoding=ENCODING_LZ4 if lz4 else ENCODING_NONE,
            data=Encoder().encode(LZ4, 0, data) if lz4 else data,
            data_hash=xxh3_128_digest(data),
            compare_only=mark,
        )
    )


def test_pages_for_memory_that_is_taken_are_put_in_at_once(ram: RamFile, memory: DirectMemory) -> None:
    """They are there when the call returns, zero pages as well, up to the last page that is taken."""
    ram.write_pages([(8, 4)], memoryview(b"x" * 4 * PAGE_SIZE))
    frame = chunk((0, 4), (TAKEN - 4, 4), zero=((8, 4),))
    assert memory.take(frame) == 0
    content = ram.path.read_bytes()
    assert content[: 4 * PAGE_SIZE] + content[(TAKEN - 4) * PAGE_SIZE : TAKEN * PAGE_SIZE] == bytes(
        frame.data
    )
    assert content[8 * PAGE_SIZE : 12 * PAGE_SIZE] == bytes(4 * PAGE_SIZE)


@pytest.mark.parametrize(
    "frame",
    [
        chunk((TAKEN - 1, 2)),
        chunk((0, 1), zero=((TAKEN, 1),)),
        chunk((0, AT_ONCE + 1)),
        chunk((0, 1), zero=((1, AT_ONCE),)),
        chunk((0, 2), lz4=True),
    ],
    ids=["memory not taken", "zeros not taken", "too much", "too many zeros", "compressed"],
)
async def test_what_may_take_longer_is_left_to_a_thread(
    ram: RamFile, memory: DirectMemory, frame: ChunkFrame
) -> None:
    """Nothing has happened when the call returns; what it returns puts the pages in."""
    work = memory.take(frame)
    assert not isinstance(work, int)
    assert ram.path.read_bytes() == bytes(PAGES * PAGE_SIZE)
    assert await work == 0
    first, size = frame.head.runs[0].first_page * PAGE_SIZE, frame.head.runs[0].page_count * PAGE_SIZE
    assert ram.path.read_bytes()[first : first + size] != bytes(size)


def test_where_there_are_few_processors_compressed_pages_are_put_in_at_once(ram: RamFile) -> None:
    """A thread would only take turns with the loop; a chunk that is not what was sent touches no memory."""
    memory = into(ram, at_once=pages_at_once(2))
    forged = chunk((0, 2), lz4=True)
    forged.head.data_hash = bytes(16)
    with pytest.raises(HashMismatchError):
        memory.take(forged)
    assert ram.path.read_bytes() == bytes(PAGES * PAGE_SIZE)
    assert memory.take(chunk((0, 2), lz4=True)) == 0
    assert ram.path.read_bytes()[: 2 * PAGE_SIZE].strip(b"\0")


async def test_a_comparison_is_left_to_a_thread(memory: DirectMemory) -> None:
    """It may be of memory that nobody has read for long."""
    work = memory.take(chunk((0, 2), mark=True))
    assert not isinstance(work, int)
    assert await work == 2


async def test_a_chunk_of_countless_runs_does_not_keep_the_loop(ram: RamFile, memory: DirectMemory) -> None:
    """Runs of no pages add up to nothing, and still have to be looked at one by one before they are refused."""
    frame = chunk((0, 1))
    frame.head.runs.extend([PageRun(first_page=1)] * MAX_PAGES_PER_CHUNK)
    work = memory.take(frame)
    assert not isinstance(work, int)
    with pytest.raises(ChunkRejectedError):
        await work
    assert ram.path.read_bytes() == bytes(PAGES * PAGE_SIZE)


def test_what_is_put_in_at_once_is_checked_before(ram: RamFile, memory: DirectMemory) -> None:
    """A chunk that is not what was sent, or has a page that does not exist, touches no memory."""
    forged = chunk((0, 2))
    forged.head.data_hash = bytes(16)
    with pytest.raises(HashMismatchError):
        memory.take(forged)
    overlapping = chunk((0, 2), (1, 2))
    with pytest.raises(ChunkRejectedError):
        memory.take(overlapping)
    assert ram.path.read_bytes() == bytes(PAGES * PAGE_SIZE)


def test_a_piece_of_the_device_state_is_kept_at_once(memory: DirectMemory) -> None:
    """Nothing is done with it yet."""
    piece = DeviceState(offset=0, total_bytes=3, data=b"abc")
    assert memory.take(TransferRequest(device_state=piece)) == 0


@pytest.mark.parametrize("processors", [1, 2])
def test_where_a_thread_would_have_no_processor_the_loop_puts_all_in(processors: int) -> None:
    """Both would take turns."""
    assert pages_at_once(processors) == MAX_PAGES_PER_CHUNK


def test_where_a_thread_has_a_processor_the_loop_puts_in_only_little() -> None:
    """The loop has to serve everything that arrives."""
    assert 0 < pages_at_once(4) < MAX_PAGES_PER_CHUNK // 8
