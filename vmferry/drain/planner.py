"""Which machine of a host that is being emptied goes next, and where to; what waits, what stays, and why. Pure.

What is left is gone through with the cheapest first: most machines are safe soonest if the host has little time. For
each, of the hosts that could take it::

    fewest failures of this machine there -> not busy with others -> fewest of ours on their way there
        -> fewest warnings -> most memory left

A failure is judged by its reason (:func:`consequence`):

    LATER      nobody is at fault (no room, a busy machine): the same host may be tried again soon
    ELSEWHERE  this machine does not get there: that pair rests, each time longer, and other hosts come first
    HOST       nobody gets there: the host rests for all machines, longer each time
    HELD       somebody ended it on purpose: the machine is left alone until the drain is asked for once more

Promise: the same facts give the same answer; no more than ``room`` begin; nothing is begun for a machine that is not
READY, nor at a host that its report rules out, that rests, or whose memory those on their way there have used up; a
machine that could go somewhere now is begun as long as there is room; nothing rests for ever.
"""

from __future__ import annotations

import enum
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

LONGEST_REST_S: Final = 900.0
_GROWTH: Final = 3.0


class Standing(enum.Enum):
    """What may be done with a machine."""

    READY = enum.auto()
    MOVING = enum.auto()
    BLOCKED = enum.auto()
    """Whose it is is not known, or nobody may run it: not touched."""
    HELD = enum.auto()
    """It cannot move wherever to, or somebody ended its migration on purpose."""


@dataclass(frozen=True)
class Machine:
    """A machine that is to go."""

    id: str
    standing: Standing
    memory_bytes: int
    cost_s: float


@dataclass(frozen=True)
class Prospect:
    """What the report about one machine at one host says."""

    compatible: bool
    room_bytes: int
    """Memory that the host would give to newcomers."""
    asked_at_s: float
    warnings: int = 0
    passing: bool = False
    """The host is busy with others, which passes by itself; if it is compatible, machines wait in the queue."""


class Consequence(enum.Enum):
    """What follows from a migration that came back."""

    LATER = enum.auto()
    ELSEWHERE = enum.auto()
    HOST = enum.auto()
    HELD = enum.auto()


_LATER: Final = {"TOO_MANY_MIGRATIONS", "MACHINE_BUSY", "TICKET_EXPIRED", "WRONG_PHASE", "SERVICE_STOPPING"}
_HOST: Final = {"PEER_UNREACHABLE", "PEER_IDENTITY", "HOST_DRAINING", "UNAUTHENTICATED", "PERMISSION_DENIED"}
_HELD: Final = {"CANCELLED", "FORCED_BY_OPERATOR"}


def consequence(reason: str) -> Consequence:
    """What follows from the reason with which a migration ended; one that is not known is the pair's."""
    if reason in _LATER:
        return Consequence.LATER
    if reason in _HOST:
        return Consequence.HOST
    return Consequence.HELD if reason in _HELD else Consequence.ELSEWHERE


@dataclass(frozen=True)
class Failures:
    """How often something went wrong in a row, and when it did last."""

    count: int = 0
    at_s: float = 0.0

    def again(self, now_s: float) -> Failures:
        """One more."""
        return Failures(self.count + 1, now_s)

    def until_s(self, first_s: float) -> float:
        """Until when it rests, if the first rest is so long."""
        if not self.count:
            return 0.0
        return self.at_s + min(LONGEST_REST_S, first_s * _GROWTH ** min(self.count - 1, 30))


@dataclass(frozen=True)
class Placed:
    """A machine that was sent to a host, under way or arrived."""

    destination: str
    memory_bytes: int
    at_s: float
    under_way: bool


@dataclass(frozen=True)
class Facts:
    """Everything that is decided by."""

    machines: Sequence[Machine]
    destinations: Sequence[str]
    prospects: Mapping[tuple[str, str], Prospect]
    """By machine and destination."""
    now_s: float
    room: int
    """How many may begin now."""
    rest_s: float
    """How long something rests after its first failure."""
    fresh_s: float
    """How long a report is good for."""
    placed: Sequence[Placed] = ()
    pairs: Mapping[tuple[str, str], Failures] = field(default_factory=dict)
    hosts: Mapping[str, Failures] = field(default_factory=dict)


