"""A digest of every page: what a page held when it was last sent or received.

Promise: a :class:`PageTable` needs sixteen bytes for each page of those parts of a region in which something else
than zero was ever noted, and next to nothing for the others, however large the region is. With a shelf, no more than
12 MiB of it are memory, enough for 3 GiB of the region; the rest is on the shelf as long as that has room. Several
threads may note pages, each its own. Two tables have the same root only if every page they noted had the same
content. A page counts as zero only after its bytes were compared, never by its digest alone.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from xxhash import xxh3_128, xxh3_128_digest

from vmferry.memory.runs import PAGE_SIZE, PageRuns
from vmferry.memory.shelf import Shelf

DIGEST_SIZE: Final = 16
_ZERO_PAGE: Final = bytes(PAGE_SIZE)
ZERO_PAGE_DIGEST: Final[bytes] = xxh3_128_digest(_ZERO_PAGE)
_PART_BYTES: Final = 64 * 1024
"""What a table is made of; one such part is for 16 MiB of memory."""
_KEPT_PARTS: Final = 192
"""How many of them are kept in memory, where there is a shelf for the others."""
_ALL_ZERO: Final = ZERO_PAGE_DIGEST * (_PART_BYTES // DIGEST_SIZE)


def digest_pages(buffer: bytes | bytearray | memoryview) -> bytes:
    """The digests of all pages in ``buffer``, one behind the other."""
    with memoryview(buffer) as view:
        return b"".join(map(xxh3_128_digest, _views(view)))


def _views(buffer: memoryview) -> list[memoryview]:
    return [buffer[at : at + PAGE_SIZE] for at in range(0, len(buffer), PAGE_SIZE)]


class PageBuffer:
    """Room for pages that is used again and again, and a view of each: to make one costs as much as a digest."""

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self.whole = memoryview(bytearray(pages * PAGE_SIZE))
        self._views = _views(self.whole)

    def digests(self, pages: int) -> bytes:
        """The digests of the first so many, one behind the other."""
        return b"".join(map(xxh3_128_digest, self._views[:pages]))


@dataclass(frozen=True)
class PageSplit:
    """Pages that were read, divided into those worth sending and those that are all zero."""

    zero_runs: list[tuple[int, int]]
    data_runs: list[tuple[int, int]]
    data: bytes | memoryview
    """The pages of ``data_runs``; the caller's own buffer when no page was zero."""


@dataclass(frozen=True)
class _Shelved:
    """A part of a table that is not in memory."""

    shelf: Shelf
    offset: int
    size: int

    def read(self, at: int, size: int) -> bytes:
        """Up to so many bytes from a place in it on."""
        return self.shelf.read(min(size, self.size - at), self.offset + at)

    def write(self, at: int, digests: bytes) -> None:
        """Put them into a place in it."""
        self.shelf.write(digests, self.offset + at)


