"""A prediction plays the real policy through: it grows with what is written, and gives up when the policy does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from unittest.mock import patch

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from vmferry.transfer import convergence, prediction
from vmferry.transfer.convergence import Decision, Effort, Limits, RoundReport, Verdict
from vmferry.transfer.prediction import (
    DEFAULT_COSTS,
    Circumstances,
    DirtyCurve,
    Figure,
    FixedCosts,
    Observed,
    dirty_curve,
    learn,
    predict,
)

MB = 1_000_000
LIMITS = Limits(downtime_s=0.3, max_rounds=30)
AT_ONCE = Figure(1e15, 1e15, 1e15)
NOTHING = Figure(0.0, 0.0, 0.0)
FREE = FixedCosts(NOTHING, 0.001, NOTHING, NOTHING)
TIMES = (0.02, 0.05, 0.1, 0.2, 0.3)


def exactly(value: float) -> Figure:
    return Figure(value, value, value)


def around(value: float) -> Figure:
    return Figure(value, value * 0.8, value * 1.25)


def writes(rate: float, working_set: float = 1e18) -> DirtyCurve:
    """A guest that writes ``rate`` bytes a second, over and over again to the same memory."""
    return DirtyCurve([(at, min(at * rate, working_set)) for at in TIMES], error=0.02)


def circumstances(dirty: DirtyCurve, *, resident: int = 100 * MB, memory: int = 1000 * MB) -> Circumstances:
    return Circumstances(
        memory_bytes=memory,
        resident_bytes=resident,
        blank_bytes=0,
        dirty=dirty,
        send=around(200 * MB),
        read=1000 * MB,
        reserve=AT_ONCE,
        send_error=0.0,
        sampled_s=0.3,
    )


rates = st.floats(1 * MB, 2000 * MB)
curves = st.lists(st.floats(0, 500 * MB), min_size=len(TIMES), max_size=len(TIMES)).map(
    lambda values: DirtyCurve(list(zip(TIMES, sorted(values), strict=True)), error=0.1)
)


@st.composite
def all_circumstances(draw: st.DrawFn) -> Circumstances:
    """Machines, guests, links and destinations of all sorts."""
    memory = draw(st.integers(16 * MB, 8000 * MB))
    resident = draw(st.integers(0, memory))
    return Circumstances(
        memory_bytes=memory,
        resident_bytes=resident,
        blank_bytes=draw(st.integers(0, memory - resident)),
        dirty=draw(curves),
        send=around(draw(rates)),
        read=draw(rates),
        reserve=around(draw(rates)),
        send_error=0.0,
        sampled_s=0.3,
    )


limits = st.builds(Limits, downtime_s=st.floats(0.03, 3), max_rounds=st.integers(1, 40))


def ordered(figure: Figure) -> bool:
    return 0 <= figure.low <= figure.expected <= figure.high


@given(all_circumstances(), limits)
def test_the_bounds_enclose_what_is_expected(found: Circumstances, allowed: Limits) -> None:
    """Whatever was measured, low <= expected <= high, and the pause is a part of the whole if it converges."""
    predicted = predict(found, DEFAULT_COSTS["qemu"], allowed)
    assert ordered(predicted.total)
    assert ordered(predicted.downtime)
    assert predicted.rounds >= 1
    assert not predicted.converges or predicted.downtime.expected <= predicted.total.expected


@given(all_circumstances(), st.floats(1, 10))
def test_more_writes_in_as_many_rounds_never_shorten(found: Circumstances, factor: float) -> None:
    """As long as the policy goes the same way, a guest that writes more takes longer and is paused for longer."""
    at_once = replace(found, reserve=AT_ONCE)
    less = predict(at_once, FREE, LIMITS)
    more = predict(replace(at_once, dirty=found.dirty.scaled(factor)), FREE, LIMITS)
    assume(less.rounds == more.rounds and less.converges == more.converges)
    assert more.total.expected >= less.total.expected * (1 - 1e-9)
    assert more.downtime.expected >= less.downtime.expected * (1 - 1e-9)


@given(st.integers(1, 1000 * MB), rates)
def test_a_silent_guest_needs_one_round(resident: int, rate: float) -> None:
    """Nothing written: one round, converging, as long as sending everything once takes."""
    found = replace(circumstances(writes(0), resident=resident), send=exactly(rate))
    predicted = predict(found, FREE, LIMITS)
    assert (predicted.rounds, predicted.converges) == (1, True)
    assert predicted.total.expected == pytest.approx(resident / rate + FREE.round, rel=1e-6)
    assert predicted.downtime.expected == 0


def test_memory_that_is_not_there_yet_is_waited_for() -> None:
    """The switch comes when the destination has all its memory, however small the rest is."""
    found = replace(circumstances(writes(1 * MB), memory=3000 * MB), reserve=exactly(300 * MB))
    predicted = predict(found, FREE, LIMITS)
    assert predicted.converges
    assert 10 <= predicted.total.expected < 10.2
    assert predicted.rounds > 100


@pytest.mark.parametrize(
    ("dirty", "converges"),
    [
        pytest.param(writes(100 * MB), True, id="slower than the link"),
        pytest.param(writes(1000 * MB, 20 * MB), True, id="fast, but in little memory"),
        pytest.param(writes(1000 * MB, 90 * MB), False, id="fast, in more than fits the pause"),
        pytest.param(writes(300 * MB), False, id="faster than the link"),
    ],
)
def test_it_converges_when_the_rest_comes_to_fit(dirty: DirtyCurve, converges: bool) -> None:
    """Neither the rate alone nor the working set alone decides."""
    predicted = predict(circumstances(dirty), FREE, LIMITS)
    assert predicted.converges is converges
    if converges:
        assert predicted.downtime.expected < LIMITS.downtime_s
    else:
        assert predicted.downtime.expected > LIMITS.downtime_s


@given(all_circumstances(), limits)
def test_it_gives_up_exactly_when_the_policy_does(found: Circumstances, allowed: Limits) -> None:
    """The policy itself is asked after every round, and its last word is the prediction's."""
    said: list[Verdict] = []

    def listening(history: list[RoundReport], told: Limits, effort: Effort) -> Decision:
        decision = convergence.decide(history, told, effort)
        said.append(decision.verdict)
        return decision

    with patch.object(prediction, "decide", listening):
        predicted = predict(replace(found, reserve=AT_ONCE), FREE, allowed)
    rounds = next(number for number, verdict in enumerate(said, start=1) if verdict is not Verdict.CONTINUE)
    assert predicted.rounds == rounds
    assert predicted.converges == (said[rounds - 1] is Verdict.SWITCH)


