"""Whether a machine is blocked: why nobody may run it, or why nobody does, and what to type.

Promise: a machine whose guest runs, or whose open attempt goes its ordinary way, is never called blocked; one that
waits for another host, for a person or for a hypervisor always is, with the same reason on every release. Nothing
here decides anything: who may run the guest is ``rights``.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final

from vmferry.handoff import destination, source
from vmferry.handoff.rights import Rights
from vmferry.handoff.states import AttemptState

FRESH_S: Final = 2.0
"""A doubt that is younger is the ordinary course of a migration, or of its end."""


class Guest(enum.Enum):
    """What this host's hypervisor says of its copy of the guest."""

    RUNNING = "running"
    PAUSED = "paused"
    WAITING = "waiting"
    """It has no complete state yet."""
    ENDED = "ended"
    """The guest shut down or crashed; the process is there."""
    SILENT = "silent"
    """The process is there and does not answer."""
    ABSENT = "absent"
    """There is no process."""


class Side(enum.Enum):
    """Which of a host's services is concerned."""

    SOURCE = "source"
    DESTINATION = "destination"


class Reason(enum.StrEnum):
    """Why a machine is blocked; stable."""

    JOURNAL_DAMAGED = "JOURNAL_DAMAGED"
    OUTCOME_UNKNOWN = "OUTCOME_UNKNOWN"
    PEER_LOST_JOURNAL = "PEER_LOST_JOURNAL"
    PEER_NOT_RESUMED = "PEER_NOT_RESUMED"
    MEMORY_GONE = "MEMORY_GONE"
    JOURNAL_TORN = "JOURNAL_TORN"
    SERVICE_NEEDED = "SERVICE_NEEDED"
    AWAITS_SOURCE = "AWAITS_SOURCE"
    COPY_GONE = "COPY_GONE"
    NOT_RESUMED = "NOT_RESUMED"
    LOST_WITH_PROCESS = "LOST_WITH_PROCESS"
    SUPERSEDED = "SUPERSEDED"

    @property
    def is_known(self) -> bool:
        """Whose the machine is, is known: only its hypervisor is in the way, or a copy too many."""
        return self in {Reason.NOT_RESUMED, Reason.SUPERSEDED}


@dataclass(frozen=True)
class Word:
    """The newest word from the other host about the open attempt, if there was any."""

    state: AttemptState | None = None
    lost_journal: bool = False
    """Its journal is not the one that the attempt was begun with."""


@dataclass(frozen=True)
class Facts:
    """What a host knows of a machine."""

    machine: str
    """How an operator calls it."""
    rights: Rights
    guest: Guest
    torn: frozenset[Side] = frozenset()
    """Journals whose end is torn."""
    forced: bool = False
    """An operator gave the destination's half the right to run."""
    word: Word = Word()
    served: bool = True
    """A service says this; without one, the journals were read while it may be down."""


@dataclass(frozen=True)
class Doubt:
    """Why a machine is blocked, if it stays so."""

    reason: Reason
    side: Side
    """Whose journal tells since when."""
    message: str
    remedy: str

    def lasts(self, since_s: float | None, now_s: float) -> bool:
        """Whether it has stood for longer than a migration's ordinary course, by one host's clock.

        A clock that was set back is no reason to hide anything.
        """
        return since_s is None or not 0 <= now_s - since_s < FRESH_S


def doubt(facts: Facts) -> Doubt | None:
    """Why nobody may run the machine, or nobody does; ``None`` if all is well, or settles itself in a moment."""
    rights = facts.rights
    if rights.damaged:
        return Doubt(
            Reason.JOURNAL_DAMAGED,
            Side.SOURCE,
            "a journal of this host cannot be believed; nothing is resumed here",
            f"Keep the files, and read the other host's right: vmferry recover {facts.machine} --peer HOST:PORT. "
            "If that says owned, the machine is there.",
        )
    if rights.superseded:
        return Doubt(
            Reason.SUPERSEDED,
            Side.SOURCE,
            "another host runs the machine by a later right, after an operator's word that was wrong; "
            "this copy was stopped and is kept",
            f"See what it did meanwhile, then, on this host: vmferry machine stop {facts.machine} --config FILE.",
        )
    if rights.leaving:
        match rights.outgoing:
            case source.HandedOff():
                return _handed_off(facts)
            case source.Begun() | source.Sealed():
                return _leaving(facts)
    match rights.incoming.current:
        case destination.Prepared():
            return _prepared(facts)
        case destination.Owned(attempt=attempt, ran=False) if attempt.epoch_to == rights.epochs.granted:
            return _owned(facts) if rights.permitted else None
    return _not_resumed(facts, Side.SOURCE) if rights.permitted and facts.guest is Guest.PAUSED else None


