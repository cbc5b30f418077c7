"""An operator's word at the destination: the source is lost for ever, and the machine is to be this host's.

Promise: as long as the source lets hear from itself it is believed, never the operator, and nothing is decided about
another migration than the one that was named. The same word twice has the same answer.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from dest_svc.arrival import Arrival
from vmferry.errors import (
    JournalDamagedError,
    MachineNotFoundError,
    StaleAttemptError,
    WrongPhaseError,
)
from vmferry.handoff import destination
from vmferry.handoff.ledger import Role
from vmferry.handoff.states import Attempt
from vmferry.rpc.daemon import Host
from vmferry.security.override import Word, repeated
from vmferry.v1 import machine_pb2
from vmferry.v1 import override_pb2 as pb


class Accepting:
    """What operators may decide at one destination service."""

    def __init__(self, host: Host, arrival: Callable[[str], Arrival]) -> None:
        self._ledger = host.ledger
        self._directory = host.directory
        self._arrival = arrival
        self._silent_s = 2 * (host.config.handoff_retry_s + host.config.rpc_timeout_s)
        """A source that lives and waits for something asks more often than that."""

    def _find(self, name_or_uuid: str) -> tuple[str, str]:
        """Name and identity of a machine that is arriving here, or was."""
        try:
            spec = self._directory.find(name_or_uuid).spec
        except MachineNotFoundError:
            # What is known of machines by name does not outlive a reboot; the journals do.
            if name_or_uuid in self._ledger.machines(Role.DESTINATION):
                return name_or_uuid, name_or_uuid
            raise
        return spec.name, spec.uuid

    async def decide(self, word: Word) -> pb.OverrideReport:
        """Do what an operator decided about a machine, or say what would be done.

        Raises:
            MachineNotFoundError: there is no such machine.
            WrongPhaseError: there is nothing to decide, it was decided otherwise, or the source was heard.
            StaleAttemptError: what is open is not what was named.
        """
        name, machine_id = self._find(word.machine)
        arrival = self._arrival(machine_id)
        async with arrival.lock:
            return await self._decide(word, arrival, name)

    async def _decide(self, word: Word, arrival: Arrival, name: str) -> pb.OverrideReport:
        rights = await asyncio.to_thread(self._ledger.rights, arrival.machine_id)
        if rights.damaged:
            raise JournalDamagedError(
                f"the journal of machine {arrival.machine_id} is damaged", machine=arrival.machine_id
            )
        for record in reversed(self._ledger.forced(arrival.machine_id, Role.DESTINATION)):
            named = record.attempt is not None and record.attempt.migration_id == word.migration_id
            if named or (word.only_asked and not word.migration_id and rights.owner):
                return repeated(word, record, name, rights.standing)
        now = arrival.state.current
        if rights.holds or not isinstance(now, (destination.Prepared, destination.Refused)):
            raise WrongPhaseError(
                f"no complete copy of {name} waits here: it is {rights.standing.name.lower()}",
                remedy="Ask for the current state (vmferry machine list); nothing was changed.",
            )
        if not word.is_about(now.attempt.migration_id):
            raise StaleAttemptError(
                f"migration {now.attempt.migration_id.hex()} is the last one, which is not the one that was named",
                field="override.migration_id",
                remedy="Look again (vmferry handoff force-accept --dry-run), and decide about what is open.",
            )
        self._check_silent(arrival, now.attempt)
        return await self._act(word, arrival, name, now)

    async def _act(
        self, word: Word, arrival: Arrival, name: str, now: destination.Prepared | destination.Refused
    ) -> pb.OverrideReport:
        usable = isinstance(now, destination.Prepared) and await arrival.copy_waits()
        event = destination.ForceAccept(
            word.operator,
            word.evidence or "only asked",  # a question needs no evidence to be answered
            copy_intact=usable,
            with_memory=word.with_memory,
        )
        destination.decide(arrival.state, event)  # says already now why it would be refused
        right = machine_pb2.MACHINE_RIGHT_ARRIVING if usable else machine_pb2.MACHINE_RIGHT_GONE
        if not word.only_asked:
            await arrival.force(event)
            right = machine_pb2.MACHINE_RIGHT_OWNED
        return pb.OverrideReport(
            machine=name,
            machine_id=arrival.machine_id,
            migration_id=now.attempt.migration_id.hex(),
            other_host=now.attempt.source,
            right=right,
            epoch=now.attempt.epoch_to,
            done=not word.only_asked,
            operator=word.operator,
            evidence=word.evidence,
            with_memory=word.with_memory,
            memory_usable=usable,
            effects=_effects(name, word, usable=usable),
            risks=_risks(name, word, now.attempt),
        )

    def _check_silent(self, arrival: Arrival, attempt: Attempt) -> None:
        """Refuse while the source lets hear from itself: what it says is acted on without anybody's help.

        Raises:
            WrongPhaseError: it was heard a moment ago.
        """
        heard_s = time.monotonic() - arrival.heard_at
        if heard_s < self._silent_s:
            raise WrongPhaseError(
                f"{attempt.source} was heard {heard_s:.1f} s ago: it is believed, and this settles itself",
                remedy=f"Wait. If its copy is lost for good, end that host or its source service, and call again"
                f" after {self._silent_s:.0f} s.",
                source=attempt.source,
            )


def _effects(name: str, word: Word, *, usable: bool) -> list[str]:
    owned = "This host owns the machine; the source's copy is out of the game, if it hears of it."
    if word.with_memory:
        return [owned, "The guest goes on here, from the copy that arrived."]
    copy = [f"The copy of {name} here is ended first; its memory is lost."] if usable else []
    return [*copy, owned, f"{name} can be started anew (vmferry machine start, or run with its description)."]


def _risks(name: str, word: Word, attempt: Attempt) -> list[str]:
    found = [
        f"If {attempt.source} is not off, {name} may run on both hosts at once, and write to the same disks."
    ]
    if word.with_memory:
        found.append(
            "If the guest has run on there after it was copied, what it did is forgotten, and the memory here does"
            " not fit its disks any more."
        )
    else:
        found.append("What was only in the guest's memory is lost.")
    return found