class PageTable:
    """The digest of each page of one region; at first every page is noted as zero, as in a new RAM file."""

    def __init__(self, page_count: int, shelf: Shelf | None = None) -> None:
        self.page_count = page_count
        self._shelf = shelf
        whole, rest = divmod(page_count * DIGEST_SIZE, _PART_BYTES)
        self._parts: list[bytes | bytearray | _Shelved] = [_ALL_ZERO] * whole
        if rest:
            self._parts.append(_ALL_ZERO[:rest])
        self._kept = 0
        """How many of them are in memory and can be written."""
        self._lock = threading.Lock()
        """Held while a part becomes one that can be written."""

    def set(self, page: int, digest: bytes) -> None:
        """Note the digest of one page."""
        if not 0 <= page < self.page_count or len(digest) != DIGEST_SIZE:
            raise ValueError(f"page {page} of {self.page_count}, digest of {len(digest)} bytes")
        self._put(page, digest)

    def get(self, page: int) -> bytes:
        """The digest noted for one page."""
        if not 0 <= page < self.page_count:
            raise ValueError(f"page {page} of {self.page_count}")
        return self._noted(page, 1)

    def root(self) -> bytes:
        """One digest over the digests of all pages."""
        digest = xxh3_128()
        for part in self._parts:
            digest.update(part.read(0, part.size) if isinstance(part, _Shelved) else part)
        return digest.digest()

    def note_pages(self, runs: Iterable[tuple[int, int]], buffer: bytes | bytearray | memoryview) -> None:
        """Note the digests of the pages of ``runs``, which lie one behind the other in ``buffer``."""
        self._store(runs, digest_pages(buffer))

    def note_digests(self, runs: Iterable[tuple[int, int]], digests: bytes) -> None:
        """Note digests of the pages of ``runs``, one behind the other."""
        self._store(runs, digests)

    def note_zero(self, runs: Iterable[tuple[int, int]]) -> None:
        """Note that the pages of ``runs`` are all zero."""
        runs = list(runs)
        self._store(runs, ZERO_PAGE_DIGEST * sum(count for _, count in runs))

    def scan_pages(self, runs: Sequence[tuple[int, int]], buffer: memoryview, digests: bytes) -> PageSplit:
        """Note the ``digests`` of the pages of ``runs``, which lie in ``buffer``, and tell which are all zero."""
        self._store(runs, digests)
        if ZERO_PAGE_DIGEST not in digests:
            return PageSplit([], list(runs), buffer)
        zero, data = PageRuns(), PageRuns()
        kept: list[memoryview] = []
        for position, first, count, is_zero in _stretches(runs, _zero_pages(digests, buffer)):
            (zero if is_zero else data).add(first, count)
            if not is_zero:
                kept.append(buffer[position * PAGE_SIZE : (position + count) * PAGE_SIZE])
        return PageSplit(list(zero), list(data), b"".join(kept) if zero else buffer)

    def differing(self, runs: Iterable[tuple[int, int]], digests: bytes) -> Iterator[tuple[int, int]]:
        """Those pages of ``runs``, as runs, whose noted digest is not the one in ``digests``."""
        position = 0
        for first, count in runs:
            size = count * DIGEST_SIZE
            given = digests[position : position + size]
            noted = self._noted(first, count)
            position += size
            if noted == given:
                continue
            for at in range(0, size, DIGEST_SIZE):
                if noted[at : at + DIGEST_SIZE] != given[at : at + DIGEST_SIZE]:
                    yield first + at // DIGEST_SIZE, 1

    def _store(self, runs: Iterable[tuple[int, int]], digests: bytes) -> None:
        """Put consecutive digests into the places of ``runs``."""
        runs = list(runs)
        # Checked before anything is stored: a slice of another length would shift the table.
        if any(first < 0 or count < 1 or first + count > self.page_count for first, count in runs):
            raise ValueError(f"a run lies outside a region of {self.page_count} pages")
        if sum(count for _, count in runs) * DIGEST_SIZE != len(digests):
            raise ValueError(f"{len(digests) // DIGEST_SIZE} pages do not fit their runs")
        position = 0
        for first, count in runs:
            size = count * DIGEST_SIZE
            self._put(first, digests[position : position + size])
            position += size

    def _put(self, page: int, digests: bytes) -> None:
        """Put digests into their places, from a page on."""
        done = 0
        while done < len(digests):
            number, at = divmod(page * DIGEST_SIZE + done, _PART_BYTES)
            piece = digests[done : done + _PART_BYTES - at]
            done += len(piece)
            part = self._parts[number]
            if isinstance(part, bytes):
                if part[at : at + len(piece)] == piece:
                    continue
                part = self._writable(number)
            if isinstance(part, _Shelved):
                part.write(at, piece)
            else:
                part[at : at + len(piece)] = piece

    def _writable(self, number: int) -> bytearray | _Shelved:
        with self._lock:
            part = self._parts[number]
            if isinstance(part, bytes):
                part = self._parts[number] = self._shelved(number, part) or bytearray(part)
                self._kept += isinstance(part, bytearray)
            return part

    def _shelved(self, number: int, part: bytes) -> _Shelved | None:
        """A part outside of memory, if that has enough of them, and there is room."""
        if self._shelf is None or self._kept < _KEPT_PARTS:
            return None
        offset = number * _PART_BYTES
        return _Shelved(self._shelf, offset, len(part)) if self._shelf.put(part, offset) else None

    def _noted(self, page: int, count: int) -> bytes:
        """The digests of pages, one behind the other."""
        position, end = page * DIGEST_SIZE, (page + count) * DIGEST_SIZE
        found = []
        while position < end:
            number, at = divmod(position, _PART_BYTES)
            part, size = self._parts[number], end - position
            found.append(part.read(at, size) if isinstance(part, _Shelved) else bytes(part[at : at + size]))
            position += len(found[-1])
        return b"".join(found)


def _stretches(
    runs: Iterable[tuple[int, int]], zero_pages: Sequence[bool]
) -> Iterator[tuple[int, int, int, bool]]:
    """Cut runs where zero pages begin or end: page in the buffer, first page, count, all zero."""
    start = 0
    for first, count in runs:
        before, end = start, start + count
        while start < end:
            following = _first(zero_pages, not zero_pages[start], start, end)
            yield start, first + start - before, following - start, zero_pages[start]
            start = following


def _zero_pages(digests: bytes, buffer: memoryview) -> list[bool]:
    """Which pages are all zero: by digest first because that is free, then by their bytes."""
    found = [digests[at : at + DIGEST_SIZE] == ZERO_PAGE_DIGEST for at in range(0, len(digests), DIGEST_SIZE)]
    end = 0
    while (start := _first(found, True, end, len(found))) < len(found):
        end = _first(found, False, start, len(found))
        if not _all_zero(buffer[start * PAGE_SIZE : end * PAGE_SIZE]):
            for page in range(start, end):
                found[page] = _all_zero(buffer[page * PAGE_SIZE : (page + 1) * PAGE_SIZE])
    return found


def _first(flags: Sequence[bool], wanted: bool, start: int, end: int) -> int:
    """Where the first such flag stands; ``end`` if there is none."""
    try:
        return flags.index(wanted, start, end)
    except ValueError:
        return end


def _all_zero(pages: memoryview) -> bool:
    """Whether whole pages hold nothing but zeros, by their bytes."""
    return bytes(pages) == bytes(len(pages))
