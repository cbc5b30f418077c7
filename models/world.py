"""What can happen next to some hosts, a network that loses, and an operator.

* A message that was sent may arrive at any time later, or again, or never: loss, repetition, reordering, delay and
  partitions are all covered. A destination's answer may be had as soon as it would be given to somebody who asked.
* What a timer may trigger is possible at any moment, and so is a cancellation.
* Each record and each release is a step of its own. A killed service does not do what it had still to do, and the
  next one no longer knows what the process knew; a dead hypervisor takes the guest's memory; a crashed machine takes
  both, and with them the last record of each journal where that is not on disk, or not.
* Resuming is no step of a decision: the owner of a paused guest may resume it whenever the gate lets it. An owner
  without a guest may start it anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Final, NamedTuple

from models import rules
from models.journals import (
    DESTINATION,
    NOT_UPDATING,
    RECORDS,
    SOURCE,
    in_destination_journal,
    in_source_journal,
    killed,
    settled,
    with_item,
    without_last,
)
from models.promises import BOTH, CRASHED, NO_COPY, STALE, redundant, usable
from models.rules import DestinationEvent, Do, Rules, SourceEvent
from models.state import (
    ABSENT,
    NAMES,
    NOBODY,
    OPEN_HERE,
    PAUSED,
    RUNNING,
    TAKEN,
    Attempt,
    Host,
    Phase,
    Rights,
    Said,
    Stands,
    World,
    answer_bit,
    came_back,
    holds,
    leaving,
    leftover,
    moved_on,
    owner,
    permitted,
    proved_gone_by,
)

ROLES: Final = ("source", "destination")


@dataclass(frozen=True)
class Bounds:
    """How much may happen."""

    hosts: int = 2
    attempts: int = 2
    faults: int = 1
    """Crashes of machines, deaths of hypervisors, and whatever else is switched on here."""
    journals_lost: bool = False
    records_rot: bool = False
    """The last record of a journal may become unreadable, and a crash may leave the end of one torn."""
    waits_end: bool = False
    """A source without memory may have waited long enough."""
    operator: bool = False
    """Somebody cuts the power of a host for good, and forces the other one."""
    unfenced: str = ""
    """Somebody forces the ``source`` of the first attempt although the other host may run; or ``either``, or both."""


class Decision(NamedTuple):
    """What an end was told, and all that it does about it."""

    role: int
    event: SourceEvent | DestinationEvent
    does: tuple[Do, ...]
    done: int
    """How many of these things had been done when the service was killed, if it was."""


class Step(NamedTuple):
    """One transition; a fault is nothing that liveness may count on."""

    name: str
    after: World
    host: int
    decision: Decision | None = None
    fault: bool = False


class Model:
    """All that may happen next, within bounds."""

    def __init__(self, protocol: Rules | None = None, bounds: Bounds | None = None) -> None:
        self.rules = protocol or Rules()
        self.bounds = bounds or Bounds()

    def initial(self) -> World:
        """The machine was born on the first host and runs there."""
        first = Host(vm=RUNNING, rights=Rights(by_source=1))
        return World(hosts=(first, *(Host() for _ in range(self.bounds.hosts - 1))))

    def steps(self, world: World) -> Iterator[Step]:
        """Everything that may happen next."""
        for number, host in enumerate(world.hosts):
            if host.off:
                continue
            yield from self._faults(world, number)
            yield from self._guest(world, number)
            yield from self._pauses(world, number)
            for asked in self._source_events(world, number):
                yield from self._decide(world, number, SOURCE, asked)
            for event in self._destination_events(world, number):
                yield from self._decide(world, number, DESTINATION, event)
            yield from self._begins(world, number)

    # Faults

    def _faults(self, world: World, number: int) -> Iterator[Step]:
        host = world.hosts[number]
        for role in (SOURCE, DESTINATION):
            after = killed(host, role)
            if after != host:
                yield self._fault(f"kill-{ROLES[role]}", world, number, after)
        if world.faults >= self.bounds.faults:
            return
        world = world._replace(faults=world.faults + 1)
        fresh = host.fresh and self.rules.lacks("what a process knew dies with it")
        dead = host._replace(vm=ABSENT, held=0)
        crashed = dead._replace(fresh=fresh, taking=False, **NOT_UPDATING)
        if host.vm != ABSENT:
            lost = self._lost_by(world, number)
            yield self._fault("death", world._replace(lost=lost), number, dead)
            for keeps in product(*({True, not lazy} for lazy in host.lazy)):
                after = crashed
                for role in (SOURCE, DESTINATION):
                    after = settled(after, role) if keeps[role] else without_last(after, role)
                name = "crash" + "".join("-+"[kept] for kept in keeps)
                yield self._fault(name, world._replace(lost=lost), number, after)
        if self.bounds.records_rot:
            yield from self._rot(world, number, crashed)
        if self.bounds.journals_lost and world.attempts:
            empty = Host(journal=host.journal + 1)
            yield self._fault("journal-loss", world._replace(lost=CRASHED), number, empty)
        if self.bounds.operator and world.attempts:  # what the other one holds is nothing but a copy
            yield self._fault("power-off", world._replace(lost=CRASHED), number, crashed._replace(off=True))

    def _rot(self, world: World, number: int, crashed: Host) -> Iterator[Step]:
        """A record that was on disk cannot be read any more, as a restart finds; or a crash tore one half written."""
        host = world.hosts[number]
        for role in (SOURCE, DESTINATION):
            if host.before[role] is not None:
                rotten = put(world, number, without_last(killed(host, role), role, torn=True))
                rotten = _unanswered(rotten, number) if role == DESTINATION else rotten
                if not rotten.lost and not usable(rotten):
                    rotten = rotten._replace(lost=CRASHED)
                yield Step(f"rot-{ROLES[role]}@{NAMES[number]}", rotten, number, fault=True)
            if host.vm != ABSENT and host.out.phase in {Phase.BEGUN, Phase.SEALED}:
                torn = crashed._replace(torn=with_item(host.torn, role, value=True))
                lost = self._lost_by(world, number)
                yield self._fault(f"crash-tears-{ROLES[role]}", world._replace(lost=lost), number, torn)

    def _lost_by(self, world: World, number: int) -> str:
        if world.hosts[number].vm != RUNNING and usable(world) != {number}:
            return world.lost
        return BOTH if redundant(world) else world.lost or CRASHED

    def _fault(self, name: str, world: World, number: int, after: Host) -> Step:
        return Step(f"{name}@{NAMES[number]}", put(world, number, after), number, fault=True)

    # The hypervisor, and the owner's right to use it

    def _guest(self, world: World, number: int) -> Iterator[Step]:
        host, name = world.hosts[number], NAMES[number]
        anybody = self.rules.lacks("the gate looks for open attempts")
        if permitted(host, world.attempts) or (anybody and owner(host)):
            # Where two may run there is no latest state, and nothing is promised of it.
            latest = world.latest + (not self.bounds.unfenced)
            started = put(world, number, host._replace(vm=RUNNING, held=latest))._replace(latest=latest)
            if host.vm == PAUSED:
                lost = STALE if host.held != world.latest else ""
                yield Step(f"resume@{name}", started._replace(lost=lost), number)
            if host.vm == ABSENT and not anybody:
                yield Step(f"cold-boot@{name}", started._replace(lost=""), number)
        sealed = host.out.phase in {Phase.SEALED, Phase.HANDED_OFF}
        if host.vm == PAUSED and sealed and world.hosts[world.attempts[host.out.attempt].destination].off:
            ended = put(world, number, host._replace(vm=ABSENT, held=0))._replace(lost=CRASHED)
            yield Step(f"operator-ends-it@{name}", ended, number, fault=True)
        if host.vm == RUNNING and not owner(host):
            # Stopped by the next process, if the one that recorded why was killed; kept until somebody ends it.
            yield Step(f"halt@{name}", put(world, number, host._replace(vm=PAUSED)), number)
        if leftover(host) and host.vm == PAUSED and not holds(host, world.attempts):
            yield Step(f"discard@{name}", put(world, number, host._replace(vm=ABSENT, held=0)), number)

    # The source service

    def _begins(self, world: World, number: int) -> Iterator[Step]:
        host, count = world.hosts[number], len(world.attempts)
        free = permitted(host, world.attempts) and host.out.phase is Phase.QUIET and host.vm == RUNNING
        if not free or count >= self.bounds.attempts:
            return
        for other, there in enumerate(world.hosts):
            if other != number and not there.off:
                attempt = Attempt(number, other, host.rights.granted, host.out.used + 1, there.journal)
                begun = world._replace(
                    attempts=(*world.attempts, attempt), sealed=(*world.sealed, 0), said=(*world.said, 0)
                )
                yield from self._decide(begun, number, SOURCE, rules.Begin(count), to=NAMES[other])

    def _pauses(self, world: World, number: int) -> Iterator[Step]:
        host = world.hosts[number]
        accepted = answer_bit(Stands.RECEIVING, same_journal=True)
        ready = host.out.phase is Phase.BEGUN and host.fresh and host.vm == RUNNING
        if ready and world.said[host.out.attempt] & accepted:
            yield Step(f"pause@{NAMES[number]}", put(world, number, host._replace(vm=PAUSED)), number)

    def _source_events(self, world: World, number: int) -> Iterator[SourceEvent]:
        host, attempts = world.hosts[number], world.attempts
        yield from self._goodbyes(world, number)
        if host.out.phase is Phase.QUIET:
            return
        number_of, memory, certain = host.out.attempt, host.vm != ABSENT, not host.torn[SOURCE]
        for answer, same in product(Stands, (True, False)):
            if self._was_said(world, number_of, answer_bit(answer, same_journal=same)):
                yield rules.Heard(answer, same, memory, certain)
        yield rules.AbortWanted(memory, certain, host.fresh)
        yield rules.Unheard()
        if host.out.phase is Phase.BEGUN and host.fresh and host.vm == PAUSED:
            yield rules.Paused()
        if host.inn.newest != NOBODY:
            yield rules.OwnerBegan(host.inn.newest)
        if self.bounds.waits_end:
            yield rules.WaitedEnough(memory, certain)
        fenced = world.hosts[attempts[number_of].destination].off
        lonely = number_of == 0 and (host.out.phase is Phase.HANDED_OFF or not memory)
        if self.bounds.unfenced and lonely:
            yield rules.ForceReclaim(memory, memory, moved_on(host, attempts))
        if self.bounds.operator and (fenced or self.rules.lacks("the other host is off")):
            for with_memory in (False, True) if self.rules.lacks("forced without the memory") else (False,):
                yield rules.ForceReclaim(memory, with_memory, moved_on(host, attempts))

    def _goodbyes(self, world: World, number: int) -> Iterator[SourceEvent]:
        """What is heard of destinations that took a right which was not theirs to take, or was taken back.

        A goodbye and its answer are one step: what is answered stays true, and nobody acts on the answer to another.
        """
        host, attempts = world.hosts[number], world.attempts
        for about, attempt in enumerate(attempts):
            there = world.hosts[attempt.destination]
            if (
                attempt.source == number
                and not there.off
                and self._tells(world, about)
                and there.inn.of(about) in TAKEN
            ):
                asked = self._goodbye(world, about)
                does = self.rules.about(there, asked, attempts)
                if does == (Do(f"({there.inn.of(about).name})", about),):
                    kept = came_back(host, attempts, about) or host.inn.now in OPEN_HERE
                    kept = kept and not self.rules.lacks("what came back since is kept")
                    here = permitted(host, attempts) and not kept
                    yield rules.TakenThere(about, host.rights.granted if here else 0)

    def _tells(self, world: World, about: int) -> bool:
        """Whether the source of an attempt is there to tell its destination that it closed it."""
        attempt = world.attempts[about]
        here = world.hosts[attempt.source]
        known = attempt.journal == world.hosts[attempt.destination].journal
        return known and not here.off and bool(here.closed >> about & 1)

    def _goodbye(self, world: World, about: int) -> rules.CloseAsked:
        attempt = world.attempts[about]
        here, there = world.hosts[attempt.source], world.hosts[attempt.destination]
        mine = there.rights.granted if owner(there) else 0
        return rules.CloseAsked(about, 0 < mine < here.rights.granted, leaving(there, world.attempts))

    def _was_said(self, world: World, attempt: int, bit: int) -> bool:
        if self.rules.lacks("messages name their attempt"):
            source = world.attempts[attempt].source
            return any(
                said & bit
                for said, other in zip(world.said, world.attempts, strict=True)
                if other.source == source
            )
        return bool(world.said[attempt] & bit)

    # The destination service

    def _destination_events(self, world: World, number: int) -> Iterator[DestinationEvent]:
        host, attempts = world.hosts[number], world.attempts
        for about, attempt in enumerate(attempts):
            if attempt.destination == number:
                yield from self._asked(world, number, about)
        now, certain = host.inn.now, not host.torn[DESTINATION]
        if now in OPEN_HERE:
            yield rules.Stalled()
        if now is Stands.RECEIVING or (now is Stands.PREPARED and host.vm == ABSENT):
            yield rules.CopyLost(certain)
        sent_on = leaving(host, attempts) or not owner(host)
        if now is Stands.OWNED and (host.vm == RUNNING or sent_on):
            yield rules.GuestRan()
        waits = host.inn.newest == 0 and now in {Stands.PREPARED, Stands.REFUSED}
        if self.bounds.unfenced == "either" and waits and not holds(host, attempts):
            yield rules.ForceAccept(memory=now is Stands.PREPARED, intact=host.vm == PAUSED)
        if self.bounds.operator and now in {Stands.PREPARED, Stands.REFUSED}:
            source_off = world.hosts[attempts[host.inn.newest].source].off
            if source_off:
                yield rules.ForceAccept(memory=False, intact=host.vm == PAUSED)
                if self.rules.lacks("forced without the memory"):
                    yield rules.ForceAccept(memory=True, intact=host.vm == PAUSED)

    def _asked(self, world: World, number: int, about: int) -> Iterator[DestinationEvent]:
        host, attempts, said = world.hosts[number], world.attempts, world.said[about]
        if attempts[about].journal == host.journal:
            if said & Said.BEGIN:
                spent = proved_gone_by(host, attempts, about)
                left = leftover(host)
                held = (holds(host, attempts) and not spent) or (left and not spent)
                yield rules.BeginAsked(about, held, left and spent)
            arriving = host.inn.newest == about and host.inn.now is Stands.RECEIVING
            if said & Said.SEAL and (not arriving or (host.taking and host.vm == ABSENT)):
                yield rules.Verified(about)
            if self._was_said(world, about, Said.GO):
                yield rules.GoAsked(about, host.vm != ABSENT)
        if said & Said.ABORT:
            yield rules.CloseAsked(about)
        if self._tells(world, about):
            yield self._goodbye(world, about)
        yield rules.StatusAsked(about)

    # What follows from a decision

    def _decide(
        self, world: World, number: int, role: int, event: SourceEvent | DestinationEvent, *, to: str = ""
    ) -> Iterator[Step]:
        """One step per point at which the service may be killed while it does what it decided to do."""
        does = self.rules.about(world.hosts[number], event, world.attempts)
        name = f"{type(event).__name__}{to}@{NAMES[number]}"
        if isinstance(event, rules.Verified) and world.hosts[number].inn.now is Stands.RECEIVING:
            loaded = world.hosts[number]._replace(vm=PAUSED, held=world.sealed[event.attempt])
            world = put(world, number, loaded)
        done, pieces = world, _pieces(does)
        for at, piece in enumerate(pieces, start=1):
            before = done
            for do in piece:
                done = self._done(done, number, role, do)
            done = _answered(done)
            if done != before:
                # Short of the last piece, the service was killed there.
                after = done if at == len(pieces) else put(done, number, killed(done.hosts[number], role))
                decision = Decision(role, event, does, sum(map(len, pieces[:at])))
                yield Step(f"{name}:{piece[0].word}", after, number, decision)

    def _done(self, world: World, number: int, role: int, do: Do) -> World:
        host = world.hosts[number]
        if do.word.rstrip("*") in RECORDS:
            return self._recorded(world, number, role, do)
        match do.word:
            case "Go":
                return _tell(world, do.attempt, Said.GO)
            case "Abort":
                return _tell(world, do.attempt, Said.ABORT)
            case "(REFUSED)":
                same = world.attempts[do.attempt].journal == host.journal
                return _tell(world, do.attempt, answer_bit(Stands.REFUSED, same_journal=same))
            case "release":
                return self._released(world, number, role)
            case "halt" if host.vm == RUNNING:
                return put(world, number, host._replace(vm=PAUSED))
        return world

    def _released(self, world: World, number: int, role: int) -> World:
        host = world.hosts[number]
        arrived = host.inn.now in OPEN_HERE or owner(host)
        spared = role == SOURCE and arrived and not self.rules.lacks("never a copy that arrived since")
        if host.vm == RUNNING or spared:
            return world
        return put(world, number, host._replace(vm=ABSENT, held=0))

    def _recorded(self, world: World, number: int, role: int, do: Do) -> World:
        host, kind, lazy = world.hosts[number], do.word.rstrip("*"), not do.word.endswith("*")
        keep = lazy or self.bounds.records_rot
        host = host._replace(
            lazy=with_item(host.lazy, role, lazy),
            torn=with_item(host.torn, role, value=False),
            before=with_item(host.before, role, (host.out, host.inn, host.rights) if keep else None),
        )
        attempt = world.attempts[do.attempt]
        if role == DESTINATION:
            without_copy = kind == "OWNED" and host.vm == ABSENT
            world = world._replace(lost=NO_COPY) if without_copy else world
            return put(world, number, in_destination_journal(host, kind, do.attempt, attempt))
        if kind == "SEALED" and host.vm != ABSENT:
            sealed = (*world.sealed[: do.attempt], host.held, *world.sealed[do.attempt + 1 :])
            world = world._replace(sealed=sealed)
        told = {"BEGUN": Said.BEGIN, "SEALED": Said.SEAL}.get(kind)
        world = _tell(world, do.attempt, told) if told else world
        return put(world, number, in_source_journal(host, kind, do.attempt, attempt))


def _pieces(does: tuple[Do, ...]) -> list[list[Do]]:
    """What is told goes with the record or the effect before it: not to be told is not to be heard."""
    pieces: list[list[Do]] = []
    for do in does:
        if not pieces or do.word in {"release", "halt"} or do.word.rstrip("*") in RECORDS:
            pieces.append([do])
        else:
            pieces[-1].append(do)
    return pieces


def put(world: World, number: int, host: Host) -> World:
    """The world with one of its hosts replaced."""
    return world._replace(hosts=(*world.hosts[:number], host, *world.hosts[number + 1 :]))


def _tell(world: World, attempt: int, bit: int) -> World:
    said = world.said[attempt] | bit
    return world._replace(said=(*world.said[:attempt], said, *world.said[attempt + 1 :]))


def _answered(world: World) -> World:
    """Every answer that somebody would get who asked a destination now."""
    for number, attempt in enumerate(world.attempts):
        host = world.hosts[attempt.destination]
        stands = host.inn.of(number)
        if stands is not Stands.UNSEEN:
            world = _tell(world, number, answer_bit(stands, same_journal=attempt.journal == host.journal))
    return world


def _unanswered(world: World, number: int) -> World:
    """The world after a restart of a destination: a source hears one answer before it asks again."""
    said = [
        bits & (Said.BEGIN | Said.SEAL | Said.GO | Said.ABORT) if attempt.destination == number else bits
        for bits, attempt in zip(world.said, world.attempts, strict=True)
    ]
    return world._replace(said=tuple(said))
