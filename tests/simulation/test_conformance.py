"""The real step functions against the specification in ``models``: whatever one of them does, the other one does.

Every edge of the explored graph is driven through the real core: the same actions in the same order, as durable, and
the same state afterwards. Every state that is reached is asked about every event there is, so that the core can do
nothing that the model does not. Then both are changed, one guard at a time, and each change must be seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any, Final

import pytest

from models import rules
from models import state as model
from models.explore import edges
from models.rules import Rules
from models.state import NOBODY, Stands
from models.variants import SAFE
from models.world import Model
from tests.simulation.abstraction import (
    Attempts,
    Core,
    answered,
    asked,
    attempt_of,
    destination_of,
    folded,
    inn_of,
    out_of,
    rights_of,
    source_of,
    told,
)
from vmferry.errors import VmferryError
from vmferry.handoff import destination, gate, source
from vmferry.handoff.states import Action, Append, AttemptState, RecordKind, Tell

pytestmark = pytest.mark.timeout(400)  # long where other work shares the machine

Local = tuple[Attempts, model.Host]
"""All that an end knows: one host, without its guest and whatever else no rule looks at."""


def local(host: model.Host) -> model.Host:
    """The host's journals, and nothing else of it."""
    return model.Host(out=host.out, inn=host.inn, rights=host.rights)


@cache
def reached() -> frozenset[Local]:
    """What every host knows in every world of the quick bounds, together with the attempts there are."""
    found = set()
    for variant in SAFE:
        for now, step in edges(Model(bounds=variant.quick)):
            found.update((world.attempts, local(host)) for world in (now, step.after) for host in world.hosts)
    return frozenset(found)


@pytest.mark.parametrize("variant", SAFE, ids=lambda variant: variant.what.replace(" ", "-"))
def test_every_edge_of_the_model_is_an_edge_of_the_core(
    variant: Any, record_property: Callable[[str, object], None]
) -> None:
    """On each edge the core does what the model does, and its journals say afterwards what the model says."""
    core, count, seen = Core(), 0, set()
    for now, step in edges(Model(bounds=variant.quick)):
        if step.decision is None:
            continue
        count += 1
        _, event, does, done = step.decision
        attempts, host, after = step.after.attempts, local(now.hosts[step.host]), step.after.hosts[step.host]
        key = (attempts, host, event, done, after.out, after.inn, after.rights)
        if key in seen:
            continue
        seen.add(key)
        actions = asked(core, host, event, attempts)
        assert answered(actions) == told(does), (step.name, host)
        expected = (after.out, after.inn, after.rights.granted, after.rights.left)
        assert folded(host, (actions or [])[:done], event, attempts) == expected, (step.name, host)
    record_property("edges", count)
    record_property("different edges", len(seen))
    assert count > 500


def every_event(attempts: Attempts, out: model.Out, inn: model.In) -> Iterator[Any]:
    """Each event with each fact it may come with; an answer is about the open attempt, so there has to be one."""
    yes = (False, True)
    yield from (rules.Paused(), rules.Unheard(), rules.GuestRan(), rules.Stalled())
    for first, second in product(yes, yes):
        yield rules.WaitedEnough(first, second)
        yield rules.ForceAccept(first, second)
        for third in yes:
            yield rules.AbortWanted(first, second, third)
            yield rules.ForceReclaim(first, second, third)
            if out.attempt != NOBODY:
                yield from (rules.Heard(said, first, second, third) for said in Stands)
    yield from (rules.CopyLost(certain) for certain in yes)
    for number in range(len(attempts)):
        yield from (rules.Begin(number), rules.OwnerBegan(number), rules.Verified(number))
        yield from (rules.CloseAsked(number, *told) for told in product(yes, yes))
        yield from (rules.StatusAsked(number), rules.TakenThere(number, 0), rules.TakenThere(number, 3))
        yield from (rules.GoAsked(number, intact) for intact in yes)
        for held in yes:
            yield rules.BeginAsked(number, held, stale_copy=False)
        yield rules.BeginAsked(number, held=False, stale_copy=True)


def possible(event: Any, attempts: Attempts, host: model.Host) -> bool:
    """Whether this host may be asked this: each end is asked about attempts of its own only."""
    about = getattr(event, "attempt", NOBODY)
    here = {attempts[number].destination for number, said in enumerate(host.inn.stands) if said}
    source_here = host.out.attempt != NOBODY and attempts[host.out.attempt].source
    if isinstance(event, rules.Paused):
        return host.out.attempt != NOBODY  # without an attempt there is no digest to speak of
    if isinstance(event, rules.SourceEvent) or about == NOBODY:
        return True
    if source_here is not False and attempts[about].destination == source_here:
        return False
    return not here or attempts[about].destination in here


def differences(protocol: Rules, core: Core) -> Iterator[str]:
    """Where the core and the model part, over all that any end may know and be told."""
    # A source's rules do not look at the destination's journal, nor the other way about.
    ends = {(attempts, model.Host(out=host.out)) for attempts, host in reached()}
    ends |= {(attempts, model.Host(inn=host.inn)) for attempts, host in reached()}
    for attempts, host in ends:
        for event in every_event(attempts, host.out, host.inn):
            if not possible(event, attempts, host):
                continue
            expected = told(protocol.about(host, event, attempts))
            found = answered(asked(core, host, event, attempts))
            if expected != found:
                yield f"{host} {event}: the model does {expected}, the core {found}"


def test_no_state_and_event_is_answered_differently(record_property: Callable[[str, object], None]) -> None:
    """All that the model reaches, asked about all there is: the core does that, and nothing else."""
    assert not list(differences(Rules(), Core()))
    record_property("states", len(reached()))


