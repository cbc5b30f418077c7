"""Reading the canary's verdict from serial output."""

from __future__ import annotations

import pytest

from vmferry.machines.microvm.verdict import CanaryLine, CanaryProblem, latest, verdict

GOOD = (
    "canary ready pages=512 working=0\n"
    "canary tick=10 sweep=0 pos=10 checked=40 bad=0 gap_us=1100\n"
    "canary tick=90 sweep=0 pos=90 checked=360 bad=0 gap_us=5400\n"
)


def test_a_healthy_canary_is_ok() -> None:
    """Signs of life without complaints are what ok means."""
    found = verdict(GOOD + "canary verify pages=512 working=0 bad=0\n")
    assert (found.ok, found.bad, found.ticks, found.largest_gap_us) == (True, 0, 90, 5400)
    assert found.verifies[0].pages == 512


def test_the_latest_line_is_the_last_complete_one() -> None:
    """A line still being written is not read."""
    assert latest(GOOD + "canary tick=99 sweep=0 po") == CanaryLine(90, 0, 90, 360, 0, 5400)


@pytest.mark.parametrize(
    "complaint",
    [
        "canary BAD kind=stale page=3 want=2 got=1\n",
        "canary verify pages=512 working=0 bad=1\n",
        "canary tick=91 sweep=0 pos=91 checked=364 bad=2 gap_us=1\n",
        "canary error: resident and working set do not fit into memory\n",
    ],
)
def test_one_complaint_among_good_lines_is_not_ok(complaint: str) -> None:
    """Good lines before and after do not outweigh it."""
    assert not verdict(GOOD + complaint + GOOD).ok


def test_a_problem_is_told_in_full() -> None:
    """Kind, page and both values are there."""
    found = verdict(GOOD + "canary BAD kind=stale page=3 want=2 got=1\n")
    assert found.problems == (CanaryProblem("stale", 3, 2, 1),)


@pytest.mark.parametrize("serial", ["", "canary ready pages=512 working=0\n"])
def test_a_canary_that_has_not_spoken_is_not_ok(serial: str) -> None:
    """Silence proves nothing."""
    assert not verdict(serial).ok
    assert latest(serial) is None
