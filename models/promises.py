"""The promises of the hand-off, as statements about worlds.

I1   at most one host runs the guest                     I1b  at most one host is permitted to
I2   the guest never goes on from anything but its latest state, and nobody takes the right without a copy
I3   no step of the protocol (as opposed to a fault) removes the last usable copy of the latest state
I4   once both ends hold a complete copy, one fault of a host on which the guest does not run loses nothing
I6   the new process of an update runs the guest only while its host has the right
L1   from every reachable world, with no further fault, the guest can run again (judged in ``explore``)
I5   two hosts are permitted only where an operator was wrong, and as long as one of the two is still to hear of it
L5   from every such world it can come to be that the guest runs on one host alone, by the latest right (``at_rest``)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from models.state import (
    ABSENT,
    PAUSED,
    RUNNING,
    TAKEN,
    Host,
    Stands,
    UpdatePhase,
    World,
    answer_bit,
    came_back,
    leaving,
    may_let_run,
    owner,
    permitted,
)

STALE, NO_COPY, BOTH, CRASHED = "stale", "taken without a copy", "although two hosts held it", "with its host"
NO_RIGHT: Final = "run without the right"
"""How the guest's latest state was lost."""
_SAID_RUNNING: Final = answer_bit(Stands.RUNNING, same_journal=True)
_COPY_HERE: Final = (Stands.PREPARED, Stands.OWNED, Stands.RUNNING)


def _open_attempt(host: Host, world: World) -> int | None:
    return host.out.attempt if leaving(host, world.attempts) and not host.off else None


def usable(world: World) -> set[int]:
    """Hosts with a complete copy of the latest state that the protocol may still run."""
    found = set()
    opened = {_open_attempt(host, world) for host in world.hosts}
    for number, host in enumerate(world.hosts):
        spent = (
            host.update.phase is UpdatePhase.RAN and not host.adopted
        )  # the new process is all that counts
        if host.vm == ABSENT or host.held != world.latest or host.off or spent:
            continue
        mine = _open_attempt(host, world)
        returnable = mine is not None and not world.said[mine] & _SAID_RUNNING
        deliverable = host.inn.now in _COPY_HERE and host.inn.newest in opened
        updated = host.update.phase in _OLD_ONE_COUNTS or host.adopted
        if permitted(host, world.attempts) or updated or returnable or deliverable:
            found.add(number)
    found |= {number for number, host in enumerate(world.hosts) if _new_one_counts(host, world)}
    return found


_OLD_ONE_COUNTS: Final = (UpdatePhase.BEGUN, UpdatePhase.SWITCHED)


def _new_one_counts(host: Host, world: World) -> bool:
    """The new process of an update has the latest state, and may yet run it."""
    open_here = host.update.phase is not UpdatePhase.QUIET
    return host.new in {PAUSED, RUNNING} and host.new_held == world.latest and open_here and not host.off


def _running(world: World) -> int:
    return sum((host.vm == RUNNING) + (host.new == RUNNING) for host in world.hosts)


def redundant(world: World) -> bool:
    """Both ends of an open attempt hold a complete copy, nobody has run since, and nothing has failed before."""
    if world.faults > 1 or any(host.vm == RUNNING for host in world.hosts):
        return False
    for number, attempt in enumerate(world.attempts):
        here, there = world.hosts[attempt.source], world.hosts[attempt.destination]
        both = all((host.vm, host.held) == (PAUSED, world.latest) for host in (here, there))
        arrived = there.inn.newest == number and there.inn.now in _COPY_HERE
        if both and arrived and _open_attempt(here, world) == number:
            return not world.said[number] & _SAID_RUNNING
    return False


PROMISES: Final[dict[str, Callable[[World], bool]]] = {
    "I1: two guests run": lambda world: _running(world) > 1,
    "I1b: two hosts are permitted": lambda world: (
        sum(permitted(host, world.attempts) for host in world.hosts) > 1
    ),
    "I1b: two processes of one host may run": lambda world: any(
        permitted(host, world.attempts) and may_let_run(host, world.attempts) for host in world.hosts
    ),
    "I2: a stale copy was resumed": lambda world: world.lost == STALE,
    "I2: the right was taken without a copy": lambda world: world.lost == NO_COPY,
    "I6: the guest was let run where the right is not": lambda world: world.lost == NO_RIGHT,
    "I3: a step destroyed the last usable copy": lambda world: not world.lost and not usable(world),
    "I4: one fault lost what two hosts held": lambda world: world.lost == BOTH,
}
"""What must never be, by name."""


def _one_will_know(world: World) -> bool:
    """Whether a goodbye is still due, by which one of the two who took the right must stop."""
    for number, attempt in enumerate(world.attempts):
        here, there = world.hosts[attempt.source], world.hosts[attempt.destination]
        if here.closed >> number & 1 and there.inn.of(number) in TAKEN:
            stops = permitted(there, world.attempts) and here.rights.granted > there.rights.granted
            if (owner(here) and not came_back(here, world.attempts, number)) or stops:
                return True
    return False


def _wrongly_permitted(world: World) -> bool:
    rights = [host.rights.granted for host in world.hosts if permitted(host, world.attempts)]
    if not rights or _one_will_know(world):
        return False
    return rights != [max(host.rights.granted for host in world.hosts)]


PROMISES["I5: the hosts have met, and not only the latest right is permitted"] = _wrongly_permitted


def broken(world: World, promises: tuple[str, ...]) -> str:
    """The first of these promises that does not hold, if any."""
    for name, fails in PROMISES.items():
        if name.split(":")[0] in promises and fails(world):
            return name
    return ""


def at_rest(world: World) -> bool:
    """Whether one guest runs, on the one host that is permitted to run it, by the latest right."""
    owners = [host for host in world.hosts if permitted(host, world.attempts)]
    alone = len(owners) == 1 and _running(world) == 1
    return (
        alone
        and owners[0].vm == RUNNING
        and owners[0].rights.granted == max(host.rights.granted for host in world.hosts)
    )


def runs(world: World) -> bool:
    """Whether the guest runs somewhere."""
    return _running(world) > 0