def test_rights_are_the_same() -> None:
    """Who may run, who lets whom in, and whose hand-off is settled: the same in the model and by the real gate."""
    for attempts, host in reached():
        real = rights_of(host, attempts)
        assert real.permitted == model.permitted(host, attempts)
        assert real.leaving == model.leaving(host, attempts)
        assert real.moved_on == model.moved_on(host, attempts)
        assert real.holds == model.holds(host, attempts)
        try:
            assert gate.mint("machine", real).epoch == host.rights.granted
            assert real.permitted
        except VmferryError:
            assert not real.permitted
        for number in range(len(attempts)):
            spent = model.proved_gone_by(host, attempts, number)
            assert real.proved_gone_by(attempt_of(attempts, number)) == spent
            assert real.admits(attempt_of(attempts, number)) == (not model.holds(host, attempts) or spent)


def test_telling_a_state_and_making_it_are_inverse() -> None:
    """The abstraction forgets nothing that the model knows."""
    for attempts, host in reached():
        assert out_of(source_of(host.out, attempts)) == host.out
        told_again = inn_of(destination_of(host.inn, attempts))
        padding = (Stands.UNSEEN,) * (len(host.inn.stands) - len(told_again.stands))
        assert told_again._replace(stands=told_again.stands + padding) == host.inn


# A change of either side alone is seen

OF_THE_RULES: Final = (
    "silence means nothing",
    "HANDED_OFF before Go",
    "HANDED_OFF on disk",
    "ABORTED on disk",
    "OWNED on disk",
    "REFUSED on disk",
    "ask before closing without memory",
    "ask without closing",
    "rescue of a lost seal",
    "memory stays until it runs elsewhere",
    "only the journal that said ready",
    "order of attempts",
    "no right without a copy",
    "silence takes nothing",
    "silence drops nothing",
    "no time limit after HANDED_OFF",
    "no time limit behind a torn end",
    "ask behind a torn end",
    "no hand-off behind a torn end",
    "no refusal behind a torn end",
    "nothing to resume before the right is forced",
    "a later right stops an earlier one",
    "a source stops, too",
    "first it is known where it goes",
)


@pytest.mark.parametrize("guard", OF_THE_RULES)
def test_a_model_without_a_guard_is_not_the_code(guard: str) -> None:
    """The guard is in the code, and a model that loses it is told from it."""
    assert next(differences(Rules(guard), Core()), "")


def _lazily(state: Any, event: Any) -> list[Action]:
    lazy = {RecordKind.RECLAIMED, RecordKind.DONE}
    return [
        replace(action, durable=False)
        if isinstance(action, Append) and action.record.kind in lazy
        else action
        for action in source.decide(state, event)
    ]


def _any_right(state: Any, event: Any) -> list[Action]:
    if isinstance(event, source.OwnerBegan) and isinstance(state, source.HandedOff):
        later = replace(event.attempt, epoch_from=state.attempt.epoch_to)
        return source.decide(state, source.OwnerBegan(later))
    return source.decide(state, event)


def _tells_more(state: Any, event: Any) -> list[Action]:
    again = [Tell("Go")] if isinstance(state, source.HandedOff) and isinstance(event, source.Heard) else []
    return [*source.decide(state, event), *again]


def _epoch_short(state: Any, event: Any) -> list[Action]:
    return [
        replace(action, record=replace(action.record, epoch=action.record.epoch - 1))
        if isinstance(action, Append) and action.record.kind is RecordKind.RECLAIMED
        else action
        for action in source.decide(state, event)
    ]


def _owner_accepts(state: Any, event: Any) -> list[Action]:
    if isinstance(event, destination.BeginAsked):
        event = replace(event, host_holds_machine=False)
    return destination.decide(state, event)


def _go_for_any_attempt(state: Any, event: Any) -> list[Action]:
    if isinstance(event, destination.GoAsked) and isinstance(state.current, destination.Prepared):
        event = replace(event, attempt=state.current.attempt, digest=state.current.digest)
    return destination.decide(state, event)


def _refuses_what_it_owns(state: Any, event: Any) -> list[Action]:
    if isinstance(event, destination.CloseAsked) and isinstance(state.current, destination.Owned):
        return [destination.Answer(AttemptState.REFUSED)]
    return destination.decide(state, event)


MUTANTS: Final[dict[str, Core]] = {
    "records of an end are lazy": Core(source=_lazily),
    "any right settles a hand-off": Core(source=_any_right),
    "says Go to every answer": Core(source=_tells_more),
    "an owner accepts": Core(destination=_owner_accepts),
    "Go for any attempt": Core(destination=_go_for_any_attempt),
    "refuses what it owns": Core(destination=_refuses_what_it_owns),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_code_without_a_guard_is_not_the_model(mutant: str) -> None:
    """A change of the code that the model does not have is seen."""
    assert next(differences(Rules(), MUTANTS[mutant]), "")


@pytest.mark.parametrize("broken", [_epoch_short])
def test_a_wrong_right_is_seen_on_its_edge(broken: Callable[[Any, Any], list[Action]]) -> None:
    """What a record grants is compared as well, not only that it is written."""
    seen = 0
    for now, step in edges(Model(bounds=SAFE[0].quick)):
        if step.decision is None or not any(do.word == "RECLAIMED*" for do in step.decision.does):
            continue
        _, event, _, done = step.decision
        host, after = local(now.hosts[step.host]), step.after.hosts[step.host]
        actions = asked(Core(source=broken), host, event, step.after.attempts) or []
        granted = folded(host, actions[:done], event, step.after.attempts)[2]
        seen += granted != after.rights.granted
    assert seen
