"""No write of another process is lost, whichever tracker reports it.

The subject is a real process that maps the same RAM file and writes while it is being tracked. What the tracker
reports is copied to a shadow in the order the engine prescribes: scan, then read. In the end the shadow must equal
the file.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.integration.subjects import Shadow, Subject
from tests.support import require
from vmferry.errors import MachineDeadError, TrackerUnavailableError
from vmferry.memory.probe import TrackerFinding, choose_tracker, probe_trackers
from vmferry.memory.regions import RamFile
from vmferry.memory.runs import PAGE_SIZE, PageRuns
from vmferry.memory.trackers import HashTracker, PagemapScanTracker, SoftDirtyTracker, Tracker

PAGES = 16384
SIZE = PAGES * PAGE_SIZE
WRITING_SECONDS = 1.5


@pytest.fixture
def make_subject() -> Iterator[Callable[..., Subject]]:
    """Starts subjects with a RAM file each, and ends them."""
    started: list[Subject] = []

    def make(*, registers_itself: bool = False, pages: int = PAGES) -> Subject:
        fd = os.memfd_create("test-tracking")
        os.ftruncate(fd, pages * PAGE_SIZE)
        ram = RamFile(fd, Path(f"/proc/{os.getpid()}/fd/{fd}"), pages * PAGE_SIZE)
        try:
            started.append(Subject(ram, registers_itself=registers_itself))
        except BaseException:
            ram.close()
            raise
        return started[-1]

    yield make
    for subject in started:
        subject.end()
        subject.ram.close()


@pytest.fixture(scope="module")
def findings() -> dict[str, TrackerFinding]:
    """What this host offers."""
    return {finding.kind: finding for finding in probe_trackers()}


def make_tracker(kind: str, subject: Subject, findings: dict[str, TrackerFinding]) -> Tracker:
    if kind == "soft-dirty" and not findings[kind].usable:
        pytest.skip(f"kernels are built with soft-dirty or without it: {findings[kind].reason}")
    require(findings[kind].usable, f"{kind}: {findings[kind].reason}")
    return choose_tracker(subject.mapped, subject.ram, subject.sent, kind)


TRACKED = [("pagemap-scan", True), ("pagemap-scan", False), ("soft-dirty", False), ("hash", False)]


@pytest.mark.parametrize(("kind", "registers_itself"), TRACKED)
def test_no_write_of_a_process_that_never_rests_is_lost(
    kind: str,
    registers_itself: bool,
    make_subject: Callable[..., Subject],
    findings: dict[str, TrackerFinding],
) -> None:
    """After random writes at full speed during scans and copies, the shadow equals the file byte for byte."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    subject = make_subject(registers_itself=registers_itself, pages=4096)
    tracker, shadow = make_tracker(kind, subject, findings), Shadow(subject)
    try:
        tracker.arm()
        shadow.copy(PageRuns.whole(subject.ram.page_count))
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
    assert rounds > 3
    assert shadow.wrong_pages() == []


@pytest.mark.parametrize(("kind", "registers_itself"), TRACKED)
def test_a_scan_reports_each_write_once(
    kind: str,
    registers_itself: bool,
    make_subject: Callable[..., Subject],
    findings: dict[str, TrackerFinding],
) -> None:
    """Written pages and no others are reported, counted without being taken, and not reported again."""
    subject = make_subject(registers_itself=registers_itself)
    tracker, shadow = make_tracker(kind, subject, findings), Shadow(subject)
    try:
        subject.tell("write 1 2 3 100")
        tracker.arm()
        shadow.copy(PageRuns.whole(PAGES))
        tracker.scan()
        assert tracker.count() == 0
        subject.tell("write 2 7 8 9000")
        assert tracker.count() == 4
        assert tracker.count() == 4
        written = tracker.scan()
        assert list(written) == [(2, 1), (7, 2), (9000, 1)]
        shadow.copy(written)
        assert not tracker.scan()
        subject.tell("odd")
        written = tracker.scan()
        assert written == PageRuns((page, 1) for page in range(1, PAGES, 2))
        shadow.copy(written)
        assert not tracker.scan()
        assert shadow.wrong_pages() == []
    finally:
        tracker.disarm()
        tracker.disarm()


