"""What one host knows of its machines, put together from journals, hypervisors and what its service heard.

Promise: nothing is changed. Journals are read in threads, hypervisors asked beside whoever drives them, so that
nothing waits for an examination. It works for a machine of which only journals are left, and without any service.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vmferry.errors import JournalDamagedError, MachineNotFoundError
from vmferry.handoff import destination, source
from vmferry.handoff.blocked import Doubt, Facts, Guest, Reason, Side, doubt
from vmferry.handoff.ledger import HostLedger, Role
from vmferry.handoff.reading import Reading, read_machine
from vmferry.handoff.rights import Epochs, Rights
from vmferry.handoff.states import RecordKind
from vmferry.machines.directory import MachineDirectory, MachineRecord
from vmferry.machines.host import is_machine_id
from vmferry.machines.wire import spec_to_message
from vmferry.recovery import guests
from vmferry.recovery.contact import Contact
from vmferry.v1 import machine_pb2

_NO_RIGHTS = Rights(Epochs(), source.Quiet(), destination.DestinationState(), damaged=True)
_ROLES = {Side.SOURCE: Role.SOURCE, Side.DESTINATION: Role.DESTINATION}
_TICK_NS = 1_000_000_000
_SIDES = {role: side for side, role in _ROLES.items()}


@dataclass(frozen=True)
class Known:
    """All that a host knows of one machine."""

    machine_id: str
    record: MachineRecord | None
    rights: Rights
    answer: guests.Answer
    journals: Sequence[Reading]
    """All of them, or none if nothing about them is in doubt."""
    contact: Contact
    doubt: Doubt | None
    """What blocks the machine."""
    facts: Facts

    @property
    def since_unix_ns(self) -> int | None:
        """Since when, by this host's clock: when the record behind the doubt was written."""
        return _since(self.doubt, self.journals) if self.doubt is not None else None


class Examiner:
    """Looks at the machines of one host.

    Args:
        directory: its machines.
        journal_dir: its journals.
        ledger: who reads them, or why nobody can.
        service: the role of the service that looks; ``None`` if no service does.
        contact: what that service heard about a machine.
    """

    def __init__(
        self,
        directory: MachineDirectory,
        journal_dir: Path,
        ledger: HostLedger | str,
        *,
        service: Role | None = None,
        contact: Callable[[str], Contact] = lambda _: Contact(),
    ) -> None:
        self.directory = directory
        self.ledger = ledger
        self.service = service
        self._journal_dir = journal_dir
        self._settled: dict[str, tuple[tuple[int, int, int], ...]] = {}
        self._contact = contact

    async def find(self, name: str) -> Known:
        """A machine by name or UUID, with all its journals.

        Raises:
            MachineNotFoundError: neither the directory nor any journal speaks of it.
        """
        record = next((one for one in self.directory.list() if name in (one.spec.name, one.spec.uuid)), None)
        machine_id = record.spec.uuid if record is not None else name
        if record is None and not (
            is_machine_id(name) and name in await asyncio.to_thread(self._with_journals)
        ):
            raise MachineNotFoundError(
                f"no machine {name!r} on this host, and no journal of one",
                machine=name,
                remedy="Check the name (vmferry list --machines); one that has left is known by its UUID alone.",
            )
        return await self._examine(machine_id, record, thorough=True)

    async def machine(self, record: MachineRecord, migration_id: str = "") -> machine_pb2.Machine:
        """A machine as the API shows it."""
        return as_message(await self._examine(record.spec.uuid, record), migration_id)

    async def strays(self, records: Iterable[MachineRecord]) -> list[machine_pb2.Machine]:
        """Blocked machines of which only journals are left here."""
        known = {record.spec.uuid for record in records}
        suspects = await asyncio.to_thread(self._suspects, known)
        found = [await self._examine(machine_id, None) for machine_id in suspects]
        return [as_message(one) for one in found if one.doubt is not None]

    async def census(self) -> Counter[Reason]:
        """How many machines of this host are blocked, by reason, as far as they are this service's half to settle."""
        records = {record.spec.uuid: record for record in self.directory.list()}
        suspects = await asyncio.to_thread(self._suspects, set(records))
        # One after the other: nobody waits for this, and everybody shares the disk and the hypervisors.
        found = [await self._examine(one, records.get(one)) for one in (*records, *suspects)]
        return Counter(
            one.doubt.reason
            for one in found
            if one.doubt is not None and self.service in (None, _ROLES[one.doubt.side])
        )

    def _suspects(self, known: Container[str]) -> list[str]:
        """Machines of which only journals are here, and that may be blocked; most are gone for good."""
        return [one for one in self._with_journals() if one not in known and not self._is_settled(one)]

    def _is_settled(self, machine_id: str) -> bool:
        """Whether nothing about a machine without a process here can be in doubt; read again only if it changed."""
        stamp = self._stamp(machine_id)
        if self._settled.get(machine_id) == stamp:
            return True
        settled = not _may_be_in_doubt(self._rights(machine_id), Guest.ABSENT)
        written_ns = [time_ns for time_ns, _, _ in stamp]
        # A file may be written twice within one tick of its clock.
        if settled and max(written_ns, default=0) < time.time_ns() - _TICK_NS:
            self._settled[machine_id] = stamp
        return settled

    def _stamp(self, machine_id: str) -> tuple[tuple[int, int, int], ...]:
        """What is different once a journal of the machine was written, cut, replaced or removed."""
        found = []
        for role in Role:
            with contextlib.suppress(FileNotFoundError):
                status = (self._journal_dir / machine_id / f"{role}.journal").stat()
                found.append((status.st_mtime_ns, status.st_size, status.st_ino))
        return tuple(found)

    async def _examine(
        self, machine_id: str, record: MachineRecord | None, *, thorough: bool = False
    ) -> Known:
        rights = await asyncio.to_thread(self._rights, machine_id)
        answer = await guests.ask(self.directory, record)
        contact = self._contact(machine_id)
        journals: Sequence[Reading] = ()
        if thorough or _may_be_in_doubt(rights, answer.guest):
            journals = await asyncio.to_thread(read_machine, self._journal_dir, machine_id, self.ledger)
        facts = Facts(
            record.spec.name if record is not None else machine_id,
            rights,
            answer.guest,
            torn=frozenset(
                side
                for side, role in _ROLES.items()
                for one in journals
                if one.role is role and one.torn_tail
            ),
            forced=any(
                one.role is Role.DESTINATION and one.last_kind is RecordKind.FORCED for one in journals
            ),
            word=contact.word,
            served=self.service is not None,
        )
        found = doubt(facts)
        if (
            found is not None and not thorough
        ):  # who asks for one machine is told how it stands at this moment
            since = _since(found, journals)
            found = found if found.lasts(since / 1e9 if since is not None else None, time.time()) else None
        return Known(machine_id, record, rights, answer, journals, contact, found, facts)

    def _rights(self, machine_id: str) -> Rights:
        return _NO_RIGHTS if isinstance(self.ledger, str) else self.ledger.rights(machine_id)

    def _with_journals(self) -> list[str]:
        if not isinstance(self.ledger, str):
            with contextlib.suppress(JournalDamagedError):  # then by their files alone
                return self.ledger.machines()
        folders = self._journal_dir.iterdir() if self._journal_dir.is_dir() else ()
        return sorted(folder.name for folder in folders if is_machine_id(folder.name))