@given(all_circumstances())
def test_without_a_limit_nobody_is_given_up_on(found: Circumstances) -> None:
    """It fails to converge only because of the limits: with room for any pause and memory at once it converges."""
    endless = Limits(downtime_s=1e12, max_rounds=30)
    assert predict(replace(found, reserve=AT_ONCE), FREE, endless).converges


def test_a_comparison_is_part_of_the_pause() -> None:
    """Comparing all memory costs sending what holds data once more, and reading the rest."""
    found = circumstances(writes(0))
    plain, compared = (predict(found, FREE, LIMITS, compare_all=every) for every in (False, True))
    assert compared.downtime.expected - plain.downtime.expected == pytest.approx(100 / 200 + 900 / 1000)


def test_bounds_come_from_what_was_measured() -> None:
    """A link that was measured badly gives wider bounds than one that was measured well, around the same value."""
    found = circumstances(writes(1 * MB), resident=1000 * MB)
    well, badly = (
        predict(replace(found, send=Figure(200 * MB, low * MB, high * MB)), FREE, LIMITS)
        for low, high in ((190, 210), (50, 800))
    )
    assert well.total.expected == badly.total.expected
    assert badly.total.low < well.total.low < well.total.high < badly.total.high


def test_a_curve_is_straight_between_its_points_and_goes_on_as_it_ended() -> None:
    """Within the sample it is what was counted; beyond it the last slope stays."""
    curve = DirtyCurve([(0.1, 10.0), (0.2, 30.0), (0.4, 40.0)], error=0.0)
    values = [curve.bytes_after(at) for at in (0.0, 0.05, 0.1, 0.15, 0.3, 0.4, 1.4)]
    assert values == pytest.approx([0.0, 5.0, 10.0, 20.0, 35.0, 40.0, 90.0])
    assert curve.rate == 100.0
    assert writes(100 * MB, 5 * MB).bytes_after(3600) == 5 * MB


@pytest.mark.parametrize("points", [[], [(0.0, 1.0)], [(0.1, 2.0), (0.1, 3.0)], [(0.1, 2.0), (0.2, 1.0)]])
def test_what_does_not_grow_is_no_curve(points: Sequence[tuple[float, float]]) -> None:
    """A curve that is empty or falls is a mistake of its maker."""
    with pytest.raises(ValueError, match="do not grow"):
        DirtyCurve(points, error=0.0)


def test_looks_are_averaged_and_their_spread_is_the_error() -> None:
    """Each point is the mean of the looks that went so far; looks that differ make an error, equal ones do not."""
    same = dirty_curve([[(0.1, 100), (0.2, 200)], [(0.1, 100)]])
    other = dirty_curve([[(0.1, 100), (0.2, 200)], [(0.1, 50)]])
    assert same is not None
    assert other is not None
    assert (list(same.points), same.error) == ([(0.1, 100), (0.2, 200)], 0.0)
    assert list(other.points) == [(0.1, 75), (0.2, 200)]
    assert other.error == pytest.approx(1 / 3)


def test_looks_that_were_ended_early_count_as_far_as_they_went() -> None:
    """No look is no curve; an empty one, and one that contradicts the others, do no harm."""
    assert dirty_curve([]) is None
    assert dirty_curve([[]]) is None
    curve = dirty_curve([[(0.1, 100), (0.2, 110)], [(0.1, 900)], []])
    assert curve is not None
    assert list(curve.points) == [(0.1, 500), (0.2, 500)]


def test_fixed_costs_are_learnt() -> None:
    """The median of what happened replaces the defaults, and the extremes become the bounds."""
    defaults = DEFAULT_COSTS["microvm"]
    assert learn(defaults, []) == defaults
    seen = [Observed(start, start / 10, 2 * start) for start in (0.1, 0.2, 0.9)]
    learnt = learn(defaults, seen)
    assert learnt.start.expected == 0.2
    assert learnt.pause.expected == pytest.approx(0.02)
    assert learnt.finish.expected == 0.4
    assert learnt.start.low < 0.1
    assert learnt.start.high > 0.9
    assert learnt.round == defaults.round


def test_figures_know_their_error() -> None:
    """Figures that agree are bounded closely, but never as if a fraction of a second told everything."""
    close, far, alone = Figure.of([100.0, 101.0, 99.0]), Figure.of([100.0, 180.0, 20.0]), Figure.of([100.0])
    assert ordered(close)
    assert close.low < 90
    assert close.high > 110
    assert far.low < alone.low < close.low
    assert far.high > alone.high > close.high
