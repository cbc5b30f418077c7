"""An operator's word at the source: the destination is lost for ever, and the machine is taken back here.

Promise: a destination that answers is believed, never the operator; the machine's one writer does what is decided,
and nothing is decided about another migration than the one that was named. The same word twice has the same answer.
"""

from __future__ import annotations

import asyncio
from typing import Final

from source_svc.departure import Departure
from source_svc.peer import Destination
from vmferry.errors import (
    JournalDamagedError,
    MachineNotFoundError,
    PeerIdentityError,
    PeerUnreachableError,
    StaleAttemptError,
    TimedOutError,
    WrongPhaseError,
)
from vmferry.handoff import source
from vmferry.handoff.ledger import HostLedger, Role
from vmferry.handoff.states import Attempt
from vmferry.machines.directory import MachineDirectory
from vmferry.security.override import Word, repeated
from vmferry.v1 import machine_pb2
from vmferry.v1 import override_pb2 as pb

_NO_WORD: Final = (
    PeerUnreachableError,
    TimedOutError,
    PeerIdentityError,
    JournalDamagedError,
    WrongPhaseError,
)
"""Nobody answers, or somebody who cannot say what only the journal that the attempt was begun with knows."""


class Reclaiming:
    """What operators may decide at one source service."""

    def __init__(self, ledger: HostLedger, directory: MachineDirectory) -> None:
        self._ledger = ledger
        self._directory = directory

    def find(self, name_or_uuid: str) -> tuple[str, str]:
        """Name and identity of a machine that is here, or of which the journals here speak.

        Raises:
            MachineNotFoundError: there is none.
        """
        try:
            spec = self._directory.find(name_or_uuid).spec
        except MachineNotFoundError:
            # What is known of machines by name does not outlive a reboot; the journals do.
            if name_or_uuid in self._ledger.machines(Role.SOURCE):
                return name_or_uuid, name_or_uuid
            raise
        return spec.name, spec.uuid

    async def decide(self, word: Word, departure: Departure | None) -> pb.OverrideReport:
        """Do what an operator decided about a machine, or say what would be done.

        Raises:
            WrongPhaseError: there is nothing to decide, it was decided otherwise, or the destination answers.
            StaleAttemptError: what is open is not what was named.
        """
        name, machine_id = self.find(word.machine)
        state = source.Quiet() if departure is None else departure.state
        if departure is None or isinstance(state, source.Quiet):
            return await self._decided(word, name, machine_id)
        if not word.is_about(state.attempt.migration_id):
            raise StaleAttemptError(
                f"migration {state.attempt.migration_id.hex()} is open, which is not the one that was named",
                field="override.migration_id",
                remedy="Look again (vmferry handoff force-reclaim --dry-run), and decide about what is open.",
            )
        if departure.waits_for is None:
            raise WrongPhaseError(
                f"nothing of {name} was given up; its migration needs no operator",
                remedy="Cancel it (vmferry cancel) if it shall not go on.",
            )
        await _check_silent(departure.waits_for, state.attempt)
        report = await self._report(word, name, departure, state)
        if not word.only_asked:
            await departure.force(_event(word, memory_intact=word.with_memory, moved_on=False))
            report.done = True
            report.right = machine_pb2.MACHINE_RIGHT_OWNED
        return report

    async def _decided(self, word: Word, name: str, machine_id: str) -> pb.OverrideReport:
        """The answer to a word that was given before."""
        rights = await asyncio.to_thread(self._ledger.rights, machine_id)
        if rights.damaged:
            raise JournalDamagedError(f"the journal of machine {machine_id} is damaged", machine=machine_id)
        for record in reversed(self._ledger.forced(machine_id, Role.SOURCE)):
            if record.attempt is not None and word.is_about(record.attempt.migration_id):
                return repeated(word, record, name, rights.standing)
        raise WrongPhaseError(
            f"nothing is open that could be taken back: {name} is {rights.standing.name.lower()} here",
            remedy="Ask for the current state (vmferry list --machines); nothing was changed.",
        )

    async def _report(
        self,
        word: Word,
        name: str,
        departure: Departure,
        state: source.Begun | source.Sealed | source.HandedOff,
    ) -> pb.OverrideReport:
        attempt, usable = state.attempt, await departure.memory_intact()
        rights = await asyncio.to_thread(self._ledger.rights, attempt.machine_id)
        # Says already now why it would be refused. Without memory, what is here will have been ended by then.
        source.decide(
            state, _event(word, memory_intact=usable and word.with_memory, moved_on=rights.moved_on)
        )
        return pb.OverrideReport(
            machine=name,
            machine_id=attempt.machine_id,
            migration_id=attempt.migration_id.hex(),
            other_host=attempt.destination,
            right=machine_pb2.MachineRight.ValueType(rights.standing.value),
            epoch=attempt.epoch_from + 2,
            operator=word.operator,
            evidence=word.evidence,
            with_memory=word.with_memory,
            memory_usable=usable,
            effects=_effects(name, word, usable=usable),
            risks=_risks(name, word, attempt, handed_off=isinstance(state, source.HandedOff)),
        )


async def _check_silent(destination: Destination, attempt: Attempt) -> None:
    """Refuse while the destination answers: what it says is acted on without anybody's help.

    Raises:
        WrongPhaseError: it does.
    """
    try:
        heard = await destination.look(attempt)
    except _NO_WORD:
        return
    if heard.incarnation != attempt.destination_incarnation and attempt.destination_incarnation:
        return  # it knows nothing of what the lost journal had promised
    raise WrongPhaseError(
        f"{attempt.destination} answers, and says {heard.state.name}: it is believed, and this settles itself",
        remedy="Wait (vmferry watch). If its copy is lost for good, end that host or its destination service first.",
        destination=attempt.destination,
    )


def _event(word: Word, *, memory_intact: bool, moved_on: bool) -> source.ForceReclaim:
    # A question needs no evidence to be answered.
    return source.ForceReclaim(
        word.operator,
        word.evidence or "only asked",
        memory_intact=memory_intact,
        with_memory=word.with_memory,
        moved_on=moved_on,
    )


def _effects(name: str, word: Word, *, usable: bool) -> list[str]:
    if word.with_memory:
        guest = "The guest goes on here, from the memory that it was paused with."
    elif usable:
        guest = f"The paused copy of {name} here is ended first; its memory is lost."
    else:
        guest = "The guest's memory is gone already."
    last = [] if word.with_memory else [f"{name} can be started anew (vmferry machine start)."]
    return [
        guest,
        "This host owns the machine; the destination's copy is out of the game, if it hears of it.",
        *last,
    ]


def _risks(name: str, word: Word, attempt: Attempt, *, handed_off: bool) -> list[str]:
    found = [
        f"If {attempt.destination} is not off, {name} may run on both hosts at once, and write to the same disks."
    ]
    if handed_off and word.with_memory:
        found.append(
            "If the guest has run there, what it did is forgotten, and the memory here does not fit its disks any"
            " more."
        )
    if not word.with_memory:
        found.append("What was only in the guest's memory is lost.")
    if not handed_off:
        found.append("A copy that waits there, complete, is given up.")
    return found
