"""Several hosts in memory around the real hand-off core: what the simulation's suites explore.

What is real: ``decide`` and ``evolve`` of both halves, the records' codec, ``Rights`` and the gate. What is
simulated: the disk (a list of records of which the last may not be on disk yet), the guest (paused, running or
absent, and the number of the state it holds), and the network.

* A message stays deliverable for ever once it was sent, so loss, repetition, reordering and delay are all covered.
  A destination's answer exists as soon as it would be given to somebody who asked.
* ``purge`` takes everything in flight away at once: what follows must come from the journals alone.
* A machine crash takes the guest's memory and the record that is not on disk yet, or not that record.
* Each record and each release that ``decide`` asks for is a step of its own, and a service kill drops those not done
  yet. Telling needs no step (a message that was never sent is one that was never delivered), nor does resuming (the
  owner of a paused guest may resume it at any moment, if the gate lets it).
* Timers need no clock: what a timer may trigger is possible at any moment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Final, NamedTuple

from tests.simulation.world import (
    ABSENT,
    ACTIONS,
    ATTEMPTS,
    BOTH,
    CRASHED,
    MACHINE,
    NO_COPY,
    PAUSED,
    RECORDS,
    RUNNING,
    Host,
    Message,
    World,
    attempt_of,
    destination_state,
    digest_of,
    host_of,
    incarnation_of,
    leftover,
    moved_on,
    put,
    redundant,
    replaced,
    resumed,
    rights,
    sent,
    source_state,
    through_codec,
    uri_of,
    usable,
)
from vmferry.errors import VmferryError
from vmferry.handoff import destination, source
from vmferry.handoff.rights import Standing
from vmferry.handoff.states import (
    Action,
    Answer,
    Append,
    Attempt,
    AttemptState,
    InvalidTransitionError,
    Record,
    RecordKind,
    Release,
    Resume,
    Tell,
    Wait,
)

_NO_STEP: Final = (Answer, Resume, Wait)
_ASK: Final = Tell("GetAttempt")
"""No step either: the question about any attempt may arrive at any moment."""


class Step(NamedTuple):
    """One transition; a fault is nothing that liveness may count on."""

    name: str
    after: World
    fault: bool = False


@dataclass(frozen=True)
class Core:
    """The functions under test; the broken variants replace one."""

    source_decide: Callable[[source.SourceState, source.SourceEvent], list[Action]] = source.decide
    destination_decide: Callable[
        [destination.DestinationState, destination.DestinationEvent], list[Action]
    ] = destination.decide


class Simulation:
    """All that may happen next to some hosts, within bounds."""

    def __init__(
        self,
        core: Core = Core(),
        *,
        hosts: int = 2,
        attempts: int = 2,
        crashes: int = 2,
        purges: int = 0,
        amnesia: bool = False,
        operator: bool = False,
    ) -> None:
        self._core = core
        self._hosts = range(hosts)
        self._attempts = attempts
        self._crashes = crashes
        self._purges = purges
        self._amnesia = amnesia
        self._operator = operator
        self._cache: dict[tuple[tuple[int, ...], Message, bool, bool, bool], tuple[Action, ...]] = {}

    def initial(self) -> World:
        """The machine was born on the first host and runs there."""
        born = RECORDS.number(Record(RecordKind.BORN, MACHINE, epoch=1))
        first = Host(vm=(RUNNING, 0), operator=(through_codec(born),))
        return World(hosts=(first, *(Host() for _ in self._hosts[1:])))

    def steps(self, world: World) -> Iterator[Step]:
        """Everything that may happen next."""
        for step in self._raw_steps(world):
            yield step._replace(after=self._answered(step.after))

    def _raw_steps(self, world: World) -> Iterator[Step]:
        for number in self._hosts:
            if world.hosts[number].off:
                continue
            if self._operator:
                yield from self._overrides(world, number)
            yield from self._faults(world, number)
            yield from self._guest_steps(world, number)
            for role in (0, 1):
                if world.hosts[number].todo[role]:
                    yield self._act(world, number, role)
            if not world.hosts[number].todo[0]:
                yield from self._source_steps(world, number)
            if not world.hosts[number].todo[1]:
                yield from self._destination_steps(world, number)
        if world.purges < self._purges and world.messages:
            yield Step("purge", world._replace(messages=frozenset(), purges=world.purges + 1), fault=True)

    # Faults

    def _faults(self, world: World, number: int) -> Iterator[Step]:
        host, name = world.hosts[number], "abc"[number]
        for role in (0, 1):
            if host.todo[role]:
                dropped = replaced(host.todo, role, ())
                yield Step(f"kill{role}@{name}", put(world, number, host._replace(todo=dropped)), fault=True)
        if world.faults >= self._crashes:
            return
        if host.vm[0] != ABSENT:
            lost = self._lost_by(world, number)
            for kept in {(True, True), *(replaced((True, True), r, not host.unsynced[r]) for r in (0, 1))}:
                after = host._replace(
                    vm=(ABSENT, 0),
                    outgoing=host.outgoing if kept[0] else host.outgoing[:-1],
                    incoming=host.incoming if kept[1] else host.incoming[:-1],
                    unsynced=(False, False),
                    todo=((), ()),
                )
                crashed = put(world, number, after)._replace(faults=world.faults + 1, lost=lost)
                yield Step(f"crash{''.join('-+'[k] for k in kept)}@{name}", crashed, fault=True)
        if self._amnesia and world.attempts:
            empty = Host(incarnation=host.incarnation + 1)
            yield Step(
                f"journal-loss@{name}",
                put(world, number, empty)._replace(faults=world.faults + 1, lost=CRASHED),
                fault=True,
            )

    def _lost_by(self, world: World, number: int) -> str:
        held = usable(world)
        if world.hosts[number].vm[0] != RUNNING and held != {number}:
            return world.lost
        return BOTH if redundant(world) else world.lost or CRASHED

    # An operator, who cuts one host's power for good and then decides at the other one

    def _overrides(self, world: World, number: int) -> Iterator[Step]:
        host, name = world.hosts[number], "abc"[number]
        if world.attempts and world.faults < self._crashes:
            off = put(world, number, host._replace(vm=(ABSENT, 0), todo=((), ()), off=True))
            yield Step(f"power-off@{name}", off._replace(faults=world.faults + 1, lost=CRASHED), fault=True)
        leaving, arriving = source_state(host.outgoing), destination_state(host.incoming).current
        if not isinstance(leaving, source.Quiet) and not host.todo[0]:
            yield from self._reclaims(world, number, leaving)
        waits = isinstance(arriving, (destination.Prepared, destination.Refused)) and not host.todo[1]
        if waits and world.hosts[host_of(arriving.attempt.source)].off and not rights(host).holds:
            intact = host.vm[0] == PAUSED
            event = destination.ForceAccept("operator", "off", copy_intact=intact, with_memory=False)
            actions = self._core.destination_decide(destination_state(host.incoming), event)
            step = self._decided(world, number, 1, "force-accept", actions)
            assert step is not None
            yield step._replace(fault=True)

    def _reclaims(
        self, world: World, number: int, state: source.Begun | source.Sealed | source.HandedOff
    ) -> Iterator[Step]:
        host = world.hosts[number]
        if not world.hosts[host_of(state.attempt.destination)].off or rights(host).moved_on:
            return
        if host.vm[0] == PAUSED:  # it may be older than the disks: it is ended first
            ended = put(world, number, host._replace(vm=(ABSENT, 0)))._replace(lost=CRASHED)
            yield Step(f"operator-ends-it@{'abc'[number]}", ended, fault=True)
        elif host.vm[0] == ABSENT:
            event = source.ForceReclaim(
                "operator", "off", memory_intact=False, with_memory=False, moved_on=False
            )
            step = self._decided(world, number, 0, "force-reclaim", self._core.source_decide(state, event))
            assert step is not None
            yield step._replace(fault=True)

    # The hypervisor, and the owner's right to use it

    def _guest_steps(self, world: World, number: int) -> Iterator[Step]:
        host, name = world.hosts[number], "abc"[number]
        if not rights(host).permitted:
            return
        if host.vm[0] == PAUSED:
            yield Step(f"resume@{name}", resumed(world, number))
        if host.vm[0] == ABSENT:
            booted = host._replace(vm=(RUNNING, world.current + 1))
            yield Step(
                f"cold-boot@{name}", put(world, number, booted)._replace(current=world.current + 1, lost="")
            )

    # Actions

    def _act(self, world: World, number: int, role: int) -> Step:
        host = world.hosts[number]
        action = ACTIONS.items[host.todo[role][0]]
        host = host._replace(todo=replaced(host.todo, role, host.todo[role][1:]))
        name = f"{_said(action)}@{'abc'[number]}"
        world = put(world, number, host)
        if isinstance(action, Append):
            world = self._appended(world, number, role, action.record, durable=action.durable)
        elif isinstance(action, Tell):
            world = self._told(world, number, action.method)
        elif isinstance(action, Release) and host.vm[0] != RUNNING and _may_release(host, role):
            world = put(world, number, host._replace(vm=(ABSENT, 0)))
        rest = world.hosts[number].todo[role]
        if rest and isinstance(ACTIONS.items[rest[0]], Tell):
            return self._act(world, number, role)._replace(name=name)
        return Step(name, world)

    def _appended(self, world: World, number: int, role: int, record: Record, *, durable: bool) -> World:
        host = world.hosts[number]
        written = through_codec(RECORDS.number(record))
        if record.kind is RecordKind.OWNED and host.vm[0] != PAUSED:
            world = world._replace(lost=NO_COPY)
        if role == 0:
            host = host._replace(outgoing=(*host.outgoing, written))
            source_state(host.outgoing)  # raises if it cannot follow
        else:
            host = host._replace(incoming=(*host.incoming, written))
            destination_state(host.incoming)
        world = put(world, number, host._replace(unsynced=replaced(host.unsynced, role, not durable)))
        told = {RecordKind.BEGUN: "Begin", RecordKind.SEALED: "Seal"}.get(record.kind)
        return self._told(world, number, told) if told else world

    def _told(self, world: World, number: int, method: str) -> World:
        host = world.hosts[number]
        state = source_state(host.outgoing)
        attempt = RECORDS.items[host.outgoing[-1]].attempt  # open, or closed just now
        assert attempt is not None
        digest = int.from_bytes(getattr(state, "digest", b""), "big")
        return sent(world, Message(ATTEMPTS.number(attempt), method, digest=digest))

    def _decided(
        self, world: World, number: int, role: int, name: str, actions: Sequence[Action]
    ) -> Step | None:
        host = world.hosts[number]
        # A source releases the guest that it holds now, never one that arrives later.
        ignored = (*_NO_STEP, Release) if role == 0 and host.vm[0] == ABSENT else _NO_STEP
        todo = tuple(
            ACTIONS.number(action) for action in actions if not isinstance(action, ignored) and action != _ASK
        )
        if not todo:
            return None
        step = self._act(
            put(world, number, host._replace(todo=replaced(host.todo, role, todo))), number, role
        )
        return step._replace(name=f"{name}:{step.name}")

    # The source service

    def _source_steps(self, world: World, number: int) -> Iterator[Step]:
        host = world.hosts[number]
        state = source_state(host.outgoing)
        if isinstance(state, source.Quiet):
            yield from self._begins(world, number, state)
            return
        index = ATTEMPTS.number(state.attempt)
        answers = [m for m in world.messages if m.attempt == index and m.kind == "answer"]
        events: list[tuple[str, source.SourceEvent]] = [
            ("unheard", source.Unheard()),
            (
                "abort",
                source.AbortWanted("any reason", memory_intact=host.vm[0] != ABSENT, tail_certain=True),
            ),
            *((f"heard-{AttemptState(m.state).name}", self._heard(m, host)) for m in answers),
        ]
        back = destination_state(host.incoming).current
        if not isinstance(back, destination.Empty):
            events.append(("owner-began", source.OwnerBegan(back.attempt)))
        if isinstance(state, source.Begun) and any(m.state == AttemptState.RECEIVING.value for m in answers):
            if host.vm[0] == RUNNING:
                yield Step(
                    f"pause@{'abc'[number]}", put(world, number, host._replace(vm=(PAUSED, host.vm[1])))
                )
            elif host.vm[0] == PAUSED:
                events.append(("paused", source.Paused(digest_of(host.vm[1]))))
        for name, event in events:
            step = self._decided(world, number, 0, name, self._core.source_decide(state, event))
            if step is not None:
                yield step
        if isinstance(state, source.Sealed):
            sealed = self._told(world, number, "Seal")
            if sealed != world:
                yield Step(f"seal-again@{'abc'[number]}", sealed)

    def _heard(self, message: Message, host: Host) -> source.Heard:
        attempt = attempt_of(message.attempt)
        return source.Heard(
            attempt,
            AttemptState(message.state),
            incarnation_of(host_of(attempt.destination), message.incarnation),
            digest_of(message.digest) if message.state == AttemptState.PREPARED.value else b"",
            memory_intact=host.vm[0] != ABSENT,
            tail_certain=True,
        )

    def _begins(self, world: World, number: int, state: source.Quiet) -> Iterator[Step]:
        host = world.hosts[number]
        mine = rights(host)
        if len(world.attempts) >= self._attempts or not mine.permitted or host.vm[0] != RUNNING:
            return
        for other in self._hosts:
            if other == number:
                continue
            attempt = Attempt(
                MACHINE,
                len(world.attempts).to_bytes(16, "big"),
                state.last_number + 1,
                mine.epochs.granted,
                uri_of(number),
                uri_of(other),
                incarnation_of(number, host.incarnation),
                incarnation_of(other, world.hosts[other].incarnation),
            )
            actions = self._core.source_decide(state, source.BeginWanted(attempt))
            begun = world._replace(attempts=(*world.attempts, ATTEMPTS.number(attempt)))
            step = self._decided(begun, number, 0, f"begin-{'abc'[other]}", actions)
            assert step is not None
            yield step

    # The destination service

    def _destination_steps(self, world: World, number: int) -> Iterator[Step]:
        host = world.hosts[number]
        state = destination_state(host.incoming)
        questions = [Message(index, "GetAttempt") for index in world.attempts]
        for message in (*questions, *world.messages):
            attempt = attempt_of(message.attempt)
            if message.kind == "answer" or attempt.destination != uri_of(number):
                continue
            known = attempt.destination_incarnation == incarnation_of(number, host.incarnation)
            if known or message.kind in {"GetAttempt", "Abort"}:  # the service turns the others down
                yield from self._asked(world, number, message)
        events: list[tuple[str, destination.DestinationEvent]] = []
        if isinstance(state.current, (destination.Receiving, destination.Prepared)):
            events.append(("stalled", destination.Stalled()))
        gone = isinstance(state.current, destination.Prepared) and host.vm[0] == ABSENT
        if isinstance(state.current, destination.Receiving) or gone:
            events.append(("copy-lost", destination.CopyLost("gone", tail_certain=True)))
        if isinstance(state.current, destination.Owned) and (host.vm[0] == RUNNING or moved_on(host)):
            events.append(("ran", destination.GuestRan()))
        for name, event in events:
            step = self._decided(world, number, 1, name, self._core.destination_decide(state, event))
            if step is not None:
                yield step
        if leftover(host) and not rights(host).holds and not host.todo[0]:
            yield Step(f"discard@{'abc'[number]}", put(world, number, host._replace(vm=(ABSENT, 0))))

    def _asked(self, world: World, number: int, message: Message) -> Iterator[Step]:
        host = world.hosts[number]
        state = destination_state(host.incoming)
        now = state.current
        awaited = isinstance(now, destination.Receiving) and now.attempt.matches(attempt_of(message.attempt))
        if message.kind == "Seal" and awaited:
            world = put(world, number, host._replace(vm=(PAUSED, message.digest)))
        spent = rights(host).proved_gone_by(attempt_of(message.attempt))
        holds = message.kind == "Begin" and (
            not rights(host).admits(attempt_of(message.attempt)) or (leftover(host) and not spent)
        )
        actions = self._answers_to(
            host.incoming,
            message,
            copy_intact=host.vm[0] == PAUSED,
            holds=holds,
            stale=leftover(host) and spent,
        )
        step = self._decided(world, number, 1, message.kind, actions)
        if step is not None:
            yield step
            return
        for action in actions:
            if isinstance(action, Answer):
                said = _answer_message(state, message.attempt, action)._replace(incarnation=host.incarnation)
                if said not in world.messages:
                    yield Step(f"answer-{action.state.name}@{'abc'[number]}", sent(world, said))

    def _answers_to(
        self, incoming: tuple[int, ...], message: Message, *, copy_intact: bool, holds: bool, stale: bool
    ) -> tuple[Action, ...]:
        key = (incoming, message, copy_intact, holds, stale)
        if key not in self._cache:
            attempt, digest = attempt_of(message.attempt), digest_of(message.digest)
            event: destination.DestinationEvent
            match message.kind:
                case "Begin":
                    event = destination.BeginAsked(
                        attempt, attempt.migration_id, 1, host_holds_machine=holds, stale_copy=stale
                    )
                case "Seal":
                    event = destination.Verified(attempt, digest)
                case "Go":
                    event = destination.GoAsked(attempt, digest, copy_intact=copy_intact)
                case "Abort":
                    event = destination.CloseAsked(attempt, "asked to")
                case _:
                    event = destination.StatusAsked(attempt)
            try:
                self._cache[key] = tuple(self._core.destination_decide(destination_state(incoming), event))
            except InvalidTransitionError:
                raise
            except VmferryError:
                self._cache[key] = ()  # turned down
        return self._cache[key]

    def _answered(self, world: World) -> World:
        """Every answer that somebody would get who asked a destination now; none right after a purge."""
        if world.purges and not world.messages:
            return world
        messages = set(world.messages)
        for number in world.attempts:
            host = world.hosts[host_of(attempt_of(number).destination)]
            if host.off:
                continue
            known = _known_answer(host.incoming, number)
            if known is not None:
                messages.add(known._replace(incarnation=host.incarnation))
        return world if len(messages) == len(world.messages) else world._replace(messages=frozenset(messages))


@cache
def _known_answer(incoming: tuple[int, ...], attempt: int) -> Message | None:
    state = destination_state(incoming)
    known = destination.answer(state, attempt_of(attempt))
    return None if known.state is AttemptState.UNSEEN else _answer_message(state, attempt, known)


def _answer_message(state: destination.DestinationState, attempt: int, answer: Answer) -> Message:
    digest = getattr(state.current, "digest", b"") if answer.state is AttemptState.PREPARED else b""
    return Message(attempt, "answer", answer.state.value, int.from_bytes(digest, "big"))


def _may_release(host: Host, role: int) -> bool:
    """A source never releases a copy that arrived since; a destination releases what its record was about."""
    return role == 1 or rights(host).standing not in {Standing.ARRIVING, Standing.OWNED}


def _said(action: Action) -> str:
    match action:
        case Append(record=record, durable=durable):
            return record.kind.name + ("*" if durable else "")
        case Tell(method=method):
            return method
    return type(action).__name__.lower()
