"""What the model consists of: attempts, hosts, and the messages that may still arrive.

A journal is not kept as a list. Of the source's journal the model knows the open attempt, of the destination's how
each attempt stands, and of both which rights they grant or give up, whether their last record may be in the page
cache only, and whether their end is torn.
"""

from __future__ import annotations

import enum
from typing import Final, NamedTuple

ABSENT, PAUSED, RUNNING, STARTED = range(4)
"""What a host's hypervisor has of the guest; ``STARTED`` is one beside it that has not loaded anything yet."""

NAMES: Final = "abc"
NOBODY: Final = -1


class Stands(enum.IntEnum):
    """How an attempt stands at its destination; also what the destination answers about it."""

    UNSEEN = 0
    RECEIVING = 1
    PREPARED = 2
    OWNED = 3
    RUNNING = 4
    REFUSED = 5
    SUPERSEDED = 6


OPEN_HERE: Final = (Stands.RECEIVING, Stands.PREPARED)
TAKEN: Final = (Stands.OWNED, Stands.RUNNING)
SPENT: Final = (*TAKEN, Stands.SUPERSEDED)
"""The right was taken here: no attempt can hand it over again."""


class Phase(enum.IntEnum):
    """How far a source is with its open attempt."""

    QUIET = 0
    BEGUN = 1
    SEALED = 2
    HANDED_OFF = 3


class UpdatePhase(enum.IntEnum):
    """How far a host is with its open update in place."""

    QUIET = 0
    BEGUN = 1
    SWITCHED = 2
    RAN = 3


class Said(enum.IntFlag):
    """A message about one attempt that was sent once, and so may arrive at any time, again or never."""

    BEGIN = 1
    SEAL = 2
    GO = 4
    ABORT = 8


def answer_bit(answer: Stands, *, same_journal: bool) -> int:
    """The answer of a destination, from the journal that the attempt was begun with or from a later one."""
    return 1 << (4 + 2 * answer + (not same_journal))


class Attempt(NamedTuple):
    """One attempt to move the machine."""

    source: int
    destination: int
    epoch: int
    """Number of the right to run before it moves; the destination would get the next one."""
    number: int
    journal: int
    """Which of the destination's journals it was begun with."""

    @property
    def order(self) -> tuple[int, int]:
        """Attempts of all owners are ordered by this."""
        return self.epoch, self.number


class Out(NamedTuple):
    """The source's journal: the open attempt, and the highest number it ever used."""

    phase: Phase = Phase.QUIET
    attempt: int = NOBODY
    used: int = 0


class In(NamedTuple):
    """The destination's journal: how each attempt stands, and which of them is the newest that was begun here."""

    stands: tuple[Stands, ...] = ()
    newest: int = NOBODY

    def of(self, attempt: int) -> Stands:
        """How an attempt stands."""
        return self.stands[attempt] if 0 <= attempt < len(self.stands) else Stands.UNSEEN

    @property
    def now(self) -> Stands:
        """How the newest attempt stands."""
        return self.of(self.newest)


class Update(NamedTuple):
    """The journal of updates: how far the open one is, and the highest number that was ever used."""

    phase: UpdatePhase = UpdatePhase.QUIET
    used: int = 0


class Rights(NamedTuple):
    """The highest right to run that the host's journals grant, by who wrote it, and the highest they give up."""

    by_source: int = 0
    """BORN, RECLAIMED, and what was forced at the source."""
    by_destination: int = 0
    left: int = 0
    """HANDED_OFF, and SUPERSEDED."""

    @property
    def granted(self) -> int:
        """The highest of all."""
        return max(self.by_source, self.by_destination)


class Host(NamedTuple):
    """One host."""

    vm: int = ABSENT
    held: int = 0
    """Number of the executed state that the guest here is in."""
    out: Out = Out()
    inn: In = In()
    rights: Rights = Rights()
    lazy: tuple[bool, bool] = (False, False)
    """Whether the last record of each journal may be lost in a crash."""
    torn: tuple[bool, bool] = (False, False)
    """Whether the end of each journal cannot be read."""
    before: tuple[tuple[Out, In, Rights] | None, tuple[Out, In, Rights] | None] = (None, None)
    """What was said before the last record of each journal; kept where that record may be lost."""
    fresh: bool = False
    """The source process that began the open attempt still lives."""
    taking: bool = False
    """The destination process that accepted the newest attempt still lives."""
    journal: int = 0
    """How many journals this host has lost."""
    off: bool = False
    """An operator has cut its power, and it stays off."""
    closed: int = 0
    """A bit per attempt that this host closed as its source: its destination is told so, as often as it takes."""
    update: Update = Update()
    new: int = ABSENT
    """What the new process of an update has of the guest: ``STARTED``, or like ``vm``."""
    new_held: int = 0
    adopted: bool = False
    """The new process has taken the place of the old one, which has ended; that is yet to be recorded."""
    updating: bool = False
    """The source process that began the open update still lives."""


class World(NamedTuple):
    """Everything."""

    latest: int = 0
    """Number of the latest executed state; grows whenever virtual CPUs start."""
    lost: str = ""
    """How the latest state was lost, if it was."""
    faults: int = 0
    hosts: tuple[Host, ...] = ()
    attempts: tuple[Attempt, ...] = ()
    sealed: tuple[int, ...] = ()
    """Per attempt, the number of the state that was sealed."""
    said: tuple[int, ...] = ()
    """Per attempt, what was ever said about it."""


# What a host's journals say together


def moved_on(host: Host, attempts: tuple[Attempt, ...]) -> bool:
    """A host with a later right has begun to send back what was handed off here."""
    return (
        host.out.phase is Phase.HANDED_OFF
        and host.inn.newest != NOBODY
        and attempts[host.inn.newest].epoch > attempts[host.out.attempt].epoch
    )


def leaving(host: Host, attempts: tuple[Attempt, ...]) -> bool:
    """An attempt is open that takes the machine away."""
    return host.out.phase is not Phase.QUIET and not moved_on(host, attempts)


def owner(host: Host) -> bool:
    """The newest right that the host knows of is its own."""
    return host.rights.granted > host.rights.left


def came_back(host: Host, attempts: tuple[Attempt, ...], closed: int) -> bool:
    """Whether the host has its right by one that is later than what the destination of a closed attempt took."""
    by = host.inn.newest
    return host.inn.now in TAKEN and attempts[by].epoch > attempts[closed].epoch


def permitted(host: Host, attempts: tuple[Attempt, ...]) -> bool:
    """The host may let the guest run, in the one process that it has for it."""
    free = host.update.phase is UpdatePhase.QUIET and not host.off
    return owner(host) and not leaving(host, attempts) and free


def may_let_run(host: Host, attempts: tuple[Attempt, ...]) -> bool:
    """The new process of an update, and it alone, may run the guest."""
    return owner(host) and not leaving(host, attempts) and host.update.phase is UpdatePhase.RAN


def holds(host: Host, attempts: tuple[Attempt, ...]) -> bool:
    """The host lets the machine in from nowhere, but by a right later than the one it handed off."""
    return owner(host) or leaving(host, attempts)


def proved_gone_by(host: Host, attempts: tuple[Attempt, ...], attempt: int) -> bool:
    """The attempt shows that what was handed off here has run elsewhere since."""
    return (
        host.out.phase is Phase.HANDED_OFF
        and not owner(host)
        and attempts[attempt].epoch > attempts[host.out.attempt].epoch
    )


def leftover(host: Host) -> bool:
    """A guest is here that does not belong to an attempt that is arriving."""
    return host.vm != ABSENT and host.inn.now not in OPEN_HERE
