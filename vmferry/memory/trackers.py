"""Trackers: which pages of a region a running machine wrote.

Promise: a page that the machine writes after :meth:`Tracker.arm` or after the last :meth:`Tracker.scan` began is in
a later scan. The caller's part is the order: scan, then read. Each tracker protects or notes a page *before* it
reports it, so a page that is written while it is being read is reported again.

What no tracker but ``hash`` can see, because no page table entry of the machine's process is involved: writes
through another process's mapping or through the RAM file itself, and data that a device or the kernel still
transfers to pages it pinned earlier (VFIO; also disk reads with O_DIRECT, ``cache.direct=on``, that were begun
before a scan and end after the read). The negotiation refuses machines that have such devices.
Giving memory back by punching a hole (a balloon) is not a write: its content was given up. What reads as zero
since then and was sent as something else is found by :func:`given_up`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Protocol

from vmferry.errors import MachineDeadError, TrackerUnavailableError
from vmferry.memory.digest import ZERO_PAGE_DIGEST, PageTable, digest_pages
from vmferry.memory.inject import Injection, inject_write_tracking
from vmferry.memory.pagemap import PageMap, Written, clear_soft_dirty, read_entries, soft_dirty_runs
from vmferry.memory.regions import MappedRegion, RamFile, find_mapping
from vmferry.memory.runs import PAGE_SIZE, PageRuns
from vmferry.memory.surgery import operate

PAGEMAP_SCAN_KIND: Final = "pagemap-scan"
SOFT_DIRTY_KIND: Final = "soft-dirty"
HASH_KIND: Final = "hash"

_BATCH_PAGES: Final = 256


class Tracker(Protocol):
    """Reports the pages of one region that its machine wrote."""

    @property
    def kind(self) -> str:
        """The name by which reports and options call this tracker."""

    def arm(self) -> None:
        """Begin: every write from now on will be reported."""

    def scan(self) -> PageRuns:
        """The pages written since :meth:`arm` or the previous scan; read them only after this has returned."""

    def count(self) -> int:
        """How many pages the next scan would report if it came now; changes nothing."""

    def disarm(self) -> None:
        """End the tracking and free what it needed; may be called at any time, any number of times."""


class PagemapScanTracker:
    """Has the kernel write-protect pages and note writes to them (Linux 6.7 or newer).

    A process that did not register its memory itself is helped by an injection. Cost follows the number of
    written pages, not the size of the machine; a protected page costs its next writer one short fault.

    Of a huge page the kernel notes only that it was written, as a whole, and a guest that writes a little everywhere
    writes to every huge page all the time. So the pages of those are compared by digest with what was sent, which
    costs less than sending all of them; likewise pages whose notes the kernel has thrown away.
    """

    kind: Final = PAGEMAP_SCAN_KIND

    def __init__(self, mapped: MappedRegion, known: tuple[RamFile, PageTable] | None = None) -> None:
        """Nothing is tracked yet.

        Args:
            mapped: where the machine has its memory.
            known: that memory and what was last sent of it; ``None`` if nothing was, so that there is nothing to
                compare with, and what the kernel does not note exactly is refused.
        """
        self._mapped = mapped
        self._known = known
        self._pagemap: PageMap | None = None
        self._injection: Injection | None = None

    def arm(self) -> None:
        """Protect every page."""
        try:
            if self._pagemap is None:
                self._pagemap = PageMap(self._mapped)
            if self._injection is None and not self._pagemap.is_tracked():
                mapped = self._mapped
                self._injection = inject_write_tracking(mapped.pid, mapped.address, mapped.region.size_bytes)
            self._pagemap.protect()
        except BaseException:
            self.disarm()
            raise

    def scan(self) -> PageRuns:
        """Protect, then read and compare what is not known exactly, and report."""
        return self._exact(self._armed().take_written())

    def count(self) -> int:
        """The same, protecting nothing."""
        return self._exact(self._armed().peek_written()).page_count

    def disarm(self) -> None:
        """Undo the injection; memory that its process registered itself stays protected, which is harmless."""
        if self._injection is not None:
            self._injection.remove()
            self._injection = None
        if self._pagemap is not None:
            self._pagemap.close()
            self._pagemap = None

    def _exact(self, written: Written) -> PageRuns:
        if not written.coarse:
            return written.pages
        if self._known is None:
            raise TrackerUnavailableError(
                "which pages of huge pages are written is found by comparing with what was sent, and nothing "
                "was sent yet"
            )
        return written.pages.union(_differing(*self._known, written.coarse))

    def _armed(self) -> PageMap:
        if self._pagemap is None:
            raise TrackerUnavailableError(f"the tracker of process {self._mapped.pid} is not armed")
        return self._pagemap


class SoftDirtyTracker:
    """Clears and reads the soft-dirty bits of page table entries (kernels built with CONFIG_MEM_SOFT_DIRTY).

    Reading the bits and clearing them cannot be one step, and a write in between would be lost. Therefore every
    thread of the machine is stopped for the duration of each scan (by ptrace, about a millisecond for each GiB).
    When the kernel drops a page table entry its bit is lost too; a page without an entry is therefore compared
    by digest with what was sent.
    """

    kind: Final = SOFT_DIRTY_KIND

    def __init__(self, mapped: MappedRegion, ram: RamFile, sent: PageTable) -> None:
        self._mapped = mapped
        self._ram = ram
        self._sent = sent

    def arm(self) -> None:
        """Clear all bits. Nothing was reported as clean before, so nobody needs to stop."""
        self._verify()
        clear_soft_dirty(self._mapped.pid)

    def scan(self) -> PageRuns:
        """Read and clear the bits while the machine's threads stand still."""
        mapped = self._mapped
        with os.fdopen(
            operate("soft-dirty", mapped.pid, mapped.address, mapped.region.size_bytes), "rb"
        ) as file:
            return self._written(file.read())

    def count(self) -> int:
        """Read the bits, stopping nobody."""
        try:
            with Path(f"/proc/{self._mapped.pid}/pagemap").open("rb", buffering=0) as pagemap:
                size = self._mapped.region.size_bytes
                return self._written(read_entries(pagemap.fileno(), self._mapped.address, size)).page_count
        except (FileNotFoundError, ProcessLookupError) as exc:
            raise MachineDeadError(f"process {self._mapped.pid} is gone", pid=self._mapped.pid) from exc

    def disarm(self) -> None:
        """Nothing is left to undo."""

    def _written(self, entries: bytes) -> PageRuns:
        self._verify()
        dirty, absent = soft_dirty_runs(entries)
        return dirty.union(_differing(self._ram, self._sent, absent))

    def _verify(self) -> None:
        if find_mapping(self._mapped.pid, self._mapped.region) != self._mapped:
            raise TrackerUnavailableError(f"process {self._mapped.pid} moved its memory while it was tracked")