def _handed_off(facts: Facts) -> Doubt:
    again = f"vmferry recover {facts.machine}"
    if facts.word.lost_journal or facts.word.state is AttemptState.UNSEEN:
        return Doubt(
            Reason.PEER_LOST_JOURNAL,
            Side.SOURCE,
            "the destination's journal is not the one that said ready; both copies stay paused",
            "Keep both hosts as they are. Put the journals of the destination back if they are somewhere; "
            f"otherwise a person must decide: {again} shows the choices.",
        )
    if facts.word.state is AttemptState.OWNED:
        return Doubt(
            Reason.PEER_NOT_RESUMED,
            Side.SOURCE,
            "the destination has the right to run and its hypervisor does not resume the guest",
            f"On the destination: read the machine's log file, remove what hinders it, then {again}.",
        )
    return Doubt(
        Reason.OUTCOME_UNKNOWN,
        Side.SOURCE,
        "the right to run was given up, and the destination has not said what became of it: "
        "the guest is not run here and may run there",
        f"Bring the other host and the network up, then {again}. Do not start the machine by hand.",
    )


def _leaving(facts: Facts) -> Doubt | None:
    again = f"vmferry recover {facts.machine}"
    up = f"Bring the destination's service and the network up, then {again}."
    if facts.guest in {Guest.ABSENT, Guest.WAITING, Guest.SILENT}:
        what = "its hypervisor does not answer" if facts.guest is Guest.SILENT else "its memory is gone here"
        return Doubt(
            Reason.MEMORY_GONE,
            Side.SOURCE,
            f"the machine was leaving and {what}; the destination may hold the only copy",
            f"{up} Do not cancel, do not stop either copy.",
        )
    if Side.SOURCE in facts.torn:
        return Doubt(
            Reason.JOURNAL_TORN,
            Side.SOURCE,
            "the journal's end is torn, a hand-off may have been written: the destination is asked first",
            up,
        )
    if not facts.served and facts.guest is Guest.PAUSED:
        return Doubt(
            Reason.SERVICE_NEEDED,
            Side.SOURCE,
            "the guest is paused by an attempt that was open when its source service ended, if that does not run",
            "Start the source service of this host: it gives the guest back.",
        )
    return None


def _prepared(facts: Facts) -> Doubt:
    if facts.guest in {Guest.PAUSED, Guest.RUNNING}:
        return Doubt(
            Reason.AWAITS_SOURCE,
            Side.DESTINATION,
            "a complete copy waits here for its source's word; no timer drops it",
            "Look at the source: bring its service and the network up, then, for the source, "
            f"vmferry recover {facts.machine}.",
        )
    if Side.DESTINATION in facts.torn:
        return Doubt(
            Reason.JOURNAL_TORN,
            Side.DESTINATION,
            "the prepared copy is gone and the journal's end is torn: this host may have owned the machine",
            f"A person must decide: vmferry recover {facts.machine} shows the choices. Keep both hosts as they are.",
        )
    return Doubt(
        Reason.COPY_GONE,
        Side.DESTINATION,
        "the prepared copy is gone, and its source has not been told",
        f"vmferry recover {facts.machine}, then the same for the source: the guest goes on there.",
    )


def _owned(facts: Facts) -> Doubt | None:
    match facts.guest:
        case Guest.RUNNING | Guest.ENDED:
            return None
        case Guest.ABSENT if facts.forced:
            return None  # given up by the operator who forced it; it is to be started anew
        case Guest.ABSENT:
            return Doubt(
                Reason.LOST_WITH_PROCESS,
                Side.DESTINATION,
                "the machine belongs to this host and was lost with its process before it was seen to run",
                "Nothing resumes it by itself; keep both hosts as they are until you have decided: "
                f"vmferry recover {facts.machine} shows the choices.",
            )
    return _not_resumed(facts, Side.DESTINATION)


def _not_resumed(facts: Facts, side: Side) -> Doubt:
    return Doubt(
        Reason.NOT_RESUMED,
        side,
        "the machine belongs to this host and its guest is not resumed yet",
        "Read the machine's log file and remove what hinders it, as a rule a disk that is locked elsewhere; "
        f"then vmferry recover {facts.machine}.",
    )
