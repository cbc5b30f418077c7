"""Which of the waiting migrations begin, in which order, and when a full destination is asked again. Pure.

The order, for those that wait with the same priority (a higher one always comes first)::

    whose caller has fewest under way  ->  whose caller was served longest ago
        ->  whose destination has fewest on their way  ->  who came first

"Under way" counts what runs and what stands earlier in the order, so callers take turns however much one of them
asked for, and so do the destinations of one caller.

A destination that had no room is left alone for a while that doubles with each answer, up to a limit; then one
migration asks again, as it does when another to the same host has ended; when it is taken in, everybody may. Nobody
waits behind a migration whose destination is full.

Promise: the same facts give the same answer; whatever can begin without exceeding a limit does begin; nothing waits
for ever for a caller or a destination with more to do.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

HIGHEST_PRIORITY: Final = 9


@dataclass(frozen=True)
class Waiting:
    """A migration in the queue."""

    id: str
    caller: str
    destination: str
    number: int
    """Order of arrival; after a restart it is kept."""
    priority: int = 0


@dataclass(frozen=True)
class Running:
    """A migration that has left the queue and has not ended."""

    caller: str
    destination: str
    asking: bool = False
    """Its destination has not said yet whether there is room."""


@dataclass(frozen=True)
class Full:
    """A destination that said that it had no room."""

    tries: int
    until_s: float
    """When it may be asked again."""


@dataclass(frozen=True)
class Patience:
    """How long a full destination is left alone."""

    first_s: float
    longest_s: float

    def after(self, known: Full | None, now_s: float, *, share: float = 1.0) -> Full:
        """What is known of a destination that has just said that it is full.

        Args:
            known: what was known before.
            now_s: now.
            share: from 0.5 to 1, of the wait: so that hosts that wait for the same one do not ask all at once.
        """
        tries = known.tries + 1 if known is not None else 1
        wait_s = min(self.longest_s, self.first_s * 2 ** min(tries - 1, 30))
        return Full(tries, now_s + wait_s * share)


@dataclass(frozen=True)
class Facts:
    """Everything that is decided by."""

    waiting: Sequence[Waiting]
    running: Sequence[Running]
    max_outgoing: int
    now_s: float
    full: Mapping[str, Full] = field(default_factory=dict)
    """Destinations that had no room, by their host."""
    served: Mapping[str, int] = field(default_factory=dict)
    """When each caller was last served: a number that grows with each migration that leaves the queue."""


@dataclass(frozen=True)
class Place:
    """Where a migration stands in the queue."""

    position: int
    waits_for: str
    """A sentence."""
    next_try_s: float | None = None


@dataclass(frozen=True)
class Plan:
    """What is to be done."""

    start: Sequence[str]
    """Migrations that begin now, in this order."""
    places: Mapping[str, Place]
    """Of those that go on waiting."""
    wake_s: float | None
    """When to decide again at the latest, if nothing happens before."""


def decide(facts: Facts) -> Plan:
    """Who begins now, and how the others stand."""
    running = list(facts.running)
    start: list[str] = []
    rest: list[tuple[Waiting, str, float | None]] = []
    for one in in_order(facts):
        why, next_try_s = _why_not(one, facts, running)
        if why:
            rest.append((one, why, next_try_s))
            continue
        start.append(one.id)
        running.append(Running(one.caller, one.destination, asking=True))
    places = {
        one.id: Place(position, why, next_try_s) for position, (one, why, next_try_s) in enumerate(rest, 1)
    }
    room = len(running) < facts.max_outgoing
    times = [next_try_s for _, _, next_try_s in rest if next_try_s is not None and next_try_s > facts.now_s]
    return Plan(start, places, min(times, default=None) if room else None)


def in_order(facts: Facts) -> list[Waiting]:
    """All that wait, the next one first."""
    callers = Counter(one.caller for one in facts.running)
    destinations = Counter(one.destination for one in facts.running)
    order: list[Waiting] = []
    for priority in sorted({one.priority for one in facts.waiting}, reverse=True):
        lines = _lines(one for one in facts.waiting if one.priority == priority)
        while lines:
            caller, destination = min(
                lines,
                key=lambda key: (
                    callers[key[0]],
                    facts.served.get(key[0], -1),
                    destinations[key[1]],
                    lines[key][0].number,
                ),
            )
            line = lines[caller, destination]
            order.append(line.popleft())
            if not line:
                del lines[caller, destination]
            callers[caller] += 1
            destinations[destination] += 1
    return order


def _lines(waiting: Iterable[Waiting]) -> dict[tuple[str, str], deque[Waiting]]:
    """Those of one caller to one destination stand in line."""
    lines: dict[tuple[str, str], deque[Waiting]] = defaultdict(deque)
    for one in sorted(waiting, key=lambda one: one.number):
        lines[one.caller, one.destination].append(one)
    return dict(lines)


def _why_not(one: Waiting, facts: Facts, running: Sequence[Running]) -> tuple[str, float | None]:
    """Why a migration cannot begin now, and when that changes by itself; an empty sentence if it can."""
    full = facts.full.get(one.destination)
    if full is not None and full.until_s > facts.now_s:
        return f"{one.destination} has no room, and is asked again", full.until_s
    if len(running) >= facts.max_outgoing:
        return f"{facts.max_outgoing} migrations leave this host already (max_outgoing)", None
    if full is not None and any(other.asking and other.destination == one.destination for other in running):
        return f"{one.destination} had no room, and is being asked again", None
    return "", None


def without(full: Mapping[str, Full], destination: str) -> dict[str, Full]:
    """What is known after a destination took somebody in, or may have got room: nothing holds others back."""
    return {host: known for host, known in full.items() if host != destination}


def sooner(full: Mapping[str, Full], destination: str, now_s: float) -> dict[str, Full]:
    """A migration to a full destination has ended: it is worth asking at once, by one."""
    known = full.get(destination)
    return dict(full) if known is None else {**full, destination: replace(known, until_s=now_s)}
