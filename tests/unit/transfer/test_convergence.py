"""The policy switches when the pause fits, goes on while it helps, and gives up when it cannot."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmferry.transfer.convergence import (
    FIXED_DOWNTIME_S,
    MAX_THROTTLE_PERCENT,
    Effort,
    Limits,
    OnNoConvergence,
    RoundReport,
    Verdict,
    decide,
)

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


# What is tried for a guest that writes too fast; the link sends 100 MB/s.
STUCK = rounds(*[60 * MB] * 5, seconds=0.5)
"""Five rounds that leave 60 MB each: a pause of 620 ms."""
SHRUNK = rounds(*[60 * MB] * 5, 20 * MB, seconds=0.5)
STAYED = rounds(*[60 * MB] * 8, seconds=0.5)
TOOK_LONG = [RoundReport(number, 40.0, 4000 * MB, 3900 * MB) for number in (1, 2, 3)]


def limits(**changes: object) -> Limits:
    return replace(LIMITS, **changes)


@pytest.mark.parametrize(
    ("history", "told", "effort", "verdict", "downtime_s", "throttle"),
    [
        pytest.param(
            STUCK,
            limits(max_downtime_s=1.0),
            Effort(),
            Verdict.SWITCH,
            0.65,
            0,
            id="a longer pause is enough",
        ),
        pytest.param(
            STUCK[:4],
            limits(max_downtime_s=1.0),
            Effort(),
            Verdict.CONTINUE,
            0.3,
            0,
            id="not before it stalls",
        ),
        pytest.param(
            STUCK, limits(max_downtime_s=0.5), Effort(), Verdict.GIVE_UP, 0.5, 0, id="even the longest is not"
        ),
        pytest.param(
            STUCK, limits(max_throttle_percent=80), Effort(), Verdict.CONTINUE, 0.3, 20, id="the first step"
        ),
        pytest.param(
            STUCK,
            limits(max_downtime_s=0.5, max_throttle_percent=80),
            Effort(),
            Verdict.CONTINUE,
            0.5,
            20,
            id="the guest is slowed down only after the pause was raised",
        ),
        pytest.param(
            STAYED[:7],
            limits(max_throttle_percent=80),
            Effort(0, 20, 5),
            Verdict.CONTINUE,
            0.3,
            20,
            id="a step has its time to help",
        ),
        pytest.param(
            STAYED,
            limits(max_throttle_percent=80),
            Effort(0, 20, 5),
            Verdict.CONTINUE,
            0.3,
            40,
            id="and is followed by the next if it did not",
        ),
        pytest.param(
            STAYED,
            limits(max_throttle_percent=50),
            Effort(0, 40, 5),
            Verdict.CONTINUE,
            0.3,
            50,
            id="the last step is what is allowed",
        ),
        pytest.param(
            STAYED,
            limits(max_throttle_percent=50),
            Effort(0, 50, 5),
            Verdict.GIVE_UP,
            0.3,
            50,
            id="no further than what is allowed",
        ),
        pytest.param(
            STAYED,
            limits(max_throttle_percent=30),
            Effort(0, 80, 7),
            Verdict.CONTINUE,
            0.3,
            30,
            id="what is not allowed any more is taken back",
        ),
        pytest.param(
            SHRUNK,
            limits(max_throttle_percent=80),
            Effort(0, 20, 5),
            Verdict.SWITCH,
            0.3,
            20,
            id="it helped: a guest is not held back any longer than needed",
        ),
        pytest.param(
            STUCK,
            limits(on_no_convergence=OnNoConvergence.SWITCH),
            Effort(),
            Verdict.SWITCH,
            0.3,
            0,
            id="switch all the same",
        ),
        pytest.param(
            STUCK,
            limits(on_no_convergence=OnNoConvergence.WAIT),
            Effort(),
            Verdict.CONTINUE,
            0.3,
            0,
            id="wait",
        ),
        pytest.param(
            TOOK_LONG,
            limits(no_progress_s=60.0),
            Effort(),
            Verdict.GIVE_UP,
            0.3,
            0,
            id="long without progress",
        ),
        pytest.param(
            TOOK_LONG[:2],
            limits(no_progress_s=60.0),
            Effort(),
            Verdict.CONTINUE,
            0.3,
            0,
            id="not that long yet",
        ),
    ],
)
def test_what_is_tried_and_when(
    history: list[RoundReport],
    told: Limits,
    effort: Effort,
    verdict: Verdict,
    downtime_s: float,
    throttle: int,
) -> None:
    """One thing after the other, each only when the one before did not help, nothing that is not allowed."""
    decision = decide(history, told, effort)
    assert decision.verdict is verdict
    assert decision.allowed_downtime_s == pytest.approx(downtime_s)
    assert decision.effort.throttle_percent == throttle
    assert decision.forced == (verdict is Verdict.SWITCH and decision.expected_downtime_s > downtime_s)
    assert decision.waiting == (
        verdict is Verdict.CONTINUE and told.on_no_convergence is OnNoConvergence.WAIT
    )
    assert decision.why


@pytest.mark.parametrize("left", [0, 1, 20 * MB, 400 * MB])
@pytest.mark.parametrize("choice", list(OnNoConvergence))
def test_a_caller_who_wants_it_now_gets_it(left: int, choice: OnNoConvergence) -> None:
    """Whatever is left and whatever else was chosen; how long the pause will be is in the decision."""
    decision = decide(rounds(left), limits(switch_now=True, on_no_convergence=choice))
    assert decision.verdict is Verdict.SWITCH
    assert decision.forced
    assert decision.expected_downtime_s > 0
    assert "now" in decision.why


@pytest.mark.parametrize(
    ("sent", "told", "rate"),
    [
        pytest.param(100, limits(), 100, id="what was measured"),
        pytest.param(100, limits(pause_bytes_per_s=50 * MB), 50, id="the pause's own limit"),
        pytest.param(100, limits(pause_bytes_per_s=500 * MB), 100, id="a limit that the link does not reach"),
        pytest.param(
            95,
            limits(precopy_bytes_per_s=100 * MB, pause_bytes_per_s=500 * MB),
            500,
            id="the cap was measured, so what is said about the pause counts",
        ),
        pytest.param(
            60,
            limits(precopy_bytes_per_s=100 * MB, pause_bytes_per_s=500 * MB),
            60,
            id="the link is slower than the cap, and so it is in the pause",
        ),
        pytest.param(95, limits(precopy_bytes_per_s=100 * MB), 95, id="nothing is known beyond the cap"),
    ],
)
def test_the_rate_in_the_pause(sent: int, told: Limits, rate: int) -> None:
    """The predicted pause follows from what can be sent then."""
    decision = decide([RoundReport(1, 1.0, sent * MB, 10 * MB)], told)
    assert decision.expected_downtime_s == pytest.approx(FIXED_DOWNTIME_S + 10 / rate)


@given(
    writes=st.integers(1 * MB, 400 * MB),
    aim_s=st.floats(0.03, 1),
    longest_s=st.floats(0.03, 5),
    throttle=st.integers(0, MAX_THROTTLE_PERCENT),
    choice=st.sampled_from(OnNoConvergence),
)
def test_it_always_ends_but_for_a_caller_who_waits(
    writes: int, aim_s: float, longest_s: float, throttle: int, choice: OnNoConvergence
) -> None:
    """Whatever a guest writes, efforts only grow, stay within what is allowed, and come to an end."""
    told = Limits(aim_s, 30, longest_s, throttle, choice)
    history: list[RoundReport] = []
    effort, left = Effort(), 1000 * MB
    for number in range(1, 200):
        seconds = left / (100 * MB)
        written = min(int(writes * seconds * (1 - effort.throttle_percent / 100)), 1000 * MB)
        history.append(RoundReport(number, seconds, left, written))
        decision = decide(history, told, effort)
        assert decision.effort.throttle_percent in range(effort.throttle_percent, throttle + 1)
        assert aim_s <= decision.allowed_downtime_s <= max(aim_s, longest_s) + 1e-9
        if decision.verdict is not Verdict.CONTINUE:
            break
        effort, left = decision.effort, max(written, 1)
    assert (decision.verdict is Verdict.CONTINUE) <= (choice is OnNoConvergence.WAIT)
    assert (decision.verdict is Verdict.GIVE_UP) <= (choice is OnNoConvergence.ABORT)
    if decision.verdict is Verdict.SWITCH and not decision.forced:
        assert written == 0 or decision.expected_downtime_s <= decision.allowed_downtime_s
