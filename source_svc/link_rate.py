"""How fast a destination takes in pages of a machine: a burst over as many connections as lanes would have.

Promise: real pages of the machine are read, hashed and sent as in a migration, and forgotten at the other end; memory
is bounded by a few messages for each connection; nothing is open when it ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Final

import grpc.aio
from xxhash import xxh3_128_digest

from source_svc.peer import Destination
from vmferry.memory.digest import DIGEST_SIZE, ZERO_PAGE_DIGEST, digest_pages
from vmferry.memory.regions import RamFile, Region
from vmferry.memory.runs import PAGE_SIZE, PageRuns
from vmferry.negotiation.encodings import ZSTD
from vmferry.together import to_the_end, together
from vmferry.transfer import compression
from vmferry.transfer.compression import Experience, Method
from vmferry.transfer.encodings import Encoder
from vmferry.transfer.wire import ChunkFrame, encode_measured
from vmferry.v1 import handoff_pb2, transfer_pb2

Run = tuple[int, int]
_SAMPLE_PAGES: Final = 32
"""Pages that are looked at together; small, so that a sample is from all over the memory."""
_FIRST_SLICE_BYTES: Final = 64 * 1024
_GROWTH: Final = 8
"""A slice has at most so many times the bytes of the one before it."""
_MOST_CALL_BYTES: Final = 48 * 1024 * 1024
"""Less than what a destination takes in one call."""
_COMPRESSED_BYTES: Final = 1024 * 1024
"""Pages that are compressed to see what that does."""
READERS: Final = 2
"""Messages that are read and hashed at a time, as in a migration."""


@dataclass(frozen=True)
class Effort:
    """How much is measured."""

    slices: int
    slice_s: float
    sampled_bytes: int
    """Memory that is looked at for how much of it is zero."""
    longest_s: float


THOROUGH: Final = Effort(slices=4, slice_s=0.08, sampled_bytes=16 * 1024 * 1024, longest_s=2.0)
QUICK: Final = Effort(slices=2, slice_s=0.03, sampled_bytes=4 * 1024 * 1024, longest_s=0.5)


@dataclass(frozen=True)
class Holding:
    """What a machine's memory holds."""

    resident_bytes: int
    blank_bytes: int
    read_bytes_per_s: float
    """How fast that was found out."""
    pages: PageRuns
    """Pages to send: some that hold data, or any if none do."""
    experience: Experience
    """What compressing such pages would do."""


