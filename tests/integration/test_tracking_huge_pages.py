"""No write to memory in huge pages is lost, and of what the kernel names only what changed is reported."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hugepages import huge_folder
from tests.integration.subjects import Shadow, Subject
from tests.support import require
from vmferry.errors import TrackerUnavailableError
from vmferry.memory.hugepages import HUGE_PAGE_BYTES
from vmferry.memory.probe import TrackerFinding, choose_tracker, probe_trackers
from vmferry.memory.regions import RamFile
from vmferry.memory.runs import PAGE_SIZE, PageRuns
from vmferry.memory.trackers import HashTracker, HugePageTracker, PagemapScanTracker

SIZE = 64 * 1024 * 1024
PAGES = SIZE // PAGE_SIZE
IN_ONE = HUGE_PAGE_BYTES // PAGE_SIZE
WRITING_SECONDS = 1.5


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A hugetlbfs with room for one file."""
    with huge_folder(SIZE >> 20) as mounted:
        yield mounted


@pytest.fixture(scope="module")
def findings() -> list[TrackerFinding]:
    """What this host offers."""
    return probe_trackers()


@pytest.fixture(params=[True, False], ids=["registered by itself", "attached to"])
def subject(folder: Path, request: pytest.FixtureRequest) -> Iterator[Subject]:
    """A process that maps such a file."""
    path = folder / "machine.ram"
    try:
        with RamFile.create(path, SIZE) as ram:
            made = Subject(ram, registers_itself=request.param)
            try:
                yield made
            finally:
                made.end()
    finally:
        path.unlink()


def tracker_of(subject: Subject, findings: list[TrackerFinding]) -> HugePageTracker:
    """The tracker that is chosen for it; the test is left out where there is only the slow one."""
    found = next(finding for finding in findings if finding.kind == "pagemap-scan")
    require(found.usable, f"pagemap-scan: {found.reason}")
    tracker = choose_tracker(subject.mapped, subject.ram, subject.sent, findings=findings)
    assert isinstance(tracker, HugePageTracker)
    return tracker


def test_a_scan_reports_what_changed_and_nothing_else(
    subject: Subject, findings: list[TrackerFinding]
) -> None:
    """In pages that were there, that come to be, and that somebody else has filled; counting takes nothing."""
    tracker, shadow = tracker_of(subject, findings), Shadow(subject)
    subject.ram.write_pages([(9 * IN_ONE, IN_ONE)], memoryview(b"x" * HUGE_PAGE_BYTES))
    subject.tell("write 1 2 3 700")
    try:
        tracker.arm()
        shadow.copy(PageRuns.whole(PAGES))
        assert not tracker.scan()
        pages = [2, 7, 8, 700, 5 * IN_ONE, 9 * IN_ONE + 3, PAGES - 1]
        subject.tell("write " + " ".join(map(str, pages)))
        assert tracker.count() == tracker.count() == len(pages)
        written = tracker.scan()
        assert {page for first, count in written for page in range(first, first + count)} == set(pages)
        shadow.copy(written)
        assert not tracker.scan()
        assert tracker.count() == 0
        subject.tell("odd")
        shadow.copy(tracker.scan())
        assert shadow.wrong_pages() == []
    finally:
        tracker.disarm()
        tracker.disarm()


def test_the_kernel_names_only_huge_pages_that_were_written(
    subject: Subject, findings: list[TrackerFinding]
) -> None:
    """Pages without an entry are not read again at each scan, however much lies in them."""
    tracker_of(subject, findings)
    subject.ram.write_pages([(0, PAGES)], memoryview(b"y" * SIZE))
    tracker = PagemapScanTracker(subject.mapped)
    try:
        tracker.arm()
        assert not tracker.scan()
        subject.tell(f"write {3 * IN_ONE + 1}")
        assert tracker.peek() == tracker.peek() == PageRuns([(3 * IN_ONE, IN_ONE)])
        assert tracker.scan() == PageRuns([(3 * IN_ONE, IN_ONE)])
        assert not tracker.scan()
    finally:
        tracker.disarm()


def test_no_write_of_a_process_that_never_rests_is_lost(
    subject: Subject, findings: list[TrackerFinding]
) -> None:
    """After random writes at full speed during scans and copies, the shadow equals the file byte for byte."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    tracker, shadow = tracker_of(subject, findings), Shadow(subject)
    try:
        tracker.arm()
        shadow.copy(PageRuns.whole(PAGES))
        assert subject.tell(f"storm {seed}") == "storming"
        rounds = 0
        deadline = time.monotonic() + WRITING_SECONDS
        while time.monotonic() < deadline:
            shadow.copy(tracker.scan())
            rounds += 1
        assert shadow.wrong_pages(), "the subject did not write while it was tracked"
        assert subject.tell("write 0") == "done"
        assert subject.answer() == "done"
        shadow.copy(tracker.scan())
    finally:
        tracker.disarm()
    assert rounds > 1
    assert shadow.wrong_pages() == []


def test_bits_that_huge_pages_do_not_have_are_never_trusted(
    subject: Subject, findings: list[TrackerFinding]
) -> None:
    """The tracker that reads them is refused by name, whatever was found about it; the slow one works."""
    said = [TrackerFinding(kind, usable=True, reason="said") for kind in ("soft-dirty", "hash")]
    assert isinstance(choose_tracker(subject.mapped, subject.ram, subject.sent, findings=said), HashTracker)
    with pytest.raises(TrackerUnavailableError, match="soft-dirty"):
        choose_tracker(subject.mapped, subject.ram, subject.sent, "soft-dirty", findings=said)
