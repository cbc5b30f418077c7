"""When a guest's clock may be set, and how what was found travels."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmferry.machines.agent import Reading
from vmferry.machines.clock import (
    CLOCK_DEVICE,
    GUEST_AGENT,
    NONE,
    RTC,
    ClockFinding,
    finding_of,
    is_safe,
    tell,
)
from vmferry.v1 import clock_pb2

MS = 10**6
NOW = 1_800_000_000_000 * MS


def reading(offset_ms: float, took_ms: float) -> Reading:
    """A guest whose clock is off by so much, read in the middle of so long."""
    asked = NOW
    return Reading(round(asked + (took_ms / 2 + offset_ms) * MS), asked, round(asked + took_ms * MS))


@pytest.mark.parametrize(
    ("offsets", "took_ms", "safe"),
    [
        ((-1000, -1000, -1000), 2, True),
        ((-50, -50, -50), 2, True),
        ((-50, -50, -50), 20, False),
        ((-1, -1, -1), 2, False),
        ((0, 0, 0), 2, False),
        ((1000, 1000, 1000), 2, False),
        ((-1000, -1000, 5), 2, False),
    ],
)
def test_a_clock_is_set_if_it_is_behind_by_far_more_than_an_answer_takes(
    offsets: tuple[float, ...], took_ms: float, *, safe: bool
) -> None:
    """Not one that is ahead, and not one that the time on its way would overtake."""
    assert is_safe([reading(offset, took_ms) for offset in offsets]) is safe


@given(
    st.integers(-30_000, 30_000),
    st.lists(st.floats(0.1, 500), min_size=3, max_size=3),
    st.floats(0, 1),
)
def test_what_is_safe_does_not_go_back(offset_ms: int, took_ms: list[float], where: float) -> None:
    """An agent that sets its clock as late as its slowest answer came never sets it to what it had passed."""
    readings = [
        Reading(round(NOW + (took * where + offset_ms) * MS), NOW, round(NOW + took * MS)) for took in took_ms
    ]
    if is_safe(readings):
        late_ms = max(took_ms)
        own_ms = late_ms + offset_ms  # what the guest's clock has come to, counted from NOW
        assert own_ms < 0  # and what it is given is NOW, or later


def test_what_another_host_found_is_completed_with_the_pause() -> None:
    """Which only the source knows; what was measured stays as it was measured."""
    measured = ClockFinding(-5000, -3, GUEST_AGENT, measured=True, note="n", uncertainty_us=7)
    message = clock_pb2.ClockReport()
    tell(measured, message)
    assert finding_of(message, 0.1) == measured
    tell(ClockFinding(0, 0, RTC, measured=False), message)
    assert finding_of(message, 0.1) == ClockFinding(-100_000, -100_000, RTC, measured=False)
    assert finding_of(message) == ClockFinding(0, 0, RTC, measured=False)
    tell(ClockFinding(0, 0, CLOCK_DEVICE, measured=False), message)
    assert finding_of(message, 0.1) == ClockFinding(-100_000, 0, CLOCK_DEVICE, measured=False)


def test_words_of_another_host_are_bounded() -> None:
    """A method that is none, and a note without end."""
    found = finding_of(clock_pb2.ClockReport(method="magic", note="x" * 10_000))
    assert found.method == NONE
    assert len(found.note) == 500
