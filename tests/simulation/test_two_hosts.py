"""The real hand-off core between simulated hosts: every world within bounds, random walks beyond, broken variants.

Safety is checked in each world (I1, I1b, I2, I3, I4), liveness over all of them (L1: from every reachable world,
with no further fault, some copy can run again). A broken variant wraps ``decide`` and must be caught.
"""

from __future__ import annotations

import os
import random
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import pytest

from tests.simulation import steps, world
from tests.simulation.broken import BROKEN
from tests.simulation.steps import Core, Simulation
from tests.simulation.world import World, runs, violation

Parents = dict[World, tuple[World, str] | None]


@dataclass
class Explored:
    """All worlds within the bounds of a simulation, or those up to the first broken promise."""

    parents: Parents
    broken: str = ""
    last: World | None = None
    stuck: list[World] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)

    def trace(self, end: World) -> str:
        """How a world is reached in the fewest steps."""
        names = []
        while (parent := self.parents[end]) is not None:
            end, name = parent
            names.append(name)
        return " -> ".join(reversed(names))


def explore(simulation: Simulation, only: str = "") -> Explored:
    """Breadth first over all reachable worlds, then backwards from those in which the guest runs.

    It ends at the first broken promise; with ``only``, at the first that breaks this one.
    """
    first = simulation.initial()
    found = Explored({first: None})
    before: dict[World, list[World]] = {}
    todo = deque([first])
    while todo:
        now = todo.popleft()
        for step in simulation.steps(now):
            found.seen.add(step.name)
            if not step.fault:
                before.setdefault(step.after, []).append(now)
            if step.after in found.parents:
                continue
            found.parents[step.after] = (now, step.name)
            if broken := violation(step.after, only):
                found.broken, found.last = broken, step.after
                return found
            todo.append(step.after)
    live = {reached for reached in found.parents if runs(reached)}
    todo = deque(live)
    while todo:
        for earlier in before.get(todo.popleft(), ()):
            if earlier not in live:
                live.add(earlier)
                todo.append(earlier)
    found.stuck = [reached for reached in found.parents if reached not in live]
    return found


@pytest.fixture(autouse=True)
def _no_state_of_another_core() -> Iterator[None]:
    """Folded journals are remembered; those folded by a broken variant must not be met by the next test."""
    yield
    for module in (world, steps):
        for remembered in vars(module).values():
            if hasattr(remembered, "cache_clear"):
                remembered.cache_clear()


REACHED: Final = {
    "rescue after the source's crash": "heard-PREPARED:HANDED_OFF*@a",
    "rescue of a lost seal": "heard-PREPARED:SEALED@a",
    "the right is returned": "heard-REFUSED:RECLAIMED*@a",
    "the way back": "heard-RUNNING:DONE*@b",
    "the way back settles the way there": "owner-began:DONE*@a",
    "the owner starts anew": "cold-boot@a",
    "a question closes an attempt": "GetAttempt:REFUSED*@b",
    "a newer attempt closes an older one": "Begin:REFUSED*@b",
}


@pytest.mark.timeout(600)  # long where other work shares the machine
@pytest.mark.parametrize(
    ("bounds", "worlds"),
    [
        pytest.param({"attempts": 2, "crashes": 2}, 40_000, id="two-crashes"),
        pytest.param({"attempts": 2, "crashes": 0, "purges": 1}, 15_000, id="all-messages-lost"),
        pytest.param({"attempts": 1, "crashes": 2, "purges": 1}, 5_000, id="all-messages-lost-and-crashes"),
        pytest.param({"attempts": 2, "crashes": 0, "hosts": 3}, 8_000, id="three-hosts"),
    ],
)
def test_every_world_keeps_the_promises(
    bounds: dict[str, Any], worlds: int, record_property: Callable[[str, object], None]
) -> None:
    """Within these bounds nothing is ever run twice, run stale or lost by a step, and nothing is stuck for ever."""
    found = explore(Simulation(**bounds))
    assert not found.broken, f"{found.broken}: {found.trace(found.last or next(iter(found.parents)))}"
    assert not found.stuck, f"L1: {found.trace(found.stuck[0])}"
    record_property("worlds", len(found.parents))
    assert len(found.parents) > worlds
    if bounds == {"attempts": 2, "crashes": 2}:
        assert set(REACHED.values()) <= found.seen


def test_a_lost_journal_blocks_rather_than_splits() -> None:
    """When a host comes back without its journals, an operator may be needed, and no promise of safety breaks."""
    found = explore(Simulation(attempts=2, crashes=1, amnesia=True))
    assert not found.broken, f"{found.broken}: {found.trace(found.last or next(iter(found.parents)))}"
    assert found.stuck


def test_an_operator_who_has_cut_the_power_splits_nothing() -> None:
    """One host is off for good, the other one is forced without memory: nothing runs twice, or from an old copy."""
    found = explore(Simulation(attempts=2, crashes=1, operator=True))
    assert not found.broken, f"{found.broken}: {found.trace(found.last or next(iter(found.parents)))}"
    assert {"force-reclaim:FORCED*@a", "force-accept:release@b", "cold-boot@b"} <= found.seen


SEED: Final = int(os.environ.get("VMFERRY_SEED", random.SystemRandom().randrange(2**32)))


@pytest.mark.parametrize("walk", range(150))
def test_random_walks_beyond_the_bounds(walk: int) -> None:
    """With three hosts, attempts and crashes a long walk keeps the promises, and the guest can run at its end."""
    seed = SEED + walk
    print(f"VMFERRY_SEED={seed} reproduces this walk as walk 0")
    chance = random.Random(seed)
    simulation = Simulation(hosts=3, attempts=3, crashes=3, purges=1)
    now = simulation.initial()
    trace = []
    for _ in range(120):
        choices = list(simulation.steps(now))
        if not choices:
            break
        faults = [step for step in choices if step.fault]
        step = chance.choice(faults if faults and chance.random() < 0.05 else choices)
        trace.append(step.name)
        now = step.after
        assert not violation(now), f"seed {seed}: {violation(now)}: {' -> '.join(trace)}"
    assert _can_run(simulation, now), f"seed {seed}: L1: {' -> '.join(trace)}"


def _can_run(simulation: Simulation, start: World) -> bool:
    seen, todo = {start}, deque([start])
    while todo:
        now = todo.popleft()
        if runs(now):
            return True
        for step in simulation.steps(now):
            if not step.fault and step.after not in seen:
                seen.add(step.after)
                todo.append(step.after)
    return False


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_variant_is_caught(name: str) -> None:
    """Without this guard some promise breaks within the bounds: the suite would notice."""
    variant = BROKEN[name]
    bounds = {"attempts": 2, "crashes": 1, **variant.bounds}
    with variant.patch():
        core = Core(source_decide=variant.source, destination_decide=variant.destination)
        found = explore(Simulation(core, **bounds), only=variant.breaks)
    if variant.breaks == "L1":
        assert found.stuck
    else:
        assert found.broken.startswith(variant.breaks)
