"""What an operator may choose about a machine, what each choice risks, and what to type.

Promise: a choice is called possible only if the pure core would accept it as things are; what would be refused says
why. Nothing here decides or does anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from vmferry.handoff import destination, source
from vmferry.handoff.blocked import Doubt, Facts, Guest, Reason, Side
from vmferry.handoff.rights import Rights
from vmferry.handoff.states import Attempt

CONFIRMATION: Final = "I confirm the other copy is powered off"
"""What an operator says who has no evidence, word for word."""
_OR_CONFIRM: Final = f'. ID names what shows it; without one: --confirm "{CONFIRMATION}"'
"""Behind a risk, for the two commands that take an operator's word."""
_MEMORY_HERE: Final = {Guest.RUNNING, Guest.PAUSED}


@dataclass(frozen=True)
class Choice:
    """Something that an operator may do."""

    name: str
    risk: str
    """What it does, and what may go wrong by it."""
    command: str
    why_not: str = ""
    """Why it would be refused as things are; empty if it would not."""

    @property
    def possible(self) -> bool:
        """Whether it would be accepted."""
        return not self.why_not


def open_attempt(rights: Rights) -> tuple[Side, str, Attempt] | None:
    """The attempt that waits for something here: whose it is, how it stands, and which."""
    if rights.damaged:
        return None
    if rights.leaving and not isinstance(rights.outgoing, source.Quiet):
        state = {source.Begun: "begun", source.Sealed: "sealed", source.HandedOff: "handed-off"}
        return Side.SOURCE, state[type(rights.outgoing)], rights.outgoing.attempt
    match rights.incoming.current:
        case destination.Receiving(attempt=attempt):
            return Side.DESTINATION, "receiving", attempt
        case destination.Prepared(attempt=attempt):
            return Side.DESTINATION, "prepared", attempt
        case destination.Owned(attempt=attempt, ran=False) if (
            attempt.epoch_to == rights.epochs.granted and rights.permitted
        ):
            return Side.DESTINATION, "owned", attempt
    return None


def choices(facts: Facts, found: Doubt | None, *, stoppable: bool) -> tuple[Choice, ...]:
    """All that an operator may think of, in the order in which to think of it.

    Args:
        facts: what is known.
        found: what blocks the machine, if anything does.
        stoppable: the machine has an entry here that ``vmferry machine stop`` can find.
    """
    now = open_attempt(facts.rights)
    return (
        _wait(facts, found, now),
        _repair(facts, found),
        _recover(facts, found, now),
        _cancel(facts, now),
        _force_reclaim(facts),
        _force_accept(facts),
        _end(facts, stoppable=stoppable),
    )


def _wait(facts: Facts, found: Doubt | None, now: tuple[Side, str, Attempt] | None) -> Choice:
    leaving = now is not None and now[0] is Side.SOURCE
    command = (
        f"vmferry watch {now[2].migration_id.hex()}"
        if now and leaving
        else f"vmferry recover {facts.machine} --show"
    )
    for_a_person = {
        Reason.JOURNAL_DAMAGED,
        Reason.PEER_LOST_JOURNAL,
        Reason.LOST_WITH_PROCESS,
        Reason.SUPERSEDED,
    }
    risk = "loses nothing; until it settles itself, nobody runs what is blocked"
    if found is not None and found.reason in for_a_person:
        risk = "loses nothing, and settles nothing either: this needs a person"
    return Choice("wait", risk, command, "" if found or now else "nothing is open")


def _repair(facts: Facts, found: Doubt | None) -> Choice:
    hears = {
        Reason.OUTCOME_UNKNOWN,
        Reason.MEMORY_GONE,
        Reason.JOURNAL_TORN,
        Reason.AWAITS_SOURCE,
        Reason.PEER_NOT_RESUMED,
    }
    why_not = "" if found and found.reason in hears else "no word of the other host would settle it"
    return Choice(
        "repair-network",
        "none: start the other host's services, mend the link; the hosts then agree by themselves",
        f"vmferry recover {facts.machine}",
        why_not if found else "nothing is blocked",
    )