def as_message(known: Known, migration_id: str = "") -> machine_pb2.Machine:
    """A machine as the API shows it."""
    record = known.record
    message = machine_pb2.Machine(
        name=record.spec.name if record is not None else "",
        uuid=known.machine_id,
        spec=spec_to_message(record.spec) if record is not None else None,
        state=known.answer.state,
        right=machine_pb2.MachineRight.ValueType(known.rights.standing.value),
        epoch=known.rights.epoch,
        migration_id=migration_id,
        pid=(record.pid or 0) if record is not None else 0,
    )
    if known.doubt is not None:
        found = machine_pb2.Blockage(
            reason=known.doubt.reason, message=known.doubt.message, remedy=known.doubt.remedy
        )
        if known.since_unix_ns is not None:
            found.since.FromNanoseconds(known.since_unix_ns)
        message.blockage.CopyFrom(found)
    return message


def _may_be_in_doubt(rights: Rights, guest: Guest) -> bool:
    """Whether journals are worth reading record by record; most machines run, or are gone for good."""
    now = rights.incoming.current
    arriving = isinstance(now, destination.Prepared) or (isinstance(now, destination.Owned) and not now.ran)
    return (
        rights.damaged
        or rights.superseded
        or rights.leaving
        or arriving
        or (rights.permitted and guest is Guest.PAUSED)
    )


def _since(found: Doubt | None, journals: Sequence[Reading]) -> int | None:
    """When the record behind a doubt was written."""
    if found is None or found.reason is Reason.JOURNAL_DAMAGED:
        return None
    role = _ROLES[found.side]
    # A machine that belongs to this host, or did, may do so by any journal's word, as a rule the newest.
    by_any = {Reason.NOT_RESUMED, Reason.SUPERSEDED}
    any_role = found.reason in by_any and found.side is Side.SOURCE
    written = [one.written_unix_ns for one in journals if any_role or one.role is role]
    return max((one for one in written if one is not None), default=None)
