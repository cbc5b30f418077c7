"""The hand-off protocol: what its messages, records and states are.

The right to run a machine is a token that four durable facts move (``*`` = on disk before anything follows)::

  source_svc                                        dest_svc
  BEGUN*  ------ Begin(ticket, machine) ----------> take memory, start an empty paused copy
          <----- accepted (its incarnation) ------- ACCEPTED*
  pre-copy rounds, the guest runs
  pause the guest; SEALED; last pages, device state
          ------ Seal(digest) --------------------> verify own memory, load device state; PREPARED
          <----- ready ----------------------------
  HANDED_OFF*   (nobody may resume here any more)
          ------ Go(attempt, digest) -------------> OWNED*   (the commit point)
                                                    resume the guest; RAN
          <----- running --------------------------
  DONE*; free the memory

Source::

  Quiet --BEGUN--> Begun --SEALED--> Sealed --HANDED_OFF--> HandedOff --DONE--> Quiet (the machine is gone)
    ^                |                  |                       |
    +---ABORTED------+------ABORTED-----+                       +--RECLAIMED--> Quiet (the machine is here)
    alone with the guest's memory; without it          only when the journal that said ready says REFUSED
    only when the destination says REFUSED

Destination::

  Empty --ACCEPTED--> Receiving --PREPARED--> Prepared --OWNED--> Owned --RAN--> Owned(ran)
    |                    |                       |
    +------REFUSED-------+--------REFUSED--------+--> Refused: closed for ever, the tombstone stays

  Refused is followed by a newer attempt, Owned by an attempt of a later right to run.

Two ways out of waiting need more than these two hosts. An operator who has seen to it that the other copy cannot
run writes FORCED: at the source it closes the open attempt and grants a right later than the destination's, at the
destination it takes the place of OWNED. If the other copy runs nevertheless, the source's word about the closed
attempt is how the two hear of each other: the one with the earlier right writes SUPERSEDED and stops. And whoever has
a later right than the one that was handed off proves, by beginning to send the machine here, that the hand-off was
completed (``Rights.moved_on``).

Promises of the protocol, asserted here and checked by the tests:

* at most one host is *permitted* to run a machine (see ``rights``), and a guest is resumed with a permit only;
* an error of transport after HANDED_OFF means *unknown*: neither timer nor error resumes, drops or reclaims then;
* a source that lost the guest's memory never aborts alone: the destination may hold the only copy;
* answers are derived from the journal, so every message may be lost, repeated, reordered or late.

A state changes in one way only: a record is appended to the journal and folded in by ``evolve``; ``decide``
turns an event into the actions to do, in order. Both are pure, in ``source`` and ``destination``.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from vmferry.errors import InternalError


class RecordKind(enum.Enum):
    """What a journal record states; the values are those of ``vmferry.v1.RecordKind``."""

    BORN = 1
    ENDED = 2
    BEGUN = 3
    SEALED = 4
    HANDED_OFF = 5
    DONE = 6
    ABORTED = 7
    RECLAIMED = 8
    ACCEPTED = 9
    PREPARED = 10
    OWNED = 11
    RAN = 12
    REFUSED = 13
    FORCED = 14
    SUPERSEDED = 15
    UPDATE_BEGUN = 16
    UPDATE_SWITCHED = 17
    UPDATE_RAN = 18
    UPDATE_DONE = 19
    UPDATE_UNDONE = 20


@dataclass(frozen=True)
class Update:
    """One update of one machine in place: another hypervisor process on this host takes it over."""

    machine_id: str
    update_id: bytes
    number: int
    """Strictly increasing over all updates of a machine on one host."""


@dataclass(frozen=True)
class Attempt:
    """One attempt to move one machine; everything that is not of the open attempt is never acted on."""

    machine_id: str
    migration_id: bytes
    number: int
    epoch_from: int
    source: str
    destination: str
    source_incarnation: str
    destination_incarnation: str = ""
    destination_address: str = field(default="", compare=False)
    """Where the source reaches the destination; kept so that a restarted source can ask."""

    @property
    def epoch_to(self) -> int:
        """The number of the right to run once the destination has it."""
        return self.epoch_from + 1

    @property
    def order(self) -> tuple[int, int]:
        """Attempts of one machine are ordered by this over all its owners."""
        return self.epoch_from, self.number

    def matches(self, other: Attempt) -> bool:
        """Whether ``other`` is this attempt, as told by somebody who may not know our incarnation yet."""
        known = (self.destination_incarnation, other.destination_incarnation)
        return (
            self.machine_id == other.machine_id
            and self.migration_id == other.migration_id
            and self.order == other.order
            and self.source == other.source
            and self.destination == other.destination
            and self.source_incarnation == other.source_incarnation
            and ("" in known or known[0] == known[1])
        )


@dataclass(frozen=True)
class Record:
    """One entry of a journal."""

    kind: RecordKind
    machine_id: str
    attempt: Attempt | None = None
    digest: bytes = b""
    epoch: int = 0
    ticket_nonce: bytes = b""
    ticket_expire_unix: int = 0
    note: str = ""
    operator: str = ""
    """Who decided, for FORCED; ``note`` is then what shows that the other copy cannot run."""
    with_memory: bool = False
    """For FORCED: the guest was to go on from the memory at hand."""
    update: Update | None = None
    """In a journal of updates: which one it is about."""


class AttemptState(enum.Enum):
    """How an attempt stands at the destination; the values are those of ``vmferry.v1.AttemptState``."""

    UNSEEN = 1
    RECEIVING = 2
    PREPARED = 3
    OWNED = 4
    RUNNING = 5
    REFUSED = 6
    SUPERSEDED = 7


class InvalidTransitionError(InternalError):
    """A record or an event does not fit the state; in a journal it means that the journal is damaged."""


@dataclass(frozen=True)
class Append:
    """Write ``record``; when ``durable``, nothing that follows may happen before it is on disk."""

    record: Record
    durable: bool = True


@dataclass(frozen=True)
class Resume:
    """Let the guest run here, with a permit; a guest that runs already is left alone."""


@dataclass(frozen=True)
class Release:
    """Free what the attempt held here: hypervisor, memory, definition; never a copy that arrived since."""


@dataclass(frozen=True)
class Halt:
    """Pause the guest for good, and raise an alarm: another host has a later right. An operator ends what is left."""


@dataclass(frozen=True)
class Tell:
    """Call the destination, by name of the method: ``Go``, ``Abort`` or ``GetAttempt``."""

    method: str


@dataclass(frozen=True)
class Answer:
    """How the attempt stands, to whoever asked."""

    state: AttemptState
    refusal: str = ""
    digest: bytes = b""
    """Of the copy, from PREPARED on."""


@dataclass(frozen=True)
class Wait:
    """Nothing may be done without hearing from the other side; ``why`` is shown to the operator."""

    why: str


Action = Append | Resume | Release | Halt | Tell | Answer | Wait
