"""No write to memory in huge pages is lost, and of what the kernel names only what changed is reported."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from source_svc.guest_rate import QUICK, GuestRate
from tests.hugepages import huge_folder, huge_tmpfs, mapped_whole_bytes
from tests.integration.subjects import Shadow, Subject
from tests.support import require
from vmferry.errors import TrackerUnavailableError
from vmferry.machines.qmp import QmpMachine
from vmferry.memory.hugepages import HUGE_PAGE_BYTES
from vmferry.memory.pagemap import PageMap, Written
from vmferry.memory.probe import TrackerFinding, choose_tracker, probe_trackers
from vmferry.memory.regions import RamFile
from vmferry.memory.runs import PAGE_SIZE, PageRuns
from vmferry.memory.trackers import HashTracker, PagemapScanTracker

SIZE = 64 * 1024 * 1024
PAGES = SIZE // PAGE_SIZE
IN_ONE = HUGE_PAGE_BYTES // PAGE_SIZE
WRITING_SECONDS = 1.5


@pytest.fixture(scope="module", params=["hugetlbfs", "tmpfs"])
def folder(request: pytest.FixtureRequest) -> Iterator[Path]:
    """Where one file has room whose memory is in huge pages."""
    with huge_folder(SIZE >> 20) if request.param == "hugetlbfs" else huge_tmpfs() as mounted:
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


def tracker_of(subject: Subject, findings: list[TrackerFinding]) -> PagemapScanTracker:
    """The tracker that is chosen for it; the test is left out where there is only the slow one."""
    found = next(finding for finding in findings if finding.kind == "pagemap-scan")
    require(found.usable, f"pagemap-scan: {found.reason}")
    tracker = choose_tracker(subject.mapped, subject.ram, subject.sent, findings=findings)
    assert isinstance(tracker, PagemapScanTracker)
    return tracker


def in_huge_pages(subject: Subject) -> None:
    """Fill a subject's memory, and have it map all of it in huge pages."""
    subject.ram.write_pages([(0, PAGES)], memoryview(b"y" * SIZE))
    subject.tell("write " + " ".join(str(page) for page in range(0, PAGES, IN_ONE)))
    if not subject.mapped.huge:
        mapped = mapped_whole_bytes(subject.process.pid)
        require(mapped == SIZE, f"the kernel has only {mapped} bytes of a tmpfs in huge pages")


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
    tracker = tracker_of(subject, findings)
    in_huge_pages(subject)
    pages = PageMap(subject.mapped)
    try:
        tracker.arm()
        pages.take_written()
        subject.tell(f"write {3 * IN_ONE + 1}")
        whole = Written(PageRuns(), PageRuns([(3 * IN_ONE, IN_ONE)]))
        assert pages.peek_written() == pages.peek_written() == whole
        assert pages.take_written() == whole
        assert pages.take_written() == Written(PageRuns(), PageRuns())
    finally:
        pages.close()
        tracker.disarm()


def test_of_a_huge_page_that_is_there_only_what_changed_is_reported(
    subject: Subject, findings: list[TrackerFinding]
) -> None:
    """Again and again; nothing that was sent is sent twice."""
    tracker, shadow = tracker_of(subject, findings), Shadow(subject)
    in_huge_pages(subject)
    try:
        tracker.arm()
        shadow.copy(PageRuns.whole(PAGES))
        for pages in ([5, 1000, 1001, 9000], [6, 1002, 9001], [0, PAGES - 1]):
            subject.tell("write " + " ".join(map(str, pages)))
            assert tracker.count() == len(pages)
            written = tracker.scan()
            assert {page for first, count in written for page in range(first, first + count)} == set(pages)
            shadow.copy(written)
        assert shadow.wrong_pages() == []
    finally:
        tracker.disarm()


async def test_how_fast_a_guest_writes_is_not_guessed_from_huge_pages(
    subject: Subject, findings: list[TrackerFinding]
) -> None:
    """Each write would count as 512; the prediction is told that nobody knows."""
    tracker_of(subject, findings)
    in_huge_pages(subject)
    machine = SimpleNamespace(pid=subject.process.pid, ram=subject.region)
    rate = GuestRate(cast("QmpMachine", machine), "pagemap-scan", findings)
    assert subject.tell("storm 1") == "storming"
    with pytest.raises(TrackerUnavailableError, match="nothing was sent yet"):
        await rate.look(QUICK)
    assert rate.curve is None
    assert not rate.armed


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


@pytest.mark.parametrize("folder", ["hugetlbfs"], indirect=True)
def test_bits_that_huge_pages_do_not_have_are_never_trusted(
    subject: Subject, findings: list[TrackerFinding]
) -> None:
    """The tracker that reads them is refused by name, whatever was found about it; the slow one works."""
    said = [TrackerFinding(kind, usable=True, reason="said") for kind in ("soft-dirty", "hash")]
    assert isinstance(choose_tracker(subject.mapped, subject.ram, subject.sent, findings=said), HashTracker)
    with pytest.raises(TrackerUnavailableError, match="soft-dirty"):
        choose_tracker(subject.mapped, subject.ram, subject.sent, "soft-dirty", findings=said)
