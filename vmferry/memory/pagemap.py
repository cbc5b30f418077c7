"""The kernel's page map of another process: PAGEMAP_SCAN, and the older one-number-per-page format.

Promise: a scan that returns has looked at memory that was there and belonged to a living process. The kernel
itself answers "nothing was written" for a process that died or changed its mappings, so both are checked here.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import struct
from array import array
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Final, NamedTuple, TypeAlias

from vmferry.errors import MachineDeadError, TrackerUnavailableError
from vmferry.memory.regions import MappedRegion, find_mapping
from vmferry.memory.runs import PAGE_SIZE, PageRuns

PAGEMAP_SCAN: Final = 0xC0606610
SCAN_ARGUMENT: Final = struct.Struct("=12Q")
"""``struct pm_scan_arg``: size, flags, start, end, walk_end, vec, vec_len, max_pages, category_inverted,
category_mask, category_anyof_mask, return_mask."""
WP_MATCHING: Final = 1
CHECK_WPASYNC: Final = 2
WRITTEN: Final = 2
PRESENT: Final = 8
SWAPPED: Final = 16
HUGE: Final = 64
ABSENT: Final = WRITTEN | PRESENT | SWAPPED
"""Inverted: pages of which none of these is true have no page table."""

_WALK_END: Final = slice(32, 40)
_RESULT_FIELDS: Final = 3
"""``struct page_region``: start, end, categories."""
_MAX_RESULTS: Final = 4096

_LARGE_BYTES: Final = 512 * 1024 * 1024
"""A walk over less takes no longer than waking another thread."""
_TABLE_BYTES: Final = 2 * 1024 * 1024
"""What one page table is for, and one huge page."""

_END_TIMEOUT_MS: Final = 100

ENTRY_SIZE: Final = 8
_CLEAR_SOFT_DIRTY: Final = "4"
_SOFT_DIRTY: Final = 1 << 55
_MAPPED: Final = 1 << 63 | 1 << 62

Addresses: TypeAlias = "array[int]"


@dataclass(frozen=True)
class _Part:
    """A part of the region that one thread walks, and where the kernel puts what it finds there."""

    start: int
    end: int
    results: Addresses = field(
        default_factory=lambda: array("Q", bytes(8 * _RESULT_FIELDS * _MAX_RESULTS)), repr=False
    )


@dataclass(frozen=True)
class _Look:
    """What a walk looks for, and what it does to what it finds."""

    flags: int = 0
    mask: int = 0
    inverted: int = 0


class Written(NamedTuple):
    """What the kernel says of writes."""

    pages: PageRuns
    """Each of these was written."""
    coarse: PageRuns
    """Of these nobody knows which: whole huge pages, and pages whose notes were thrown away."""


def _halves(start: int, end: int) -> list[tuple[int, int]]:
    """A region in two, if that is worth a second thread; cut between page tables."""
    middle = (start + end) // 2 // _TABLE_BYTES * _TABLE_BYTES
    return [(start, middle), (middle, end)] if end - start >= _LARGE_BYTES else [(start, end)]


def _inside(start: int, end: int) -> tuple[int, int]:
    """The whole page tables in a range; they end before they start if there are none."""
    return -(-start // _TABLE_BYTES) * _TABLE_BYTES, end // _TABLE_BYTES * _TABLE_BYTES


class PageMap:
    """The page map of one mapped region, open for scanning."""

    def __init__(self, mapped: MappedRegion) -> None:
        self._mapped = mapped
        self._parts = [
            _Part(start, end)
            for start, end in _halves(mapped.address, mapped.address + mapped.region.size_bytes)
        ]
        self._helper = ThreadPoolExecutor(1, thread_name_prefix="pagemap")
        try:
            self._pidfd = os.pidfd_open(mapped.pid)
        except ProcessLookupError as exc:
            raise MachineDeadError(f"process {mapped.pid} is gone", pid=mapped.pid) from exc
        try:
            self._fd = os.open(f"/proc/{mapped.pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as exc:
            os.close(self._pidfd)
            if exc.errno in (errno.ENOENT, errno.ESRCH):
                raise MachineDeadError(f"process {mapped.pid} is gone", pid=mapped.pid) from exc
            raise TrackerUnavailableError(
                f"the page map of process {mapped.pid} cannot be opened: {exc.strerror}", pid=mapped.pid
            ) from exc

    def close(self) -> None:
        """Close the descriptors; more than once does no harm."""
        if self._fd >= 0:
            self._helper.shutdown()
            os.close(self._fd)
            os.close(self._pidfd)
            self._fd = self._pidfd = -1

    def is_tracked(self) -> bool:
        """Whether the whole region is registered for asynchronous write protection."""
        try:
            for part in self._parts:
                for _ in self._walk(part, CHECK_WPASYNC, mask=ABSENT, inverted=ABSENT):
                    pass
        except PermissionError:
            return False
        return True

    def protect(self) -> None:
        """Write-protect every page, also those that were never touched."""
        self._walks(_Look(WP_MATCHING))

    def take_written(self) -> Written:
        """The pages written since they were protected; each is protected again before it is reported.

        Two walks. The first asks for WRITTEN alone, the one form of the call for which every kernel also reports
        pages whose table entry was dropped since. The second finds page tables that are missing as a whole:
        :meth:`protect` made all of them, so a missing one was thrown away with the notes it held (this happens
        when a huge page is split), and any of its pages may have been written.

        The pages of a hugetlbfs file are never split, reclaimed or moved to swap, so there one without an entry was
        not touched, or was let go by its own process together with its content; protecting it changes nothing.
        """
        return self._written(WP_MATCHING)

    def peek_written(self) -> Written:
        """What :meth:`take_written` would report; protects nothing."""
        return self._written(0)

    def _written(self, flags: int) -> Written:
        if self._mapped.huge:
            return Written(PageRuns(), self._walks(_Look(flags, mask=WRITTEN))[0])
        written, dropped = self._walks(_Look(flags, mask=WRITTEN), _Look(flags, mask=ABSENT, inverted=ABSENT))
        huge = self._huge_pages(written)
        return Written(written.difference(huge), huge.union(dropped)) if huge else Written(written, dropped)

    def _huge_pages(self, runs: PageRuns) -> PageRuns:
        """The part of some runs that the process has in huge pages, which the kernel protects as wholes.

        Asked for in a walk of its own, as the one that finds what was written must ask for nothing else, and only
        where a huge page may be. What was split since then counts as written page by page.
        """
        found, base = PageRuns(), self._mapped.address
        spans = (
            _inside(base + first * PAGE_SIZE, base + (first + count) * PAGE_SIZE) for first, count in runs
        )
        if wholes := [(start, end) for start, end in spans if start < end]:
            with self._explained():
                for start, end in wholes:
                    self._collect(found, _Part(start, end, self._parts[0].results), _Look(mask=HUGE))
        return found

    def _walks(self, *looks: _Look) -> list[PageRuns]:
        """Walk the region as often as there are looks; for each of them the pages whose categories match.

        Its halves are walked at a time, each of them for one look after the other. The memory is checked to be there
        still once, behind all walks.
        """
        first, *others = self._parts
        with self._explained():
            beside = [self._helper.submit(self._matching, part, looks) for part in others]
            try:
                found = self._matching(first, looks)
            finally:
                wait(beside)  # it writes to memory of this object
            for more in beside:
                for runs, rest in zip(found, more.result(), strict=True):
                    runs.extend(rest)
        return found

    def _matching(self, part: _Part, looks: Sequence[_Look]) -> list[PageRuns]:
        found = []
        for look in looks:
            runs = PageRuns()
            self._collect(runs, part, look)
            found.append(runs)
        return found

    def _collect(self, runs: PageRuns, part: _Part, look: _Look) -> None:
        """Add what one walk over a part finds."""
        base, flags = self._mapped.address, look.flags | CHECK_WPASYNC
        for starts, ends in self._walk(part, flags, mask=look.mask, inverted=look.inverted):
            firsts = [(start - base) // PAGE_SIZE for start in starts]
            counts = [(end - start) // PAGE_SIZE for start, end in zip(starts, ends, strict=True)]
            runs.extend(zip(firsts, counts, strict=True))

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Refuse a walk that failed, or that found nothing because its memory is no longer there."""
        try:
            yield
        except OSError as exc:
            self._verify()
            why = (
                "its memory is not registered for asynchronous write protection"
                if exc.errno == errno.EPERM
                else f"{exc.strerror} ({errno.errorcode.get(exc.errno or 0, exc.errno)})"
            )
            raise TrackerUnavailableError(
                f"PAGEMAP_SCAN of process {self._mapped.pid}: {why}", pid=self._mapped.pid, errno=exc.errno
            ) from exc
        self._verify()

    def _verify(self) -> None:
        """Refuse the answer of a scan if the memory it was about is no longer there."""
        pid = self._mapped.pid
        try:
            moved = find_mapping(pid, self._mapped.region) != self._mapped
        except TrackerUnavailableError:
            moved = True
        # A process that is just ending has lost its memory but is not yet dead, so that deserves a moment.
        if self._has_ended(_END_TIMEOUT_MS if moved else 0):
            raise MachineDeadError(f"process {pid} is gone", pid=pid)
        if moved:
            raise TrackerUnavailableError(f"process {pid} moved its memory while it was tracked", pid=pid)

    def _has_ended(self, timeout_ms: int) -> bool:
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(timeout_ms))

    def _walk(
        self, part: _Part, flags: int, *, mask: int, inverted: int = 0
    ) -> Iterator[tuple[Addresses, Addresses]]:
        """Call PAGEMAP_SCAN as often as one answer is too small; where the matching runs start and end."""
        position = part.start
        # A call that only protects (no mask) has no results, which is the kernel's fast path.
        vector, room = (part.results.buffer_info()[0], _MAX_RESULTS) if mask else (0, 0)
        while position < part.end:
            argument = bytearray(
                SCAN_ARGUMENT.pack(
                    SCAN_ARGUMENT.size,
                    flags,
                    position,
                    part.end,
                    0,
                    vector,
                    room,
                    0,
                    inverted,
                    mask,
                    0,
                    mask,
                )
            )
            # JUSTIFICATION: there is no other way to read and protect in one step.
            # SAFETY: the argument is 96 bytes as the request says; the kernel writes at most ``room`` results
            # to an array of that length, which the part holds.
            try:
                count = fcntl.ioctl(self._fd, PAGEMAP_SCAN, argument, True)
            except ProcessLookupError as exc:  # mostly it says that a dead process wrote nothing
                raise MachineDeadError(f"process {self._mapped.pid} is gone", pid=self._mapped.pid) from exc
            found = part.results[: count * _RESULT_FIELDS]
            yield found[::_RESULT_FIELDS], found[1::_RESULT_FIELDS]
            # walk_end can lie before results: the kernel sets it whenever its own, smaller buffer fills, goes on,
            # and leaves it so if the walk then completes. Going on from there would report pages twice.
            position = max(int.from_bytes(argument[_WALK_END], "little"), found[-2] if found else 0)


