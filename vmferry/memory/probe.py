"""What this host offers for guest memory, found out by using it: trackers, and huge pages of a tmpfs.

Promise: a tracker is called usable only after it noticed one write to one page of another process here, and no
other page; huge pages only after one was taken. When something is not usable, the reason says what was tried and what
the kernel answered.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vmferry.errors import TrackerUnavailableError, VmferryError
from vmferry.memory.digest import PageTable
from vmferry.memory.hugepages import HUGE_PAGE_BYTES
from vmferry.memory.regions import MappedRegion, RamFile, Region, find_mapping
from vmferry.memory.runs import PAGE_SIZE, PageRuns
from vmferry.memory.trackers import (
    HASH_KIND,
    PAGEMAP_SCAN_KIND,
    SOFT_DIRTY_KIND,
    HashTracker,
    PagemapScanTracker,
    SoftDirtyTracker,
    Tracker,
)

_BLOCK_BYTES: Final = 512
"""What the kernel counts a file's blocks in, whatever their real size."""
_PAGES: Final = 16
_TOUCHED_PAGE: Final = 11
_SUBJECT: Final = """
import mmap, sys
memory = mmap.mmap(int(sys.argv[1]), int(sys.argv[2]))
for page in range(0, len(memory), 4096):
    memory[page] = 1
print("ready", flush=True)
for line in sys.stdin:
    memory[int(line) * 4096] += 1
    print("written", flush=True)
"""

_Make = Callable[[MappedRegion, RamFile, PageTable], Tracker]
_TRACKERS: Final[dict[str, _Make]] = {
    PAGEMAP_SCAN_KIND: lambda mapped, ram, sent: PagemapScanTracker(
        mapped, (ram, sent) if sent.page_count else None
    ),
    SOFT_DIRTY_KIND: SoftDirtyTracker,
    HASH_KIND: lambda _mapped, ram, sent: HashTracker(ram, sent),
}
"""Every tracker, best first."""


@dataclass(frozen=True)
class TrackerFinding:
    """What probing one tracker showed."""

    kind: str
    usable: bool
    reason: str
    """What was tried and seen, for people."""


@dataclass(frozen=True)
class HugePagesFinding:
    """What one file in a folder for guest memory showed."""

    folder: str
    """Where it was made."""
    usable: bool
    reason: str
    """What was tried and seen, for people."""


def probe_huge_pages(folder: Path) -> HugePagesFinding:
    """Write one byte to a file with room for one huge page, in a folder or where that is going to be made."""
    there = folder
    try:
        there = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
        with tempfile.TemporaryFile(dir=there) as file:
            os.ftruncate(file.fileno(), HUGE_PAGE_BYTES)
            os.pwrite(file.fileno(), b"\1", 0)
            taken = os.fstat(file.fileno()).st_blocks * _BLOCK_BYTES
    except OSError as error:
        return HugePagesFinding(str(there), usable=False, reason=f"no file can be written: {error.strerror}")
    usable = taken >= HUGE_PAGE_BYTES
    remedy = "" if usable else "; it may be different on a tmpfs that is mounted with huge=within_size"
    return HugePagesFinding(str(there), usable, f"one byte took {taken // 1024} KiB of memory{remedy}")


def probe_trackers() -> list[TrackerFinding]:
    """Try every tracker on a small process of our own, best first; takes about a fifth of a second."""
    with _subject() as (mapped, ram, touch):
        return [_probe(kind, make, mapped, ram, touch) for kind, make in _TRACKERS.items()]


def choose_tracker(
    mapped: MappedRegion,
    ram: RamFile,
    sent: PageTable,
    insist: str = "",
    *,
    findings: Sequence[TrackerFinding] | None = None,
) -> Tracker:
    """The best tracker that works here, not yet armed; or the one that ``insist`` names.

    Args:
        mapped: where the machine has its memory.
        ram: that memory.
        sent: what was last sent of it.
        insist: kind of the tracker that it must be, if not empty.
        findings: what :func:`probe_trackers` found on this host; it is asked now if this is missing.

    Raises:
        TrackerUnavailableError: there is no such tracker, or it does not work here.
    """
    findings = probe_trackers() if findings is None else findings
    if mapped.huge:
        # The kernel keeps no such bits for huge pages, and says nothing about it.
        findings = [finding for finding in findings if finding.kind != SOFT_DIRTY_KIND]
    for finding in findings:
        if finding.usable and insist in ("", finding.kind):
            return _TRACKERS[finding.kind](mapped, ram, sent)
    told = "; ".join(
        f"{finding.kind}: {'usable' if finding.usable else 'not usable'}, {finding.reason}"
        for finding in findings
    )
    raise TrackerUnavailableError(f"the tracker {insist!r} cannot be used here ({told})", insist=insist)


def _probe(
    kind: str, make: _Make, mapped: MappedRegion, ram: RamFile, touch: Callable[[int], None]
) -> TrackerFinding:
    """Use one tracker for one write."""
    sent = PageTable(_PAGES)
    whole = [(0, _PAGES)]
    content = bytearray(_PAGES * PAGE_SIZE)
    tracker = make(mapped, ram, sent)
    try:
        tracker.arm()
        tracker.scan()
        ram.read_pages(whole, content)
        sent.note_pages(whole, content)
        untouched = tracker.scan()
        touch(_TOUCHED_PAGE)
        seen = tracker.scan()
    except VmferryError as exc:
        return TrackerFinding(kind, usable=False, reason=exc.message)
    finally:
        tracker.disarm()
    if not untouched and seen == PageRuns([(_TOUCHED_PAGE, 1)]):
        return TrackerFinding(kind, usable=True, reason="saw one write of another process, and no other page")
    return TrackerFinding(
        kind,
        usable=False,
        reason=f"armed without an error, but told of {seen.page_count} pages after one was written, and of "
        f"{untouched.page_count} before that (a kernel may lack this feature without refusing its use)",
    )


@contextmanager
def _subject() -> Iterator[tuple[MappedRegion, RamFile, Callable[[int], None]]]:
    """A process that maps a small memory file and writes to a page when told."""
    fd = os.memfd_create("vmferry-probe")
    size = _PAGES * PAGE_SIZE
    os.ftruncate(fd, size)
    region = Region("probe", Path(f"/proc/{os.getpid()}/fd/{fd}"), size)
    with (
        RamFile(fd, region.path, size) as ram,
        subprocess.Popen(  # noqa: S603 (our own interpreter and text, no shell)
            [sys.executable, "-I", "-S", "-c", _SUBJECT, str(fd), str(size)],
            pass_fds=[fd],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        requests, answers = process.stdin, process.stdout
        answers.readline()

        def touch(page: int) -> None:
            requests.write(f"{page}\n")
            requests.flush()
            answers.readline()

        try:
            yield find_mapping(process.pid, region), ram, touch
        finally:
            requests.close()
