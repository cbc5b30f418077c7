"""Memory that a guest gave up after it was sent: no tracker reports it, and it reads as zero."""

from __future__ import annotations

import os
from pathlib import Path

from vmferry.memory.digest import PageTable
from vmferry.memory.regions import RamFile
from vmferry.memory.runs import PAGE_SIZE, PageRuns
from vmferry.memory.trackers import given_up

PAGES = 600


def test_exactly_what_was_sent_and_is_a_hole_now_is_found() -> None:
    """Pages that were zero when they were sent are not, nor are those that were written again."""
    fd = os.memfd_create("test-given-up")
    os.ftruncate(fd, PAGES * PAGE_SIZE)
    with RamFile(fd, Path(f"/proc/self/fd/{fd}"), PAGES * PAGE_SIZE) as ram:
        sent = PageTable(PAGES)
        data = b"\1" * PAGE_SIZE * 400
        ram.write_pages([(100, 400)], memoryview(data))
        sent.note_pages([(100, 400)], data)
        assert not given_up(ram, sent)
        ram.punch(90, 20)
        ram.punch(300, 250)
        ram.write_pages([(310, 1)], memoryview(bytes(PAGE_SIZE)))
        assert given_up(ram, sent) == PageRuns([(100, 10), (300, 10), (311, 189)])
        sent.note_zero([(100, 10), (300, 200)])
        assert not given_up(ram, sent)
