"""Pages to frames and frames to pages.

Promise: a frame's payload is checked against its hash and its runs against the region before a single byte of
guest memory is touched; what is then noted in the page table is read back from that memory, so that the digest
speaks of the copy that will run, not of what was received.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from xxhash import xxh3_128_digest

from vmferry.errors import ChunkRejectedError, HashMismatchError
from vmferry.memory.digest import PageBuffer, PageSplit, PageTable
from vmferry.memory.regions import PIECE_BYTES, RamFile
from vmferry.memory.runs import PAGE_SIZE, PageRuns
from vmferry.negotiation.encodings import NONE
from vmferry.transfer.compression import RAW, Effort, Method
from vmferry.transfer.encodings import NUMBERS, Encoder, decode, encoding_name, is_worth_it
from vmferry.transfer.wire import Buffer, ChunkFrame, encode_chunk
from vmferry.v1 import transfer_pb2

Run = tuple[int, int]
_THREAD = threading.local()
MAX_PAGES_PER_CHUNK = 1024
"""Bounds what one frame can make the receiver read, write or allocate, zero pages included."""
_LARGE_ROUND_PAGES = 32 * 1024
_PLACES = 4


def _scratch(size: int) -> memoryview:
    """A buffer of this thread, used again by the next call: fresh memory costs more than what is done in it."""
    buffer: bytearray = getattr(_THREAD, "buffer", bytearray())
    if len(buffer) < size:
        buffer = _THREAD.buffer = bytearray(size)
    return memoryview(buffer)[:size]


def _piece() -> PageBuffer:
    """A buffer of this thread for what is read back."""
    piece: PageBuffer | None = getattr(_THREAD, "piece", None)
    if piece is None:
        piece = _THREAD.piece = PageBuffer(PIECE_BYTES // PAGE_SIZE)
    return piece


@dataclass(frozen=True)
class BuiltChunk:
    """A chunk that lacks only its number, and what it says for the statistics."""

    frame: ChunkFrame
    pages: int
    zero_pages: int
    data_bytes: int
    """Page contents in it."""
    effort: Effort
    _give_back: Callable[[], None]

    @property
    def empty(self) -> bool:
        """Whether it says nothing."""
        return not self.frame.head.runs and not self.frame.head.zero_runs

    def numbered(self, sequence: int) -> bytes:
        """The message with its number, ready to be sent; once, as what its payload lay in is then used again."""
        self.frame.head.sequence = sequence
        message = encode_chunk(self.frame)
        self.frame.data = b""
        self._give_back()
        return message


class Batches:
    """The pages of a round, as many at a time as one chunk takes; several threads may ask.

    Pages of a large round come from several places in turn: memory that is zero lies together, and while all looked
    through it, the lanes would have nothing to carry.
    """

    def __init__(self, runs: PageRuns, max_pages: Callable[[], int]) -> None:
        pages = runs.page_count
        places = _PLACES if pages >= _LARGE_ROUND_PAGES else 1
        parts = map(PageRuns, runs.batches(-(-pages // places))) if places > 1 else [runs]
        self._places = deque(part.batches(max_pages) for part in parts)
        self._lock = threading.Lock()

    def next(self) -> Sequence[Run]:
        """The pages of the next chunk; none if there are no more."""
        with self._lock:
            while self._places:
                place = self._places.popleft()
                if batch := next(place, ()):
                    self._places.append(place)
                    return batch
            return ()


class ChunkBuilder:
    """Makes chunks of one region's pages, one at a time.

    What it reads into is used again as soon as a chunk was numbered, so that only a few buffers are ever made.
    """

    def __init__(self, ram: RamFile, table: PageTable) -> None:
        self._ram = ram
        self._table = table
        self._encoder = Encoder()
        self._free: list[PageBuffer] = []

    def build(
        self,
        runs: Sequence[Run],
        *,
        round_number: int,
        method: Method = RAW,
        zeros: bool = True,
        compare_only: bool = False,
    ) -> BuiltChunk:
        """Read the pages of ``runs``, note their digests and make a chunk of those that are not all zero.

        Args:
            runs: the pages.
            round_number: the round they are read in.
            method: how to make it smaller, if that makes it smaller.
            zeros: whether pages that are all zero are named; a receiver whose memory is new knows them.
            compare_only: whether the receiver is to compare instead of write.
        """
        started = time.thread_time()
        pages = sum(count for _, count in runs)
        buffer = self._take(pages)
        split = self._read(runs, pages, buffer)
        head = transfer_pb2.Chunk(
            round=round_number,
            runs=_to_messages(split.data_runs),
            zero_runs=_to_messages(split.zero_runs) if zeros else (),
            encoding=NUMBERS[NONE],
            data_hash=xxh3_128_digest(split.data),
        )
        data, size = split.data, len(split.data)
        was_read_at, began = time.thread_time(), time.monotonic()
        encoded = self._encode(method, data)
        encode_s, encode_wall_s = time.thread_time() - was_read_at, time.monotonic() - began
        if encoded and is_worth_it(len(encoded), size):
            head.encoding, data = NUMBERS[method.encoding], encoded
        give_back: Callable[[], None] = partial(self._free.append, buffer)
        if not isinstance(data, memoryview):  # it lies elsewhere by now
            give_back()
            give_back = _nothing
        return BuiltChunk(
            ChunkFrame(head, data, compare_only),
            pages,
            sum(count for _, count in split.zero_runs),
            size,
            Effort(method, size, len(encoded), was_read_at - started, encode_s, encode_wall_s),
            give_back,
        )

    def _read(self, runs: Sequence[Run], pages: int, buffer: PageBuffer) -> PageSplit:
        if self._ram.is_zero(runs):  # as large parts of most machines are
            self._table.note_zero(runs)
            return PageSplit(list(runs), [], b"")
        view = buffer.whole[: pages * PAGE_SIZE]
        self._ram.read_pages(runs, view)
        return self._table.scan_pages(runs, view, buffer.digests(pages))

    def _encode(self, method: Method, data: Buffer) -> bytes:
        if method.encoding == NONE or not data:
            return b""
        return self._encoder.encode(method.encoding, method.level, data)

    def _take(self, pages: int) -> PageBuffer:
        buffer = self._free.pop() if self._free else None
        return buffer if buffer and buffer.pages >= pages else PageBuffer(pages)


@dataclass(frozen=True)
class Pages:
    """What a checked chunk says."""

    runs: list[Run]
    zero_runs: list[Run]
    data: Buffer
    """Contents of the pages in ``runs``, decoded."""


@dataclass(frozen=True)
class Intake:
    """The memory that chunks are written to."""

    ram: RamFile
    table: PageTable
    agreed: Collection[str] = (NONE,)
    """Encodings that chunks may have."""

    def check(self, frame: ChunkFrame) -> Pages:
        """Refuse what must not be written; decode the rest.

        Raises:
            ChunkRejectedError: it names pages outside the region, or does not fit its own runs.
            HashMismatchError: its data is not what was sent.
        """
        head = frame.head
        if head.region != 0:
            raise ChunkRejectedError(f"there is no region {head.region}", field="region")
        encoding = encoding_name(head.encoding, self.agreed)
        runs, zero_runs = _to_runs(head.runs), _to_runs(head.zero_runs)
        pages = self._check_runs(runs, "runs")
        zero_pages = self._check_runs(zero_runs, "zero_runs")
        if pages + zero_pages > MAX_PAGES_PER_CHUNK:
            raise ChunkRejectedError(f"a chunk has at most {MAX_PAGES_PER_CHUNK} pages", field="runs")
        data = decode(encoding, frame.data, pages * PAGE_SIZE)
        if xxh3_128_digest(data) != head.data_hash:
            raise HashMismatchError("the chunk's data does not have the hash it came with", field="data_hash")
        return Pages(runs, zero_runs, data)

    def _check_runs(self, runs: Iterable[Run], name: str) -> int:
        end, pages = 0, 0
        for first, count in runs:
            if count < 1 or first < end or first + count > self.table.page_count:
                raise ChunkRejectedError(
                    f"{count} pages at page {first} are outside the region of {self.table.page_count} pages, "
                    "empty, or out of order",
                    field=name,
                )
            end, pages = first + count, pages + count
        return pages

    def write(self, pages: Pages) -> None:
        """Put a checked chunk into memory and note what memory then holds."""
        if pages.runs:
            # Looked at in memory: the digest speaks of what will run.
            back = _piece()
            pieces = self.ram.put(pages.runs, memoryview(pages.data), back.whole)
            self.table.note_digests(pages.runs, b"".join(map(back.digests, pieces)))
        if pages.zero_runs:
            # Zeros are written, not punched: the memory stays reserved for the guest.
            zeros = bytes(sum(count for _, count in pages.zero_runs) * PAGE_SIZE)
            self.ram.write_pages(pages.zero_runs, memoryview(zeros))
            self.table.note_zero(pages.zero_runs)

    def compare(self, pages: Pages) -> int:
        """How many pages of a checked chunk differ, byte for byte, from what memory holds."""
        different = 0
        for runs, data in ((pages.runs, memoryview(pages.data)), (pages.zero_runs, None)):
            count = sum(count for _, count in runs)
            mine = _scratch(count * PAGE_SIZE)
            self.ram.read_pages(runs, mine)
            theirs = data if data is not None else memoryview(bytes(len(mine)))
            if mine == theirs:
                continue
            for at in range(0, len(mine), PAGE_SIZE):
                different += mine[at : at + PAGE_SIZE] != theirs[at : at + PAGE_SIZE]
        return different


def _nothing() -> None:
    pass


def data_pages(frame: ChunkFrame) -> int:
    """How many pages a chunk has data of."""
    return sum(run.page_count for run in frame.head.runs)


def _to_messages(runs: Iterable[Run]) -> list[transfer_pb2.PageRun]:
    return [transfer_pb2.PageRun(first_page=first, page_count=count) for first, count in runs]


def _to_runs(messages: Iterable[transfer_pb2.PageRun]) -> list[Run]:
    return [(run.first_page, run.page_count) for run in messages]
