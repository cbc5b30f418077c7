"""What a host's journals, taken together, say about the right to run one machine.

Promise: ``Rights.permitted`` is true on at most one host of the world at any instant (invariant I1b), as long as
the journals are whole; a damaged journal permits nothing.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field, replace

from vmferry.handoff import destination, source, updating
from vmferry.handoff.states import Attempt, Record, RecordKind


@dataclass(frozen=True)
class Epochs:
    """The highest right to run this host was granted, and the highest it gave up."""

    granted: int = 0
    left: int = 0
    superseded: int = 0
    """The highest right that was given up because another host has a later one."""
    ended: int = 0
    """The highest that an operator ended."""

    def after(self, record: Record) -> Epochs:
        """The view after one more record, of whichever role."""
        match record.kind:
            case RecordKind.BORN | RecordKind.RECLAIMED | RecordKind.OWNED | RecordKind.FORCED:
                return replace(self, granted=max(self.granted, record.epoch))
            case RecordKind.HANDED_OFF if record.attempt is not None:
                return replace(self, left=max(self.left, record.attempt.epoch_from))
            case RecordKind.SUPERSEDED:
                superseded = max(self.superseded, record.epoch)
                return replace(self, left=max(self.left, record.epoch), superseded=superseded)
            case RecordKind.ENDED:
                return replace(self, left=max(self.left, record.epoch), ended=max(self.ended, record.epoch))
        return self

    def merged(self, other: Epochs) -> Epochs:
        """Both views together."""
        return Epochs(
            max(self.granted, other.granted),
            max(self.left, other.left),
            max(self.superseded, other.superseded),
            max(self.ended, other.ended),
        )


class Standing(enum.Enum):
    """Who may run the machine, as far as this host knows; the values are those of ``vmferry.v1.MachineRight``."""

    NEVER_SEEN = 0
    OWNED = 1
    LEAVING = 2
    HANDED_OFF = 3
    GONE = 4
    ARRIVING = 5
    UNKNOWN = 6
    SUPERSEDED = 7


@dataclass(frozen=True)
class Rights:
    """The sum of a host's journals about one machine."""

    epochs: Epochs
    outgoing: source.SourceState
    incoming: destination.DestinationState
    damaged: bool = False
    update: updating.UpdateState = field(default_factory=updating.Still)

    @property
    def owner(self) -> bool:
        """This host was granted the newest right it knows of and has not given it up."""
        return self.epochs.granted > self.epochs.left

    @property
    def moved_on(self) -> bool:
        """What was handed off here is settled: a host with a later right has begun to send the machine back."""
        now = self.incoming.current
        return (
            isinstance(self.outgoing, source.HandedOff)
            and not isinstance(now, destination.Empty)
            and source.proves_owner(self.outgoing, now.attempt)
        )

    @property
    def leaving(self) -> bool:
        """An attempt is open that takes the machine away."""
        return not isinstance(self.outgoing, source.Quiet) and not self.moved_on

    @property
    def being_updated(self) -> bool:
        """An update in place is open: two hypervisor processes of this host may have the guest."""
        return not isinstance(self.update, updating.Still)

    @property
    def permitted(self) -> bool:
        """This host may let the guest run: owner, nothing open, nothing doubtful."""
        return self.owner and not self.leaving and not self.being_updated and not self.damaged

    @property
    def may_let_run(self) -> bool:
        """The new process of an open update, and it alone, may run the guest."""
        new_one = isinstance(self.update, updating.Ran)
        return self.owner and not self.leaving and new_one and not self.damaged

    @property
    def runs_on(self) -> bool:
        """The guest runs here and is being copied: an attempt is open, and nothing of it is sealed."""
        return self.owner and not self.damaged and isinstance(self.outgoing, source.Begun)

    @property
    def holds(self) -> bool:
        """This host must not accept the machine from elsewhere; :meth:`admits` knows the one exception."""
        return self.damaged or self.owner or self.leaving

    def admits(self, attempt: Attempt) -> bool:
        """Whether the machine may come here by ``attempt``: this host neither has it nor has it on its way out.

        A machine that was handed off, and of which nothing was heard since, may come back by a later right: nobody
        could have that if the hand-off had not been completed.
        """
        return not self.holds or self.proved_gone_by(attempt)

    def proved_gone_by(self, attempt: Attempt) -> bool:
        """Whether ``attempt`` shows that what was handed off here has run elsewhere since."""
        return (
            self.awaits_word
            and isinstance(self.outgoing, source.HandedOff)
            and source.proves_owner(self.outgoing, attempt)
        )

    @property
    def awaits_word(self) -> bool:
        """Handed off, and nothing was heard since: the machine may come back before that is settled."""
        return not self.damaged and not self.owner and isinstance(self.outgoing, source.HandedOff)

    @property
    def arriving(self) -> bool:
        """An attempt is open that brings the machine here."""
        return isinstance(self.incoming.current, (destination.Receiving, destination.Prepared))

    def came_back_after(self, closed: Attempt) -> bool:
        """Whether this host has its right by one later than the destination of ``closed`` can have taken."""
        now = self.incoming.current
        return isinstance(now, destination.Owned) and now.attempt.epoch_from >= closed.epoch_to

    @property
    def superseded(self) -> bool:
        """Another host has a later right, by an operator's word; what is left here waits for one to end it."""
        return not self.owner and self.epochs.superseded > max(self.epochs.ended, self.epochs.granted - 1)

    @property
    def unheard_of(self) -> bool:
        """No journal here speaks of the machine."""
        nothing = source.Quiet() == self.outgoing and destination.DestinationState() == self.incoming
        return nothing and not self.epoch and not self.damaged

    @property
    def epoch(self) -> int:
        """The newest right to run that this host knows of."""
        return max(self.epochs.granted, self.epochs.left)

    @property
    def standing(self) -> Standing:
        """One word for schedulers and operators."""
        if self.damaged:
            return Standing.UNKNOWN
        match self.outgoing:
            case source.HandedOff() if self.leaving:
                return Standing.HANDED_OFF
            case source.Begun() | source.Sealed():
                return Standing.LEAVING
        if self.owner:
            return Standing.OWNED
        if self.arriving:
            return Standing.ARRIVING
        if self.superseded:
            return Standing.SUPERSEDED
        return Standing.GONE if self.epoch else Standing.NEVER_SEEN