def _recover(facts: Facts, found: Doubt | None, now: tuple[Side, str, Attempt] | None) -> Choice:
    return Choice(
        "recover",
        "none: does at once what the services would try next by themselves",
        f"vmferry recover {facts.machine}",
        "" if found or now else "nothing is open",
    )


def _cancel(facts: Facts, now: tuple[Side, str, Attempt] | None) -> Choice:
    why_not = ""
    if now is None or now[0] is not Side.SOURCE:
        why_not = "nothing is leaving this host"
    elif now[1] == "handed-off":
        why_not = "the right to run was given up; only the destination's word can bring it back"
    elif facts.guest not in _MEMORY_HERE:
        why_not = "the guest's memory is not here for certain; the destination may hold the only copy"
    elif Side.SOURCE in facts.torn:
        why_not = "the journal's end is torn; the destination is asked first"
    name = now[2].migration_id.hex() if now else "MIGRATION"
    return Choice(
        "cancel", "none: the guest goes on here, the other copy is dropped", f"vmferry cancel {name}", why_not
    )


def _force_reclaim(facts: Facts) -> Choice:
    rights, memory = facts.rights, facts.guest in _MEMORY_HERE
    why_not = ""
    if rights.damaged:
        why_not = "a journal of this host cannot be believed"
    elif isinstance(rights.outgoing, source.Quiet):
        why_not = "no attempt is open that could be taken back"
    elif rights.moved_on:
        why_not = "the guest has run elsewhere since; what is here is an older copy"
    elif facts.guest is Guest.SILENT:
        why_not = "the hypervisor does not answer; end it first"
    risk = (
        "takes the machine back by your word. If the other copy runs, or ever runs again, two guests write to the "
        "same disks: power that host off, or cut it from disks and network, first"
    )
    if memory:
        risk += (
            ". Without --with-memory the copy here is ended and the machine is to be started anew; with it the guest "
            "goes on, which is right only if it cannot have run there: its memory would be older than the disks"
        )
    elif not why_not:
        risk += ". The guest's memory is not here: it has to be started anew"
    with_memory = " [--with-memory]" if memory else ""
    return Choice(
        "force-reclaim",
        risk + _OR_CONFIRM,
        f"vmferry handoff force-reclaim {facts.machine} --evidence ID{with_memory}",
        why_not,
    )


def _force_accept(facts: Facts) -> Choice:
    now = facts.rights.incoming.current
    why_not = ""
    if facts.rights.damaged:
        why_not = "a journal of this host cannot be believed"
    elif facts.rights.leaving:
        why_not = "the machine is on its way out of this host"
    elif not isinstance(now, (destination.Prepared, destination.Refused)):
        why_not = "no attempt stands here that could be accepted"
    elif facts.rights.owner:
        why_not = "this host owns the machine"
    with_memory = isinstance(now, destination.Prepared) and facts.guest in _MEMORY_HERE
    risk = (
        "gives this host the machine by your word. If the source's copy runs, or ever runs again, two guests write "
        "to the same disks: power that host off, or cut it from disks and network, first"
    )
    if with_memory:
        risk += ". With --with-memory the copy goes on: it is older than the disks if the source has gone on since"
    elif isinstance(now, destination.Refused):
        risk += (
            ". This host has refused the attempt, so the source was free to go on; it has to be started anew"
        )
    return Choice(
        "force-accept",
        risk + _OR_CONFIRM,
        f"vmferry handoff force-accept {facts.machine} --evidence ID{' [--with-memory]' if with_memory else ''}",
        why_not,
    )


def _end(facts: Facts, *, stoppable: bool) -> Choice:
    rights = facts.rights
    why_not = ""
    if rights.damaged:
        why_not = "a journal of this host cannot be believed"
    elif rights.leaving:
        why_not = "it is being migrated away"
    elif not rights.owner and not rights.superseded:
        why_not = "it does not belong to this host"
    elif not stoppable:
        why_not = "nothing of it is left here that could be ended"
    return Choice(
        "end",
        "ends the machine for good: its memory is lost, and nobody may run it any more",
        f"vmferry machine stop {facts.machine} --config FILE",
        why_not,
    )