def clear_soft_dirty(pid: int) -> None:
    """Have the kernel note writes of a process anew, by the bit in its page table entries."""
    try:
        Path(f"/proc/{pid}/clear_refs").write_text(_CLEAR_SOFT_DIRTY)
    except (FileNotFoundError, ProcessLookupError) as exc:
        raise MachineDeadError(f"process {pid} is gone", pid=pid) from exc
    except PermissionError as exc:
        raise TrackerUnavailableError(f"soft-dirty bits of process {pid}: {exc.strerror}", pid=pid) from exc


def read_entries(pagemap: int, address: int, length: int) -> bytes:
    """From an open page map, the older format of a range: one 64-bit number for each page."""
    size, offset = length // PAGE_SIZE * ENTRY_SIZE, address // PAGE_SIZE * ENTRY_SIZE
    parts = []
    while size and (part := os.pread(pagemap, size, offset)):
        parts.append(part)
        size, offset = size - len(part), offset + len(part)
    return b"".join(parts)


def soft_dirty_runs(entries: bytes) -> tuple[PageRuns, PageRuns]:
    """From a map in the older format: the pages written since the bits were cleared, and the pages not mapped.

    Of a page that is not mapped nothing is known: it may have been written before its entry was dropped.
    """
    dirty, absent = PageRuns(), PageRuns()
    page = 0
    for kind, group in groupby(array("Q", entries), _kind):
        count = sum(1 for _ in group)
        if kind is not _CLEAN:
            (dirty if kind is _DIRTY else absent).add(page, count)
        page += count
    return dirty, absent


_CLEAN, _DIRTY, _ABSENT = "clean", "dirty", "absent"


def _kind(entry: int) -> str:
    """What one number of the older format says."""
    if entry & _SOFT_DIRTY:
        return _DIRTY
    return _CLEAN if entry & _MAPPED else _ABSENT