@pytest.mark.parametrize("count", [500, 1500, 4097, 5000])
def test_more_runs_than_the_kernel_tells_at_once_are_each_told_once(
    count: int, make_subject: Callable[..., Subject], findings: dict[str, TrackerFinding]
) -> None:
    """Many scattered pages are counted and reported exactly, however often the kernel's buffers fill."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    pages = sorted(random.Random(seed).sample(range(PAGES), count))
    subject = make_subject()
    tracker = make_tracker("pagemap-scan", subject, findings)
    tracker.arm()
    try:
        subject.tell("write " + " ".join(map(str, pages)))
        assert tracker.count() == count
        assert tracker.scan() == PageRuns((page, 1) for page in pages)
        assert tracker.count() == 0
    finally:
        tracker.disarm()


class LeakyTracker(PagemapScanTracker):
    """A tracker with a fault: it keeps one page to itself."""

    lost_page = 4711

    def scan(self) -> PageRuns:
        """What was written, but for one page."""
        return super().scan().difference(PageRuns([(self.lost_page, 1)]))


def test_the_comparison_notices_one_lost_page(
    make_subject: Callable[..., Subject], findings: dict[str, TrackerFinding]
) -> None:
    """A tracker that withholds a single page is caught, so that passing means something."""
    require(findings["pagemap-scan"].usable, findings["pagemap-scan"].reason)
    subject = make_subject()
    tracker, shadow = LeakyTracker(subject.mapped), Shadow(subject)
    tracker.arm()
    try:
        shadow.copy(PageRuns.whole(PAGES))
        subject.tell("write 10 4711 9999")
        shadow.copy(tracker.scan())
        assert shadow.wrong_pages() == [4711]
    finally:
        tracker.disarm()


def test_reading_before_protecting_loses_a_write(
    make_subject: Callable[..., Subject], findings: dict[str, TrackerFinding]
) -> None:
    """The order scan, read is needed: with read, scan, a write in between is lost and noticed here."""
    subject = make_subject()
    tracker, shadow = make_tracker("pagemap-scan", subject, findings), Shadow(subject)
    tracker.arm()
    try:
        subject.tell("write 5")
        shadow.copy(PageRuns.whole(PAGES))  # the wrong order: read first ...
        subject.tell("write 5")
        assert list(tracker.scan()) == [(5, 1)]  # ... and take the report as answered
        shadow.copy(tracker.scan())
        assert shadow.wrong_pages() == [5]
    finally:
        tracker.disarm()


def test_a_write_by_the_kernel_for_the_process_is_seen(
    make_subject: Callable[..., Subject], findings: dict[str, TrackerFinding]
) -> None:
    """A read(2) into guest memory, as a disk of the machine does it, is a write like any other."""
    subject = make_subject()
    tracker = make_tracker("pagemap-scan", subject, findings)
    tracker.arm()
    try:
        subject.tell("read-file 321")
        assert list(tracker.scan()) == [(321, 1)]
    finally:
        tracker.disarm()


def test_writes_whose_page_table_was_dropped_are_still_reported(
    make_subject: Callable[..., Subject], findings: dict[str, TrackerFinding]
) -> None:
    """When the kernel throws the notes away, the pages count as written."""
    subject = make_subject()
    tracker = make_tracker("pagemap-scan", subject, findings)
    tracker.arm()
    try:
        subject.tell("odd")
        subject.tell("drop")
        odd = PageRuns((page, 1) for page in range(1, PAGES, 2))
        assert tracker.scan().intersection(odd) == odd
        assert not tracker.scan()
    finally:
        tracker.disarm()


def test_hash_notices_a_page_that_changed_was_sent_and_changed_back(
    make_subject: Callable[..., Subject],
) -> None:
    """It compares with what was sent, not with what an earlier scan saw."""
    subject = make_subject()
    ram, page = subject.ram, bytearray(PAGE_SIZE)
    tracker = HashTracker(ram, subject.sent)
    assert not tracker.scan()
    ram.write_pages([(6, 1)], memoryview(b"b" * PAGE_SIZE))
    ram.read_pages([(6, 1)], page)
    subject.sent.note_pages([(6, 1)], page)
    ram.punch(6, 1)
    assert list(tracker.scan()) == [(6, 1)]


@pytest.mark.parametrize("registers_itself", [True, False])
def test_a_process_that_ended_is_reported_as_dead(
    registers_itself: bool, make_subject: Callable[..., Subject], findings: dict[str, TrackerFinding]
) -> None:
    """The kernel says that a dead process wrote nothing; the tracker does not."""
    subject = make_subject(registers_itself=registers_itself)
    mapped = subject.mapped
    tracker = make_tracker("pagemap-scan", subject, findings)
    tracker.arm()
    subject.tell("write 1")
    subject.end()
    for act in (tracker.scan, tracker.count, tracker.arm):
        with pytest.raises(MachineDeadError):
            act()
    tracker.disarm()
    for made in (PagemapScanTracker(mapped), SoftDirtyTracker(mapped, subject.ram, subject.sent)):
        with pytest.raises(MachineDeadError):
            made.arm()
        made.disarm()


@pytest.mark.parametrize("command", ["move", "replace"])
def test_memory_that_moved_is_refused(
    command: str, make_subject: Callable[..., Subject], findings: dict[str, TrackerFinding]
) -> None:
    """A mapping that was replaced has no notes; its scan fails instead of reporting nothing."""
    subject = make_subject()
    tracker = make_tracker("pagemap-scan", subject, findings)
    tracker.arm()
    try:
        subject.tell(command)
        subject.tell("write 3")
        with pytest.raises(TrackerUnavailableError):
            tracker.scan()
    finally:
        tracker.disarm()


def test_a_tracker_that_is_not_armed_refuses_to_answer(make_subject: Callable[..., Subject]) -> None:
    """An empty answer would mean that nothing was written."""
    with pytest.raises(TrackerUnavailableError, match="not armed"):
        PagemapScanTracker(make_subject().mapped).scan()
