"""The policy switches when the pause fits, goes on while it helps, and gives up when it cannot."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmferry.transfer.convergence import FIXED_DOWNTIME_S, Limits, RoundReport, Verdict, decide

MB = 1_000_000
LIMITS = Limits(downtime_s=0.3, max_rounds=30)


def rounds(*dirty: int, rate: int = 100 * MB, seconds: float = 1.0) -> list[RoundReport]:
    return [
        RoundReport(number, seconds, int(rate * seconds), bytes_)
        for number, bytes_ in enumerate(dirty, start=1)
    ]


@pytest.mark.parametrize(
    ("history", "verdict"),
    [
        pytest.param(rounds(0), Verdict.SWITCH, id="nothing left"),
        pytest.param(rounds(1 * MB), Verdict.SWITCH, id="next to nothing left"),
        pytest.param(rounds(27 * MB, seconds=0.3), Verdict.SWITCH, id="fits, and stays about as much"),
        pytest.param(
            rounds(27 * MB), Verdict.CONTINUE, id="fits, and one more round makes the pause much shorter"
        ),
        pytest.param(rounds(29 * MB), Verdict.CONTINUE, id="the rest does not fit yet"),
        pytest.param(rounds(90 * MB, 60 * MB, 40 * MB), Verdict.CONTINUE, id="it shrinks"),
        pytest.param(rounds(200 * MB), Verdict.CONTINUE, id="too fast, but only one round has shown it"),
        pytest.param(rounds(*[200 * MB] * 4), Verdict.CONTINUE, id="four rounds are not enough to give up"),
        pytest.param(rounds(*[200 * MB] * 5), Verdict.GIVE_UP, id="five rounds without progress"),
        pytest.param(
            rounds(400 * MB, 350 * MB, 300 * MB, 250 * MB, 200 * MB),
            Verdict.CONTINUE,
            id="too fast but shrinking",
        ),
        pytest.param(rounds(*[90 * MB] * 30), Verdict.GIVE_UP, id="as many rounds as allowed"),
        pytest.param(rounds(*[90 * MB] * 29, 20 * MB), Verdict.SWITCH, id="fits in the last round allowed"),
    ],
)
def test_verdicts(history: list[RoundReport], verdict: Verdict) -> None:
    """Each situation has its verdict."""
    assert decide(history, LIMITS).verdict is verdict


def test_the_figures_are_those_of_the_last_rounds() -> None:
    """Rates are measured, and the predicted pause follows from them."""
    decision = decide(rounds(50 * MB), LIMITS)
    assert decision.bytes_per_second == 100 * MB
    assert decision.dirty_bytes_per_second == 50 * MB
    assert decision.expected_downtime_s == pytest.approx(FIXED_DOWNTIME_S + 0.5)
    assert decision.eta_s == pytest.approx(1.0)


def test_there_is_no_eta_without_convergence() -> None:
    """A guest that writes faster than can be sent has no predicted end."""
    assert decide(rounds(150 * MB), LIMITS).eta_s is None


def test_rounds_that_sent_nothing_do_not_spoil_the_rate() -> None:
    """An empty round says nothing about the link."""
    history = [RoundReport(1, 1.0, 100 * MB, 50 * MB), RoundReport(2, 0.5, 0, 50 * MB)]
    assert decide(history, LIMITS).bytes_per_second == 100 * MB


@given(
    dirty=st.integers(0, 10**12),
    sent=st.integers(0, 10**12),
    seconds=st.floats(0, 1e4),
    limit_ms=st.integers(1, 10_000),
    number=st.integers(1, 30),
)
def test_never_switches_beyond_the_limit(
    dirty: int, sent: int, seconds: float, limit_ms: int, number: int
) -> None:
    """Whatever was measured, a switch is predicted to fit, or there is nothing left to send."""
    decision = decide([RoundReport(number, seconds, sent, dirty)], Limits(limit_ms / 1e3, 30))
    if decision.verdict is Verdict.SWITCH:
        assert dirty == 0 or decision.expected_downtime_s <= limit_ms / 1e3
