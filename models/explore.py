"""Every world within bounds, breadth first, so that the first broken promise has a shortest trace."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from models.promises import broken, runs
from models.state import World
from models.world import Model, Step

SAFETY = ("I1", "I1b", "I2", "I3", "I4")


@dataclass
class Explored:
    """What was found."""

    states: int = 0
    edges: int = 0
    broken: str = ""
    trace: list[str] = field(default_factory=list)
    stuck: list[list[str]] = field(default_factory=list)
    """Traces to worlds from which the guest cannot run again without a further fault."""


def edges(model: Model) -> Iterator[tuple[World, Step]]:
    """Each transition between reachable worlds, once."""
    first = model.initial()
    seen, todo = {first}, deque([first])
    while todo:
        now = todo.popleft()
        for step in model.steps(now):
            yield now, step
            if step.after not in seen:
                seen.add(step.after)
                todo.append(step.after)


def explore(
    model: Model,
    promises: tuple[str, ...] = SAFETY,
    *,
    liveness: bool = True,
    goal: Callable[[World], bool] = runs,
) -> Explored:
    """All reachable worlds, or those up to the first in which one of the promises is broken.

    With ``liveness``, the goal must stay within reach.
    """
    first = model.initial()
    parents: dict[World, tuple[World, str] | None] = {first: None}
    earlier: dict[World, list[World]] = {}
    found = Explored(states=1)
    for now, step in edges(model):
        found.edges += 1
        if liveness and not step.fault:
            earlier.setdefault(step.after, []).append(now)
        if step.after in parents:
            continue
        parents[step.after] = (now, step.name)
        found.states += 1
        found.broken = broken(step.after, promises)
        if found.broken:
            found.trace = _trace(parents, step.after)
            return found
    if liveness:
        live = _reaching(earlier, {world for world in parents if goal(world)})
        found.stuck = [_trace(parents, world) for world in parents if world not in live]
    return found


def _trace(parents: dict[World, tuple[World, str] | None], end: World) -> list[str]:
    names = []
    while (parent := parents[end]) is not None:
        end, name = parent
        names.append(name)
    return names[::-1]


def _reaching(earlier: dict[World, list[World]], goal: set[World]) -> set[World]:
    reaching, todo = set(goal), deque(goal)
    while todo:
        for before in earlier.get(todo.popleft(), ()):
            if before not in reaching:
                reaching.add(before)
                todo.append(before)
    return reaching
