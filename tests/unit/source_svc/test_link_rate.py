"""How fast a link is said to be, by a short burst on a computer that has other things to do."""

from __future__ import annotations

import pytest

from source_svc.link_rate import on_the_way_s


@pytest.mark.parametrize(
    ("elapsed_s", "round_trip_s", "expected_s"),
    [
        pytest.param(0.030, 0.002, 0.028, id="an empty call is taken off"),
        pytest.param(0.030, 0.0, 0.030, id="which may take no time"),
        pytest.param(0.010, 0.009, 0.005, id="but never more than half"),
        pytest.param(0.010, 0.050, 0.005, id="also if it waited for longer than the pages took"),
    ],
)
def test_a_round_trip_makes_a_link_no_more_than_twice_as_fast(
    elapsed_s: float, round_trip_s: float, expected_s: float
) -> None:
    """One that waited for a processor made 5.3 GB/s of a link of 118 MB/s, and pages went raw."""
    assert on_the_way_s(elapsed_s, round_trip_s) == pytest.approx(expected_s)
