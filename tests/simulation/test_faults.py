"""The real services on simulated hosts: every fault at every boundary, then two, then storms of them.

Here runs a sample, each time the same one; ``make simulation`` runs all of them. What fails prints the command that
does it again.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from typing import Any, Final
from unittest import mock

import pytest

from tests.simulation import campaign
from tests.simulation.broken import BROKEN
from tests.simulation.cluster import schedules
from tests.simulation.cluster.disk import View
from tests.simulation.cluster.schedules import SCENARIOS, Schedule, quiet
from vmferry.handoff import destination, source
from vmferry.handoff.disk import HostDisk

STRIDE: Final = int(os.environ.get("VMFERRY_STRIDE", "40"))
SEED: Final = int(os.environ.get("VMFERRY_SEED", random.SystemRandom().randrange(2**31)))


def kept(tally: campaign.Tally) -> None:
    """No promise was broken, by at least one schedule."""
    assert not tally.failures, "\n".join(tally.failures[:5])
    assert tally.runs


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_one_fault_anywhere(scenario: str) -> None:
    """Whatever fails, wherever: nothing runs twice, stale or not at all, and the machine migrates again."""
    kept(campaign.one_fault(scenario, stride=STRIDE))


def test_two_faults_anywhere() -> None:
    """The same when something fails again while the first fault is being recovered from."""
    kept(campaign.two_faults("move", stride=STRIDE * 2, second_stride=10))


def test_storms() -> None:
    """Several machines between three hosts, with faults by chance."""
    print(f"VMFERRY_SEED={SEED} reproduces these storms")
    kept(campaign.storms(SEED, max(2, 300 // STRIDE)))


def boundary(name: str, count: int = 0) -> int:
    """The number of the boundary with this name, or of a later one with it."""
    with quiet():
        found = schedules.run(Schedule("move")).boundaries
    return [number for number, one in enumerate(found) if one.startswith(name)][count]


def failure(*faults: tuple[int, str]) -> str:
    """What a move with these faults breaks, if anything."""
    with quiet():
        return schedules.run(Schedule("move", faults)).failure


def test_a_schedule_does_the_same_each_time() -> None:
    """The number of a boundary means the same moment in every run, in storms too."""
    for schedule in (Schedule.parse("move/50=crash:a/torn"), Schedule(seed=SEED)):
        with quiet():
            first, second = schedules.run(schedule), schedules.run(schedule)
        assert first.boundaries == second.boundaries
        assert (first.steps, first.simulated_s, first.struck) == (
            second.steps,
            second.simulated_s,
            second.struck,
        )
        assert Schedule.parse(str(schedule)) == schedule


def test_a_destination_whose_disk_failed_is_asked_again() -> None:
    """The record of the right to run cannot be written there, and the answer says so: the source goes on asking."""
    go = boundary("message@a Go>b")
    for kind in ("write@b destination.journal", "sync@b destination.journal", "write@b register"):
        with quiet():
            found = schedules.run(Schedule("move")).boundaries
        number = next(number for number, one in enumerate(found) if number > go and one == kind)
        assert not failure((number, "eio"))


def test_a_name_that_was_not_on_disk_is_brought_there() -> None:
    """A journal whose maker was killed before its name was on disk survives a later crash all the same."""
    for count in range(2):
        killed = boundary("syncdir@a", count)
        for later in range(killed + 12, killed + 100, 8):
            assert not failure((killed, "kill:a/source"), (later, "crash:a/lose"))


def test_a_destination_hears_at_last_that_an_attempt_was_closed() -> None:
    """A source that was killed once more before it had told leaves no prepared copy behind for ever."""
    first = Schedule("move", ((boundary("message@b Seal:answer"), "kill:a/source"),))
    with quiet():
        after = schedules.second_faults(first)
    wanted = {"kill:a/source", "kill:b/destination", "cut:ab"}
    kept(campaign.do([schedule for schedule in after if schedule.plan[1][1] in wanted]))


def test_a_sync_that_failed_for_a_reader_is_not_tried_again() -> None:
    """A host that resumes a guest syncs the journals of its other service first; if that fails it does not resume."""
    with quiet():
        found = schedules.run(Schedule("back")).boundaries
        paused = found.index("stop@b m0")
        syncs = [
            at
            for at, one in enumerate(found)
            if one.startswith("sync@b destination") and abs(at - paused) < 50
        ]
        for number in syncs:
            assert not schedules.run(Schedule("back", ((number, "eio"),))).failure, number
    assert syncs


# The suite bites


CAUGHT: Final = {
    "source resumes on a timeout": "kill:a/source",
    "abort without memory": "crash:a/lose",
    "closing instead of asking": "crash:a/lose",
    "no rescue of a lost seal": "crash:a/lose",
    "refusal without a record": "kill:a/source",
}
"""Which fault shows it. Others show with two faults only, or never: the services stand behind them as well (whoever
resumes syncs what was read first; whoever frees looks whose the machine is)."""


@pytest.mark.parametrize("name", CAUGHT)
def test_a_broken_core_is_caught(name: str) -> None:
    """Without this guard, some schedule of one fault breaks a promise."""
    variant = BROKEN[name]
    with (
        mock.patch.object(source, "decide", _passed_on(source.decide, variant.source)),
        mock.patch.object(destination, "decide", _passed_on(destination.decide, variant.destination)),
    ):
        assert _breaks(CAUGHT[name])


def _passed_on(real: Callable[..., Any], broken: Callable[..., Any]) -> Callable[..., Any]:
    """The broken function, with what it calls being the real one."""

    def decide(state: Any, event: Any) -> Any:
        with (
            mock.patch.object(source, "decide", _REAL[0]),
            mock.patch.object(destination, "decide", _REAL[1]),
        ):
            return broken(state, event)

    return decide


_REAL: Final = (source.decide, destination.decide)


def _breaks(fault: str) -> bool:
    first, last = boundary("stop@a"), boundary("quit@a")
    return any(failure((number, fault)) for number in range(first, last + 1))


def test_the_simulated_disk_offers_what_the_real_one_does() -> None:
    """Neither has a method that the other lacks."""
    public = {name for name in dir(HostDisk) if not name.startswith("_")}
    assert public <= set(dir(View))
