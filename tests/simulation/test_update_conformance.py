"""The real step functions of an update in place against their specification in ``models/updates.py``.

Every edge that is a decision is driven through the real core, every state is asked about every event there is, and
each guard is taken out of the specification in turn, which must be seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from itertools import product
from typing import Any, Final

import pytest

from models import state as model
from models import updates as spec
from models.explore import edges
from models.journals import UPDATE
from models.rules import Do
from models.state import UpdatePhase
from models.updates import UpdateModel, UpdateRules
from tests.simulation.abstraction import MACHINE, rights_of
from vmferry.errors import VmferryError
from vmferry.handoff import gate, updating
from vmferry.handoff.states import Append, InvalidTransitionError, Resume, Update, Wait
from vmferry.handoff.updating import Adopt, EndNew, LetRun, New

Decide = Callable[[updating.UpdateState, Any], list[updating.UpdateAction]]
_STATES: Final = {
    UpdatePhase.BEGUN: updating.Begun,
    UpdatePhase.SWITCHED: updating.Switched,
    UpdatePhase.RAN: updating.Ran,
}
_WORDS: Final = {Resume: "resume", Wait: "wait", EndNew: "end-new", LetRun: "let-run", Adopt: "adopt"}


def update_of(number: int) -> Update:
    """The real update of a number."""
    return Update(MACHINE, number.to_bytes(16, "big"), number)


def state_of(update: model.Update) -> updating.UpdateState:
    """The real state of a journal that says this."""
    if update.phase is UpdatePhase.QUIET:
        return updating.Still(update.used)
    return _STATES[update.phase](update_of(update.used))


def told(state: updating.UpdateState) -> model.Update:
    """What a real journal says."""
    if isinstance(state, updating.Still):
        return model.Update(used=state.last_number)
    return model.Update(
        next(phase for phase, kind in _STATES.items() if type(state) is kind), state.update.number
    )


def event_of(event: spec.UpdateEvent) -> updating.UpdateEvent:
    """The real event."""
    match event:
        case spec.UpdateWanted(number=number):
            return updating.UpdateWanted(update_of(number))
        case spec.Loaded(in_time=in_time, old=old):
            return updating.Loaded(in_time, old_intact=old)
        case spec.Answered():
            return updating.Answered()
        case spec.LetGo():
            return updating.LetGo()
        case spec.GiveUp(old=old, ready=ready, silent=silent, never_ran=never_ran):
            new = New.SILENT if silent else New.READY if ready else New.GONE
            return updating.GiveUp("reason", old, new, never_ran)


def word_of(action: updating.UpdateAction) -> Do:
    """A real action as the specification tells it."""
    if isinstance(action, Append):
        return Do(action.record.kind.name + ("*" if action.durable else ""))
    return Do(_WORDS[type(action)])


def asked(
    update: model.Update, event: spec.UpdateEvent, decide: Decide = updating.decide
) -> list[updating.UpdateAction] | None:
    """What the real core does about an event, or None if it turns it down."""
    try:
        return decide(state_of(update), event_of(event))
    except InvalidTransitionError:
        return None


def answered(actions: Sequence[updating.UpdateAction] | None) -> tuple[Do, ...]:
    """The same, told by the specification."""
    return (Do("no"),) if actions is None else tuple(map(word_of, actions))


@pytest.mark.parametrize("variant", spec.SAFE[:2], ids=lambda variant: variant.what.replace(" ", "-"))
def test_every_edge_of_an_update_is_an_edge_of_the_core(
    variant: Any, record_property: Callable[[str, object], None]
) -> None:
    """On each edge the core does what the specification does, and its journal says the same afterwards."""
    count = 0
    for now, step in edges(UpdateModel(bounds=variant.quick)):
        if step.decision is None or step.decision.role != UPDATE:
            continue
        count += 1
        event: Any = step.decision.event
        before, after = now.hosts[step.host].update, step.after.hosts[step.host].update
        actions = asked(before, event) or []
        assert answered(actions) == step.decision.does, (step.name, before)
        records = [do.record for do in actions[: step.decision.done] if isinstance(do, Append)]
        assert told(reduce(updating.evolve, records, state_of(before))) == after, (step.name, before)
    record_property("edges of updates", count)
    assert count > 50


def every_event() -> Iterator[spec.UpdateEvent]:
    """Each event with each fact it may come with."""
    yes = (False, True)
    yield from (spec.UpdateWanted(number) for number in (1, 2, 3))
    yield from (spec.Loaded(*facts) for facts in product(yes, yes))
    yield from (spec.Answered(), spec.LetGo())
    for old, never_ran in product(yes, yes):
        for ready, silent in ((False, False), (True, False), (False, True)):
            yield spec.GiveUp(old, ready, silent, never_ran)


def differences(protocol: UpdateRules, decide: Decide = updating.decide) -> Iterator[str]:
    """Where the core and the specification part."""
    for phase, event in product(UpdatePhase, every_event()):
        update = model.Update(phase, 1)
        expected, found = protocol.update(update, event), answered(asked(update, event, decide))
        if expected != found:
            yield f"{update} {event}: the model does {expected}, the core {found}"


def test_no_state_and_event_of_an_update_is_answered_differently() -> None:
    """All states, asked about all there is."""
    assert not list(differences(UpdateRules()))


def test_rights_are_the_same_while_an_update_is_open() -> None:
    """Who may run, and by which permit: the same in the specification and by the real gate."""
    hosts = {
        (world.attempts, model.Host(out=host.out, inn=host.inn, rights=host.rights, update=host.update))
        for _, step in edges(UpdateModel(bounds=spec.SAFE[1].quick))
        for world in (step.after,)
        for host in world.hosts
    }
    mints = {gate.mint: model.permitted, gate.mint_for_update: model.may_let_run}
    for attempts, host in hosts:
        real = rights_of(host, attempts, state_of(host.update))
        assert real.holds == model.holds(host, attempts)
        for mint, allowed in mints.items():
            try:
                assert mint("machine", real).epoch == host.rights.granted
                assert allowed(host, attempts)
            except VmferryError:
                assert not allowed(host, attempts)


OF_THE_RULES: Final = (
    "no way back once it may have run",
    "RAN before it runs",
    "what was left behind is ended first",
    "rescue by the new one",
    "silence drops no new one",
    "late is better than never",
)


@pytest.mark.parametrize("guard", OF_THE_RULES)
def test_a_specification_without_a_guard_is_not_the_code(guard: str) -> None:
    """The guard is in the code, and a specification that loses it is told from it."""
    assert next(differences(UpdateRules(guard)), "")


def test_a_core_that_switches_late_is_seen() -> None:
    """A change of the code that the specification does not have is seen."""

    def late(state: updating.UpdateState, event: Any) -> list[updating.UpdateAction]:
        if isinstance(event, updating.Loaded):
            event = updating.Loaded(in_time=True, old_intact=event.old_intact)
        return updating.decide(state, event)

    assert next(differences(UpdateRules(), late), "")