@dataclass(frozen=True)
class Decision:
    """What is to be done."""

    start: Sequence[tuple[str, str]]
    """Machine and destination, in this order."""
    ask: Sequence[tuple[str, str]]
    """Reports that are missing or old, and matter."""
    stays: frozenset[str]
    """Ready machines that no host takes as things are."""
    wake_s: float
    """When to decide again at the latest, if nothing happens before."""
    order: Sequence[str] = ()
    """Ready machines, the cheapest first."""

    def is_stuck(self, machines: Iterable[Machine]) -> bool:
        """Whether nothing moves and nothing will before something changes."""
        left = {one.id for one in machines if one.standing is Standing.READY}
        moving = any(one.standing is Standing.MOVING for one in machines)
        return not (moving or self.start or self.ask or left - self.stays)


def decide(facts: Facts) -> Decision:
    """Who begins now, what must be asked, and who stays."""
    ready = sorted(
        (one for one in facts.machines if one.standing is Standing.READY),
        key=lambda one: (one.cost_s, one.memory_bytes, one.id),
    )
    awake = [host for host in facts.destinations if _rests_until(facts, host) <= facts.now_s]
    ask = [
        (one.id, host)
        for one in ready
        for host in awake
        if (found := facts.prospects.get((one.id, host))) is None
        or (found.asked_at_s + facts.fresh_s <= facts.now_s)
    ]
    start: list[tuple[str, str]] = []
    placed = list(facts.placed)
    # The order counts only once every machine has been asked about; what is old may be good enough for that.
    known = all((one.id, host) in facts.prospects for one in ready for host in awake)
    for one in ready if known else ():
        if len(start) >= facts.room:
            break
        host = _best(one, facts, awake, placed)
        if host is not None:
            start.append((one.id, host))
            placed.append(Placed(host, one.memory_bytes, facts.now_s, under_way=True))
    begun = {machine for machine, _ in start}
    stays = frozenset(
        one.id for one in ready if one.id not in begun and known and not _hopeful(one, facts, placed)
    )
    return Decision(start, ask, stays, _wake_s(facts, ready), [one.id for one in ready])


def _rests_until(facts: Facts, host: str, machine: str = "") -> float:
    """Until when a host rests, for all or for one machine."""
    until = facts.hosts.get(host, Failures()).until_s(facts.rest_s)
    pair = facts.pairs.get((machine, host), Failures()).until_s(facts.rest_s)
    return max(until, pair)


def _best(one: Machine, facts: Facts, awake: Sequence[str], placed: Sequence[Placed]) -> str | None:
    """The host that a machine goes to now, if there is one."""
    on_their_way = Counter(other.destination for other in placed if other.under_way)
    choices = []
    for host in awake:
        found = facts.prospects.get((one.id, host))
        if found is None or not found.compatible or _rests_until(facts, host, one.id) > facts.now_s:
            continue
        left = found.room_bytes - _promised(host, found.asked_at_s, placed)
        if left >= one.memory_bytes:
            failures = facts.pairs.get((one.id, host), Failures()).count
            choices.append((failures, found.passing, on_their_way[host], found.warnings, -left, host))
    return min(choices)[-1] if choices else None


def _promised(host: str, since_s: float, placed: Iterable[Placed]) -> int:
    """What was sent to a host after it said how much it has."""
    return sum(other.memory_bytes for other in placed if other.destination == host and other.at_s >= since_s)


def _hopeful(one: Machine, facts: Facts, placed: Sequence[Placed]) -> bool:
    """Whether a machine only waits for its turn, or for what passes by itself."""
    for host in facts.destinations:
        found = facts.prospects.get((one.id, host))
        if found is None or _rests_until(facts, host, one.id) > facts.now_s:
            continue
        if found.passing:
            return True
        if (
            found.compatible
            and found.room_bytes - _promised(host, found.asked_at_s, placed) >= one.memory_bytes
        ):
            return True
    return False


def _wake_s(facts: Facts, ready: Sequence[Machine]) -> float:
    """When something that rests may be tried again, or a report is old."""
    times = [facts.now_s + facts.fresh_s]
    for one in ready:
        times += [
            until for host in facts.destinations if (until := _rests_until(facts, host, one.id)) > facts.now_s
        ]
    return min(times)


def costs_of(
    predicted_s: Mapping[str, float], memory_bytes: Mapping[str, int], rate_bytes_per_s: float
) -> dict[str, float]:
    """What each machine costs: as predicted, or else its memory at a usual rate."""
    found: dict[str, float] = defaultdict(float)
    for machine, size in memory_bytes.items():
        found[machine] = predicted_s.get(machine, size / rate_bytes_per_s)
    return dict(found)
