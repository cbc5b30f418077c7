"""An update in place: its rules, and what can happen while one is open; beside everything that ``world`` knows.

The source service of a host starts a second hypervisor process for its machine, over the same memory, gives it what
the first one saved, and lets it run. Both processes may die at any moment, the service may be killed, the host may
crash, and a migration may begin before and after. Saving and loading are one step: what was saved and not loaded is
of no use to anybody.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple, assert_never

from models.explore import SAFETY
from models.journals import UPDATE
from models.promises import CRASHED, NO_RIGHT, STALE, at_rest, usable
from models.rules import Do, Rules
from models.state import (
    ABSENT,
    NAMES,
    PAUSED,
    RUNNING,
    STARTED,
    Update,
    UpdatePhase,
    World,
    may_let_run,
    owner,
    permitted,
)
from models.variants import Broken, Safe
from models.world import Bounds, Decision, Model, Step, put

UPDATE_RECORDS: Final = {
    "UPDATE_BEGUN": UpdatePhase.BEGUN,
    "UPDATE_SWITCHED": UpdatePhase.SWITCHED,
    "UPDATE_RAN": UpdatePhase.RAN,
    "UPDATE_DONE": UpdatePhase.QUIET,
    "UPDATE_UNDONE": UpdatePhase.QUIET,
}


class UpdateWanted(NamedTuple):
    """An update shall begin."""

    number: int


class Loaded(NamedTuple):
    """The new process has loaded what the old one saved."""

    in_time: bool
    old: bool


class Answered(NamedTuple):
    """The new process is there and waits to be let run."""


class LetGo(NamedTuple):
    """The guest runs in the new process."""


class GiveUp(NamedTuple):
    """Something failed, took too long, or the service was restarted."""

    old: bool
    ready: bool
    silent: bool
    """The new process is there and does not answer, so it may have the state loaded or not."""
    never_ran: bool


UpdateEvent = UpdateWanted | Loaded | Answered | LetGo | GiveUp


class UpdateRules(Rules):
    """What is done about an update; ``end-new`` and ``adopt`` end a process, ``let-run`` asks the gate."""

    def update(self, update: Update, event: UpdateEvent) -> tuple[Do, ...]:
        """What the service does."""
        return tuple(map(Do, self._update(update, event)))

    def _update(self, update: Update, event: UpdateEvent) -> tuple[str, ...]:
        phase = update.phase
        match event:
            case UpdateWanted(number=number):
                if phase is not UpdatePhase.QUIET or number <= update.used:
                    return ("no",)
                left = () if self.lacks("what was left behind is ended first") else ("end-new",)
                return (*left, "UPDATE_BEGUN*")
            case Loaded(in_time=in_time, old=old):
                if phase is not UpdatePhase.BEGUN:
                    return ("no",)
                late = not in_time and (old or self.lacks("late is better than never"))
                return self._undone(resume=True) if late else ("UPDATE_SWITCHED*",)
            case Answered():
                if phase is not UpdatePhase.SWITCHED:
                    return ("no",)
                return (
                    ("let-run", "UPDATE_RAN")
                    if self.lacks("RAN before it runs")
                    else ("UPDATE_RAN", "let-run")
                )
            case LetGo():
                return ("adopt", "UPDATE_DONE*") if phase is UpdatePhase.RAN else ()
            case GiveUp():
                return self._give_up(phase, event)
        assert_never(event)

    def _give_up(self, phase: UpdatePhase, event: GiveUp) -> tuple[str, ...]:
        match phase:
            case UpdatePhase.QUIET:
                return ("end-new",)
            case UpdatePhase.BEGUN | UpdatePhase.SWITCHED:
                if event.silent and not event.old and not self.lacks("silence drops no new one"):
                    return ("wait",)
                if phase is UpdatePhase.SWITCHED and event.ready:
                    return ()
                if event.ready and not event.old and not self.lacks("rescue by the new one"):
                    return ("UPDATE_SWITCHED*",)
                return self._undone(resume=event.old)
            case UpdatePhase.RAN:
                back = event.never_ran or self.lacks("no way back once it may have run")
                if back and event.old:
                    return self._undone(resume=True)
                if event.silent:
                    return ("wait",)
                return ("let-run",) if event.ready else ("adopt", "UPDATE_DONE*")
        assert_never(phase)

    def _undone(self, *, resume: bool) -> tuple[str, ...]:
        return ("UPDATE_UNDONE*", "end-new", *(("resume",) if resume else ()))


@dataclass(frozen=True)
class UpdateBounds(Bounds):
    """How much may happen."""

    updates: int = 1


class UpdateModel(Model):
    """All that may happen next, updates included."""

    rules: UpdateRules
    bounds: UpdateBounds

    def __init__(self, protocol: UpdateRules | None = None, bounds: UpdateBounds | None = None) -> None:
        super().__init__(protocol or UpdateRules(), bounds or UpdateBounds())

    def steps(self, world: World) -> Iterator[Step]:
        """Everything that may happen next."""
        yield from super().steps(world)
        for number, host in enumerate(world.hosts):
            if not host.off:
                yield from self._processes(world, number)
                for event in self._update_events(world, number):
                    yield from self._decide_update(world, number, event)

    def _faults(self, world: World, number: int) -> Iterator[Step]:
        host = world.hosts[number]
        for step in super()._faults(world, number):
            # What the old process takes with it when it dies alone is still in the new one, if that had loaded it.
            kept = step.name.startswith("death@") and world.lost == "" and usable(step.after)
            yield step._replace(after=step.after._replace(lost="")) if kept else step
        if host.new == ABSENT or world.faults >= self.bounds.faults:
            return
        dead = put(world._replace(faults=world.faults + 1), number, host._replace(new=ABSENT, new_held=0))
        # A guest that may have run in it dies with it, as with any hypervisor. Nothing else may be lost by that.
        ran = host.new == RUNNING or host.update.phase is UpdatePhase.RAN
        if not usable(dead) and (ran or world.faults):
            dead = dead._replace(lost=world.lost or CRASHED)
        yield Step(f"death-of-new@{NAMES[number]}", dead, number, fault=True)
        if host.vm == ABSENT:  # otherwise it is among the faults of every host
            after = dead.hosts[number]._replace(fresh=False, taking=False, updating=False)
            gone = put(dead, number, after)._replace(lost=world.lost or CRASHED)
            yield Step(f"crash-of-new@{NAMES[number]}", gone, number, fault=True)

    # The processes, and who may let them run

    def _processes(self, world: World, number: int) -> Iterator[Step]:
        host, name = world.hosts[number], NAMES[number]
        working = host.update.phase is UpdatePhase.BEGUN and host.updating

        if working and host.new == ABSENT and host.vm != ABSENT:
            yield Step(f"start-new@{name}", put(world, number, host._replace(new=STARTED)), number)
        if working and host.new == STARTED and host.vm == RUNNING:
            yield Step(f"pause-for-update@{name}", put(world, number, host._replace(vm=PAUSED)), number)
        if working and host.new == STARTED and host.vm == PAUSED:
            loaded = host._replace(new=PAUSED, new_held=host.held)
            yield Step(f"load@{name}", put(world, number, loaded), number)
        if host.new in {PAUSED, STARTED} and self._may_let_run(world, number):
            latest = world.latest + (not self.bounds.unfenced)
            lost = STALE if host.new == STARTED or host.new_held != world.latest else ""
            lost = lost if owner(host) else NO_RIGHT
            after = put(world, number, host._replace(new=RUNNING, new_held=latest))
            yield Step(f"run-new@{name}", after._replace(latest=latest, lost=lost), number)
        if host.vm == PAUSED and self.rules.lacks("the gate looks for open updates") and owner(host):
            after = put(world, number, host._replace(vm=RUNNING, held=world.latest + 1))
            stale = STALE if host.held != world.latest else ""
            yield Step(f"resume-old@{name}", after._replace(latest=world.latest + 1, lost=stale), number)

    def _may_let_run(self, world: World, number: int) -> bool:
        host, phase = world.hosts[number], world.hosts[number].update.phase
        if self.rules.lacks("RAN before it runs") and phase is UpdatePhase.SWITCHED:
            return owner(host)
        if self.rules.lacks("an update and a migration exclude each other") and phase is UpdatePhase.RAN:
            return owner(host)
        anybody = self.rules.lacks("only where the right is") and phase is UpdatePhase.RAN
        return anybody or may_let_run(host, world.attempts)

    # What the service meets

    def _update_events(self, world: World, number: int) -> Iterator[UpdateEvent]:
        host, phase = world.hosts[number], world.hosts[number].update.phase
        free = permitted(host, world.attempts) or (
            self.rules.lacks("an update and a migration exclude each other")
            and owner(host)
            and phase is UpdatePhase.QUIET
        )
        if free and host.vm == RUNNING and host.update.used < self.bounds.updates:
            yield UpdateWanted(host.update.used + 1)
        if phase is UpdatePhase.BEGUN and host.updating and host.new == PAUSED:
            yield from (Loaded(in_time, host.vm != ABSENT) for in_time in (False, True))
        there = host.new == PAUSED or (host.new == STARTED and self.rules.lacks("ready means loaded"))
        if phase is UpdatePhase.SWITCHED and there:
            yield Answered()
        if phase is UpdatePhase.RAN and host.new == RUNNING:
            yield LetGo()
        if phase is UpdatePhase.QUIET and host.new == ABSENT:
            return
        old, early = host.vm != ABSENT, host.new == STARTED and self.rules.lacks("ready means loaded")
        if host.new != ABSENT:
            yield GiveUp(old, ready=False, silent=True, never_ran=False)
        ready = host.new in {PAUSED, RUNNING} or early
        yield GiveUp(old, ready, silent=False, never_ran=False)
        if phase is UpdatePhase.RAN and host.new == PAUSED:
            yield GiveUp(old, ready, silent=False, never_ran=True)

    def _decide_update(self, world: World, number: int, event: UpdateEvent) -> Iterator[Step]:
        does = self.rules.update(world.hosts[number].update, event)
        done = world
        if isinstance(event, UpdateWanted):
            host = world.hosts[number]._replace(updating=True)
            done = put(world, number, host)
        for at, do in enumerate(does, start=1):
            before, done = done, self._done_to(done, number, do.word)
            if done != before or at == len(does):
                host = done.hosts[number]
                after = (
                    done if at == len(does) else put(done, number, host._replace(updating=False, fresh=False))
                )
                if after != world:
                    name = f"{type(event).__name__}@{NAMES[number]}:{do.word}"
                    yield Step(name, after, number, Decision(UPDATE, event, does, at))  # type: ignore[arg-type]

    def _done_to(self, world: World, number: int, word: str) -> World:
        host, kind = world.hosts[number], word.rstrip("*")
        if kind in UPDATE_RECORDS:
            phase = UPDATE_RECORDS[kind]
            used = host.update.used + (phase is UpdatePhase.BEGUN)
            update, goes_on = Update(phase, used), host.updating and phase is not UpdatePhase.QUIET
            return put(world, number, host._replace(update=update, updating=goes_on, adopted=False))
        match word:
            case "end-new":
                return put(world, number, host._replace(new=ABSENT, new_held=0))
            case "adopt" if not host.adopted:
                moved = host._replace(vm=host.new, held=host.new_held, new=ABSENT, new_held=0, adopted=True)
                return put(world, number, moved)
        return world


def model_of(bounds: Bounds, *without: str) -> Model:
    """The model that these bounds are for, without some of its guards."""
    if isinstance(bounds, UpdateBounds):
        return UpdateModel(UpdateRules(*without), bounds)
    return Model(Rules(*without), bounds)


_ALONE: Final = UpdateBounds(hosts=1, attempts=0, faults=3, updates=3)
_MOVES: Final = UpdateBounds(attempts=1, faults=1)
_SAFETY: Final = tuple(one for one in SAFETY if one != "I4")

SAFE: Final = (
    Safe("updates in place", _ALONE, UpdateBounds(hosts=1, attempts=0, faults=2, updates=2), _SAFETY),
    Safe("updates in place, and a migration", UpdateBounds(attempts=1, faults=2), _MOVES, _SAFETY),
    Safe(
        "an update in place, and an operator who forces the other host",
        UpdateBounds(attempts=1, faults=0, unfenced="either"),
        UpdateBounds(attempts=1, faults=0, unfenced="source"),
        ("I5", "I6"),
        goal=at_rest,
    ),
)
_DIES: Final = UpdateBounds(hosts=1, attempts=0, faults=1)
_WELL: Final = UpdateBounds(hosts=1, attempts=0, faults=0, updates=2)

BROKEN: Final = (
    Broken("the gate looks for open updates", "I1", _DIES),
    Broken("no way back once it may have run", "I2", _DIES),
    Broken("RAN before it runs", "I2", _DIES),
    Broken("what was left behind is ended first", "I2", _WELL),
    Broken("ready means loaded", "I2", _DIES),
    Broken("rescue by the new one", "I3", _DIES),
    Broken("silence drops no new one", "I3", _DIES),
    Broken("late is better than never", "I3", _DIES),
    Broken("an update and a migration exclude each other", "I1", UpdateBounds(attempts=1, faults=0)),
    Broken("only where the right is", "I6", UpdateBounds(attempts=1, faults=0, unfenced="source")),
)
"""Guards of an update, each with the promise that breaks without it."""
