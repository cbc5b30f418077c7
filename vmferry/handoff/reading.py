"""A machine's journals record by record, for people to read.

Promise: nothing is changed, and nothing is concluded: what can be read is shown, also of a journal that is damaged
or belongs to another host, with the reason why it cannot be believed. Works without the register, when no service
starts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vmferry.handoff import journal, records
from vmferry.handoff.ledger import Health, HostLedger, Role
from vmferry.handoff.states import Record, RecordKind


@dataclass(frozen=True)
class Entry:
    """One record, and when and in which boot it was written."""

    record: Record
    boot_id: str
    write_unix_ns: int


@dataclass(frozen=True)
class Reading:
    """One journal of a machine."""

    role: Role
    exists: bool
    entries: tuple[Entry, ...]
    torn_tail: bool = False
    damage: str = ""

    @property
    def written_unix_ns(self) -> int | None:
        """When the last record was written, by this host's clock."""
        return self.entries[-1].write_unix_ns if self.entries else None

    @property
    def last_kind(self) -> RecordKind | None:
        """What the last record states."""
        return self.entries[-1].record.kind if self.entries else None


def read_machine(directory: Path, machine_id: str, ledger: HostLedger | str) -> tuple[Reading, ...]:
    """All journals of a machine.

    Args:
        directory: where the journals of the host lie.
        machine_id: which machine, a UUID.
        ledger: who knows what can be believed, or why nothing can.
    """
    believed = {} if isinstance(ledger, str) else ledger.health(machine_id)
    nothing = Health(damage=ledger if isinstance(ledger, str) else "")
    return tuple(_reading(directory, machine_id, role, believed.get(role, nothing)) for role in Role)


def _reading(directory: Path, machine_id: str, role: Role, health: Health) -> Reading:
    entries: list[Entry] = []
    damage = health.damage
    try:
        payloads = journal.salvage(directory / machine_id / f"{role}.journal")
        for payload in (payloads or ())[1:]:
            record, boot_id = records.decode(payload)
            entries.append(Entry(record, boot_id, records.write_unix_ns(payload)))
    except OSError as error:
        return Reading(role, exists=True, entries=(), damage=damage or f"cannot be read: {error.strerror}")
    except ValueError as error:
        damage = damage or f"a record cannot be read: {error}"
    return Reading(role, payloads is not None, tuple(entries), health.torn_tail, damage)
