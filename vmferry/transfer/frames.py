"""Pages to frames and frames to pages.

Promise: a frame's payload is checked against its hash and its runs against the region before a single byte of
guest memory is touched; what is then noted in the page table is read back from that memory, so that the digest
speaks of the copy that will run, not of what was received.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from xxhash import xxh3_128_digest

from vmferry.errors import ChunkRejectedError, HashMismatchError
from vmferry.memory.digest import PageTable
from vmferry.memory.regions import RamFile
from vmferry.memory.runs import PAGE_SIZE
from vmferry.v1 import transfer_pb2

Run = tuple[int, int]
_THREAD = threading.local()
MAX_PAGES_PER_CHUNK = 1024
"""Bounds what one frame can make the receiver read, write or allocate, zero pages included."""


def _scratch(size: int) -> memoryview:
    """A buffer of this thread, used again by the next call: fresh memory costs more than what is done in it."""
    buffer: bytearray = getattr(_THREAD, "buffer", bytearray())
    if len(buffer) < size:
        buffer = _THREAD.buffer = bytearray(size)
    return memoryview(buffer)[:size]


@dataclass(frozen=True)
class BuiltChunk:
    """A chunk that lacks only its number, and what it says for the statistics."""

    chunk: transfer_pb2.Chunk
    pages: int
    zero_pages: int

    @property
    def data_bytes(self) -> int:
        """Page contents in it."""
        return len(self.chunk.data)

    def without_zero_runs(self) -> BuiltChunk:
        """The same chunk for a receiver whose pages are zero to begin with."""
        self.chunk.ClearField("zero_runs")
        return BuiltChunk(self.chunk, self.pages, 0)


def build_chunk(
    ram: RamFile, table: PageTable, runs: Sequence[Run], *, round_number: int, compare_only: bool = False
) -> BuiltChunk:
    """Read the pages of ``runs``, note their digests and make a chunk of those that are not all zero."""
    pages = sum(count for _, count in runs)
    buffer = _scratch(pages * PAGE_SIZE)
    ram.read_pages(runs, buffer)
    split = table.scan_pages(runs, buffer)
    data = bytes(split.data)
    chunk = transfer_pb2.Chunk(
        round=round_number,
        runs=_to_messages(split.data_runs),
        zero_runs=_to_messages(split.zero_runs),
        encoding=transfer_pb2.ENCODING_NONE,
        data_hash=xxh3_128_digest(data),
        data=data,
        compare_only=compare_only,
    )
    return BuiltChunk(chunk, pages, sum(count for _, count in split.zero_runs))


@dataclass(frozen=True)
class Intake:
    """The memory that chunks are written to."""

    ram: RamFile
    table: PageTable

    def check(self, chunk: transfer_pb2.Chunk) -> None:
        """Refuse what must not be written.

        Raises:
            ChunkRejectedError: it names pages outside the region, or does not fit its own runs.
            HashMismatchError: its data is not what was sent.
        """
        if chunk.region != 0:
            raise ChunkRejectedError(f"there is no region {chunk.region}", field="region")
        if chunk.encoding != transfer_pb2.ENCODING_NONE:
            raise ChunkRejectedError(f"encoding {chunk.encoding} was not agreed", field="encoding")
        pages = self._check_runs(chunk.runs, "runs")
        zero_pages = self._check_runs(chunk.zero_runs, "zero_runs")
        if pages + zero_pages > MAX_PAGES_PER_CHUNK:
            raise ChunkRejectedError(f"a chunk has at most {MAX_PAGES_PER_CHUNK} pages", field="runs")
        if pages * PAGE_SIZE != len(chunk.data):
            raise ChunkRejectedError(f"{pages} pages cannot have {len(chunk.data)} bytes", field="data")
        if xxh3_128_digest(chunk.data) != chunk.data_hash:
            raise HashMismatchError("the chunk's data does not have the hash it came with", field="data_hash")

    def _check_runs(self, runs: Iterable[transfer_pb2.PageRun], name: str) -> int:
        end, pages = 0, 0
        for run in runs:
            first, count = run.first_page, run.page_count
            if count < 1 or first < end or first + count > self.table.page_count:
                raise ChunkRejectedError(
                    f"{count} pages at page {first} are outside the region of {self.table.page_count} pages, "
                    "empty, or out of order",
                    field=name,
                )
            end, pages = first + count, pages + count
        return pages

    def write(self, chunk: transfer_pb2.Chunk) -> None:
        """Put a checked chunk into memory and note what memory then holds."""
        runs, zero_runs = _to_runs(chunk.runs), _to_runs(chunk.zero_runs)
        if runs:
            self.ram.write_pages(runs, memoryview(chunk.data))
            back = _scratch(len(chunk.data))
            self.ram.read_pages(runs, back)
            self.table.note_pages(runs, back)
        if zero_runs:
            # Zeros are written, not punched: the memory stays reserved for the guest.
            zeros = bytes(sum(count for _, count in zero_runs) * PAGE_SIZE)
            self.ram.write_pages(zero_runs, memoryview(zeros))
            self.table.note_zero(zero_runs)

    def compare(self, chunk: transfer_pb2.Chunk) -> int:
        """How many pages of a checked chunk differ, byte for byte, from what memory holds."""
        different = 0
        for runs, data in (
            (_to_runs(chunk.runs), memoryview(chunk.data)),
            (_to_runs(chunk.zero_runs), None),
        ):
            pages = sum(count for _, count in runs)
            mine = _scratch(pages * PAGE_SIZE)
            self.ram.read_pages(runs, mine)
            theirs = data if data is not None else memoryview(bytes(len(mine)))
            if mine == theirs:
                continue
            for at in range(0, len(mine), PAGE_SIZE):
                different += mine[at : at + PAGE_SIZE] != theirs[at : at + PAGE_SIZE]
        return different


def _to_messages(runs: Iterable[Run]) -> list[transfer_pb2.PageRun]:
    return [transfer_pb2.PageRun(first_page=first, page_count=count) for first, count in runs]


def _to_runs(messages: Iterable[transfer_pb2.PageRun]) -> list[Run]:
    return [(run.first_page, run.page_count) for run in messages]