class LinkRate:
    """A burst to one destination; what was measured so far can be asked for at any time."""

    def __init__(self, destination: Destination, region: Region, lanes: int, chunk_bytes: int) -> None:
        self.holding: Holding | None = None
        self.rates: list[float] = []
        """Bytes per second of each slice that was long enough."""
        self.reserve_rates: list[float] = []
        """Bytes per second at which the destination took memory meanwhile."""
        self._destination = destination
        self._region = region
        self._lanes = lanes
        self._chunk_bytes = chunk_bytes
        self._round_trip_s = 0.0

    async def measure(self, effort: Effort) -> None:
        """Send until enough slices were measured.

        Raises:
            VmferryError: the destination does not answer, or refuses.
        """
        region = self._region
        async with contextlib.AsyncExitStack() as stack:
            ram = stack.enter_context(RamFile.open(region.path, region.size_bytes))
            channels = [
                await stack.enter_async_context(self._destination.new_channel()) for _ in range(self._lanes)
            ]
            # The file is closed after the reading has ended, also of a measurement that is cancelled.
            holding = to_the_end(asyncio.to_thread(_hold, ram, effort.sampled_bytes))
            self.holding, _ = await together(holding, self._warm_up(channels))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(effort.longest_s):
                    await self._slices(ram, channels, effort)

    async def _warm_up(self, channels: Sequence[grpc.aio.Channel]) -> None:
        """Connect, and learn how long an answer takes."""
        took_s = []
        for _ in range(2):
            started = time.monotonic()
            await together(*(self._destination.measure(channel, _nothing()) for channel in channels))
            took_s.append(time.monotonic() - started)
        self._round_trip_s = min(took_s)

    async def _slices(self, ram: RamFile, channels: Sequence[grpc.aio.Channel], effort: Effort) -> None:
        size = _FIRST_SLICE_BYTES * len(channels)
        most = _MOST_CALL_BYTES * len(channels)
        first = True
        while len(self.rates) < effort.slices:
            started = time.monotonic()
            rate = await self._slice(ram, channels, size)
            long_enough = size == most or time.monotonic() - started >= effort.slice_s / 2
            # The first one is over before connections and threads have got going.
            if long_enough and not first:
                self.rates.append(rate)
            first = False
            wanted = min(round(rate * effort.slice_s), size * _GROWTH)
            size = min(max(wanted, PAGE_SIZE * len(channels)), most)

    async def _slice(self, ram: RamFile, channels: Sequence[grpc.aio.Channel], size: int) -> float:
        """Send about ``size`` bytes over all channels; the rate."""
        assert self.holding is not None
        chunk_bytes = min(self._chunk_bytes, max(PAGE_SIZE, size // len(channels)))
        batches = cycle(list(self.holding.pages.batches(chunk_bytes // PAGE_SIZE)))
        chunks = islice(batches, max(1, round(size / chunk_bytes)))
        queue: asyncio.Queue[bytes | None] = asyncio.Queue(len(channels))
        reading = READERS

        async def read() -> None:
            nonlocal reading
            for runs in chunks:
                await queue.put(await to_the_end(asyncio.to_thread(_request, ram, runs)))
            reading -= 1
            if not reading:
                for _ in channels:
                    await queue.put(None)

        async def carry(channel: grpc.aio.Channel) -> handoff_pb2.MeasureResponse:
            return await self._destination.measure(channel, _from(queue))

        started = time.monotonic()
        answers = await together(*(carry(channel) for channel in channels), *(read() for _ in range(READERS)))
        seconds = on_the_way_s(time.monotonic() - started, self._round_trip_s)
        carried = answers[: len(channels)]
        self.reserve_rates += [
            answer.reserve_bytes_per_second for answer in carried if answer.reserve_bytes_per_second
        ]
        sent: int = sum(answer.data_bytes for answer in carried)
        return sent / seconds


def on_the_way_s(elapsed_s: float, round_trip_s: float) -> float:
    """How long pages took of what a call took, which an empty one took ``round_trip_s`` for.

    That may have waited for a processor, so half of the time is theirs at least: no more than a factor of two is made
    of nothing.
    """
    return max(elapsed_s - round_trip_s, elapsed_s / 2)


async def _nothing() -> AsyncIterator[bytes]:
    return
    yield


async def _from(
    queue: asyncio.Queue[bytes | None],
) -> AsyncIterator[bytes]:
    while (request := await queue.get()) is not None:
        yield request


def _request(ram: RamFile, runs: Sequence[Run]) -> bytes:
    """Pages as a migration would send them, except that they say nothing about where they belong."""
    count = sum(pages for _, pages in runs)
    buffer = bytearray(count * PAGE_SIZE)
    ram.read_pages(runs, buffer)
    digest_pages(buffer)  # a migration notes the digest of every page
    head = transfer_pb2.Chunk(
        round=1,
        runs=[transfer_pb2.PageRun(first_page=0, page_count=count)],
        encoding=transfer_pb2.ENCODING_NONE,
        data_hash=xxh3_128_digest(buffer),
    )
    return encode_measured(ChunkFrame(head, buffer, mark=False))


def _hold(ram: RamFile, sampled_bytes: int) -> Holding:
    """Look at samples from all over the memory."""
    occupied = ram.data_runs()
    started = time.monotonic()
    sampled, full, contents = PageRuns(), PageRuns(), bytearray()
    with memoryview(bytearray(_SAMPLE_PAGES * PAGE_SIZE)) as buffer:
        for first, count in _spread(occupied, sampled_bytes // (_SAMPLE_PAGES * PAGE_SIZE)):
            sampled.add(first, count)
            digests = digest_pages(buffer[: ram.read_pages([(first, count)], buffer)])
            for page in range(count):
                if digests[page * DIGEST_SIZE : (page + 1) * DIGEST_SIZE] != ZERO_PAGE_DIGEST:
                    full.add(first + page, 1)
                    if len(contents) < _COMPRESSED_BYTES:
                        contents += buffer[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]
    seconds = max(time.monotonic() - started, 1e-6)
    size = occupied.page_count * PAGE_SIZE
    resident = size * full.page_count // max(1, sampled.page_count)
    anything = PageRuns([(0, min(ram.page_count, _SAMPLE_PAGES))])
    rate = max(sampled.page_count, 1) * PAGE_SIZE / seconds
    return Holding(resident, size - resident, rate, full or sampled or anything, _experience(contents))


def _experience(contents: bytearray) -> Experience:
    """Compress some pages, as a migration would."""
    method, found = Method(ZSTD, 1), Experience()
    began, started = time.monotonic(), time.thread_time()
    encoded = Encoder().encode(method.encoding, method.level, contents)
    seconds, wall_s = time.thread_time() - started, time.monotonic() - began
    read_s = found.read_s_per_byte * len(contents)
    found.add(compression.Effort(method, len(contents), len(encoded), read_s, seconds, wall_s))
    return found


def _spread(pages: PageRuns, pieces: int) -> Iterator[Run]:
    """Short runs at even distances."""
    step = max(pages.page_count / max(1, pieces), _SAMPLE_PAGES)
    passed, following = 0, 0.0
    for first, count in pages:
        while following < passed + count:
            skipped = max(0, int(following) - passed)
            yield first + skipped, min(_SAMPLE_PAGES, count - skipped)
            following += step
        passed += count