class HashTracker:
    """Compares the digest of every page with the digest of what was sent; works anywhere, and is slow.

    The table must be the sender's own, noted from the very bytes it sends: compared with the content at the
    previous scan, a page that changed, was sent, and changed back would be missed.
    """

    kind: Final = HASH_KIND

    def __init__(self, ram: RamFile, sent: PageTable) -> None:
        self._ram = ram
        self._sent = sent

    def arm(self) -> None:
        """Nothing to prepare: what was not sent yet differs from the table."""

    def scan(self) -> PageRuns:
        """Read and compare every page."""
        return _differing(self._ram, self._sent, PageRuns.whole(self._ram.page_count))

    def count(self) -> int:
        """Costs as much as a scan."""
        return self.scan().page_count

    def disarm(self) -> None:
        """Nothing is left to undo."""


def given_up(ram: RamFile, sent: PageTable) -> PageRuns:
    """The pages that are holes now and were sent as something else than zero."""
    holes = PageRuns.whole(ram.page_count).difference(ram.data_runs())
    return PageRuns(_punched(sent, holes))


def _differing(ram: RamFile, sent: PageTable, pages: PageRuns) -> PageRuns:
    """Those of ``pages`` whose content is not what was sent; holes are compared without reading them."""
    data = ram.data_runs()
    changed = PageRuns(_changed(ram, sent, pages.intersection(data)))
    return changed.union(PageRuns(_punched(sent, pages.difference(data))))


def _changed(ram: RamFile, sent: PageTable, pages: PageRuns) -> Iterator[tuple[int, int]]:
    """Pages with data whose content is not what was sent."""
    with memoryview(bytearray(_BATCH_PAGES * PAGE_SIZE)) as buffer:
        for batch in pages.batches(_BATCH_PAGES):
            digests = digest_pages(buffer[: ram.read_pages(batch, buffer)])
            yield from sent.differing(batch, digests)


def _punched(sent: PageTable, holes: PageRuns) -> Iterator[tuple[int, int]]:
    """Pages in holes, which are zero, that were sent as something else."""
    for batch in holes.batches(_BATCH_PAGES):
        count = sum(count for _, count in batch)
        yield from sent.differing(batch, ZERO_PAGE_DIGEST * count)
