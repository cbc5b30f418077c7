"""What is being done about a host that is to be emptied, and what comes next, as a sentence. Pure.

Promise: the same facts give the same words, and words change only when something has: a time is named only if it
stays what it is until something fails again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from vmferry.drain.planner import Decision, Facts, Failures, Machine, Standing


def asking(machines: Sequence[Machine], destinations: Sequence[str]) -> str:
    """While hosts are asked for the first time."""
    return f"asking {_named(destinations)} about {_count(len(machines))}; nothing moves before they have answered"


def measuring(done: int, count: int, seconds: float) -> str:
    """While costs are measured."""
    return (
        f"measuring what moving each machine costs, {done} of {count} done, {seconds:g} s at the most; "
        "then the cheapest goes first"
    )


def turns(decision: Decision) -> list[str]:
    """The machines that wait for their turn, the next one first."""
    begun = {machine for machine, _ in decision.start}
    return [one for one in decision.order if one not in begun and one not in decision.stays]


def what_next(facts: Facts, decision: Decision, names: Mapping[str, str]) -> str:
    """Once it is known what every machine costs, and where it could go."""
    waiting = turns(decision)
    under_way = len(decision.start) + sum(one.standing is Standing.MOVING for one in facts.machines)
    parts = []
    if waiting and len(decision.start) >= facts.room:
        parts.append(
            f"{names[waiting[0]]} goes next, as soon as one of the {under_way} under way has ended "
            "(max_outgoing)"
            if under_way
            else f"{names[waiting[0]]} goes next"
        )
    elif waiting:
        parts.append(f"{names[waiting[0]]} goes next, as soon as a destination has room for it")
    elif under_way:
        others = f"{len(decision.stays)} cannot move now" if decision.stays else "nothing waits"
        parts.append(f"{others}; {under_way} under way")
    elif facts.machines:
        parts.append(f"looking again every {facts.fresh_s:g} s; it goes on by itself when something can move")
    parts += [_resting(host, until_s) for host in facts.destinations if (until_s := _rest(facts, host))]
    if decision.stays and (again_s := _again(facts, decision)):
        parts.append(f"what came back is tried again at {_clock(again_s)}")
    return "; ".join(parts)


def _rest(facts: Facts, host: str) -> float:
    until_s = facts.hosts.get(host, Failures()).until_s(facts.rest_s)
    return until_s if until_s > facts.now_s else 0.0


def _again(facts: Facts, decision: Decision) -> float:
    """When a machine that stays is tried again where it failed before; 0 if none is."""
    times = [
        until_s
        for (machine, _), failures in facts.pairs.items()
        if machine in decision.stays and (until_s := failures.until_s(facts.rest_s)) > facts.now_s
    ]
    return min(times, default=0.0)


def _resting(host: str, until_s: float) -> str:
    return f"{_short(host)} does not answer as it should and is left alone until {_clock(until_s)}"


def _clock(at_s: float) -> str:
    return f"{datetime.fromtimestamp(at_s, UTC):%H:%M:%S}Z"


def _named(hosts: Sequence[str]) -> str:
    return ", ".join(map(_short, hosts))


def _short(host: str) -> str:
    return host.rpartition("/")[2]


def _count(number: int) -> str:
    return f"{number} machine{'' if number == 1 else 's'}"
