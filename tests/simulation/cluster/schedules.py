"""Schedules of faults: which there are, what a run with one does, and how to do it again.

A schedule is a scenario, the faults by the number of the boundary, or a seed. Written as text it is one argument of
``python -m tests.simulation.replay``.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

from tests.simulation.cluster.clock import Loop
from tests.simulation.cluster.services import replaced
from tests.simulation.cluster.world import Storm, World

BOUND_S: Final = 60.0
"""Within this time after everything works again, a machine is to have come to rest."""
_BROKEN_S: Final = 4.0
"""How long things stay broken after a fault."""
MANY: Final = 2
"""With so many faults a run does not migrate once more afterwards: there are many of them."""
SCENARIOS: Final = ("move", "back", "retry")

_ANYWHERE: Final = (
    "kill:a/source",
    "kill:b/destination",
    *(f"crash:{host}/{how}" for host in "ab" for how in ("lose", "keep", "torn")),
    "cut:ab",
    "cut:ba",
    "full:a",
    "full:b",
    "cancel:",
)
_HERE: Final = {
    "message": ("drop", "twice", "late", "overtaken"),
    "sync": ("eio",),
    "syncdir": ("eio",),
    "write": ("eio",),
    "create": ("eio",),
    "rename": ("eio",),
    "allocate": ("eio",),
    **dict.fromkeys(("start", "stop", "save", "load", "cont", "quit"), ("fail",)),
}


@dataclass(frozen=True)
class Schedule:
    """One run."""

    scenario: str = "move"
    plan: tuple[tuple[int, str], ...] = ()
    seed: int = -1

    def __str__(self) -> str:
        faults = "+".join(f"{number}={fault}" for number, fault in self.plan)
        return f"storm/{self.seed}" if self.seed >= 0 else f"{self.scenario}/{faults}"

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """The schedule that was written as ``text``."""
        scenario, _, rest = text.partition("/")
        if scenario == "storm":
            return cls(seed=int(rest))
        faults = [one.partition("=") for one in rest.split("+") if one]
        return cls(scenario, tuple((int(number), fault) for number, _, fault in faults))


@dataclass
class Outcome:
    """What a run came to."""

    schedule: Schedule
    failure: str = ""
    boundaries: list[str] = field(default_factory=list)
    mended_at: int = 0
    struck: list[str] = field(default_factory=list)
    lost: bool = False
    operator: bool = False
    """A person must decide, as docs/handoff.md says."""
    steps: int = 0
    simulated_s: float = 0.0


def run(schedule: Schedule) -> Outcome:
    """Do one schedule."""
    loop = Loop()
    with replaced(loop):
        if schedule.seed >= 0:
            storm = Storm(schedule.seed, "abc")
            world, act = World("abc", storm.chance.randrange(1, 6), {}, loop=loop, storm=storm), _storm
        else:
            plan: dict[int, tuple[str, ...]] = {}
            for number, fault in schedule.plan:
                plan[number] = (*plan.get(number, ()), fault)
            world, act = World("ab", 1, plan, loop=loop), _SCENARIOS[schedule.scenario]
            world.again = len(schedule.plan) < MANY
        try:
            world.start()
            failure = act(world)
            monitor = world.monitor
            failure = monitor.violation or failure or "; ".join(world.internal_errors())
            return Outcome(
                schedule,
                failure,
                world.boundaries,
                world.mended_at,
                world.struck,
                bool(monitor.lost),
                any(monitor.awaits_a_person(spec.uuid) for spec in world.machines),
                loop.steps,
                loop.time(),
            )
        finally:
            world.dispose()


def _finish(world: World) -> str:
    """After the last fault: mend everything, wait for rest, and migrate once more."""
    if world.broken:
        world.run(max(0.0, world.faulted_at + _BROKEN_S - world.loop.time()))
    world.heal()
    if not world.run(BOUND_S, until_settled=True):
        return f"L1: {world.unsettled() or 'a service is not idle'} after {BOUND_S:g} s in which everything worked"
    return _again(world) if world.again else ""


def _again(world: World) -> str:
    for number, spec in enumerate(world.machines):
        origin = world.monitor.owner(spec.uuid)
        if not origin or world.monitor.awaits_a_person(spec.uuid):
            continue  # it was lost with its host
        target = next(name for name in world.sites if name != origin)
        world.migrate(number, target, tries=20)
        world.run(1.0)
        if not world.run(BOUND_S, until_settled=True) or world.monitor.owner(spec.uuid) != target:
            return f"again: {spec.name} does not migrate from {origin} to {target}: {world.unsettled()}"
    return ""


def _move(world: World) -> str:
    world.migrate(0, "b")
    world.run(0.3)
    world.run(4.0, until_settled=True)
    return _finish(world)


def _back(world: World) -> str:
    world.migrate(0, "b")
    world.run(0.3)
    world.run(4.0, until_settled=True)
    world.migrate(0, "a")
    world.run(0.3)
    world.run(4.0, until_settled=True)
    return _finish(world)


def _retry(world: World) -> str:
    world.migrate(0, "b")
    world.run(0.065)  # memory is on its way
    world.cancel()
    world.run(1.0, until_settled=True)
    world.migrate(0, "b")
    world.run(0.3)
    world.run(4.0, until_settled=True)
    return _finish(world)


def _storm(world: World) -> str:
    storm = world.storm
    assert storm is not None
    chance = storm.chance
    for _ in range(chance.randrange(2, 10)):
        world.migrate(chance.randrange(len(world.machines)), chance.choice(list(world.sites)))
        world.run(chance.choice((0.02, 0.1, 0.25, 0.4, 1.5, 4.0)))
    return _finish(world)


_SCENARIOS: Final = {"move": _move, "back": _back, "retry": _retry}

# Which there are


_TWICE: Final = ("kill:a/source", "kill:b/destination", "crash:a/lose", "crash:b/lose", "cut:ab", "cut:ba")
_TWICE_KINDS: Final = ("message", "write", "sync", "start", "stop", "save", "load", "cont", "quit")


def _baseline(scenario: str) -> Outcome:
    """What happens without any fault: without it there is nothing to strike at."""
    baseline = run(Schedule(scenario))
    assert not baseline.failure, baseline.failure
    return baseline


def one_fault(scenario: str) -> list[Schedule]:
    """Every fault at every boundary of a scenario."""
    baseline = _baseline(scenario)
    return [
        Schedule(scenario, ((number, fault),))
        for number, boundary in enumerate(baseline.boundaries[: baseline.mended_at])
        for fault in (*_ANYWHERE, *_HERE.get(boundary.partition("@")[0], ()))
    ]


def _main_faults(outcome: Outcome, start: int) -> Iterator[tuple[int, str]]:
    """The faults that are combined with others, from a boundary on: at records, messages and hypervisors."""
    for number, boundary in enumerate(outcome.boundaries[: outcome.mended_at]):
        kind, _, detail = boundary.partition("@")
        temporary = detail.endswith((".new", "register"))
        if number >= start and kind in _TWICE_KINDS and not temporary:
            yield from ((number, fault) for fault in _TWICE)
            if kind == "message":
                yield number, "drop"


def first_faults(scenario: str, stride: int = 1) -> list[Schedule]:
    """One schedule for each different way in which a run can go on after one fault, or after each so many-th one."""
    ways: dict[tuple[str, ...], Schedule] = {}
    for number, fault in list(_main_faults(_baseline(scenario), 0))[::stride]:
        outcome = run(Schedule(scenario, ((number, fault),)))
        ways.setdefault((*outcome.boundaries[number:], fault[:5]), outcome.schedule)
    return list(ways.values())


def second_faults(first: Schedule) -> list[Schedule]:
    """Every second fault after the first one, until everything is mended."""
    ((number, fault),) = first.plan
    outcome = run(first)
    return [
        Schedule(first.scenario, ((number, fault), second)) for second in _main_faults(outcome, number + 1)
    ]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without logs, and without complaints about worlds that end in the middle of something."""
    disabled, hook = logging.root.manager.disable, sys.unraisablehook
    logging.disable(logging.CRITICAL)
    sys.unraisablehook = lambda unraisable: None
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.collect()
        gc.unfreeze()
        sys.unraisablehook = hook
        logging.disable(disabled)


def failures(schedules: Iterable[Schedule]) -> Iterator[Outcome]:
    """Do schedules one after the other; those that fail are returned."""
    with quiet():
        for schedule in schedules:
            outcome = run(schedule)
            if outcome.failure:
                yield outcome
