"""What is known of a machine as the API shows it.

Promise: everything that was found is in the message, and no ticket is.
"""

from __future__ import annotations

from collections.abc import Sequence

from vmferry.handoff import records
from vmferry.handoff.blocked import Guest, Side
from vmferry.handoff.choices import Choice, choices, open_attempt
from vmferry.handoff.ledger import HostLedger, Role
from vmferry.handoff.reading import Entry, Reading
from vmferry.handoff.states import Attempt
from vmferry.machines.process import boot_id
from vmferry.recovery.contact import Contact
from vmferry.recovery.examination import Examiner, Known, as_message
from vmferry.v1 import journal_pb2, recovery_pb2


def as_inspection(
    known: Known, examiner: Examiner, *, host: str, migration_id: str = ""
) -> recovery_pb2.MachineInspection:
    """All of it, said by ``host``."""
    message = recovery_pb2.MachineInspection(
        machine=as_message(known, migration_id),
        host=host,
        service=examiner.service or "",
        incarnation=examiner.ledger.incarnation if isinstance(examiner.ledger, HostLedger) else "",
        boot_id=boot_id(),
        has_entry=known.record is not None,
        has_memory=known.answer.guest not in {Guest.ABSENT, Guest.WAITING},
        hypervisor=known.answer.words,
        journals=[_journal(one) for one in known.journals],
        choices=[
            _choice(one) for one in choices(known.facts, known.doubt, stoppable=known.record is not None)
        ],
    )
    message.time.GetCurrentTime()
    now = open_attempt(known.rights)
    if now is not None:
        side, message.attempt_state, attempt = now
        message.open_attempt.CopyFrom(records.attempt_to_ref(attempt))
        message.peer.CopyFrom(_peer(side, attempt, known.contact))
    elif (last := _last_attempt(known.journals)) is not None:
        message.peer.CopyFrom(_peer(*last, known.contact))
    return message


def _last_attempt(journals: Sequence[Reading]) -> tuple[Side, Attempt] | None:
    """The attempt that the newest record is about, and whose half it is."""
    sides = {Role.SOURCE: Side.SOURCE, Role.DESTINATION: Side.DESTINATION}
    found = [
        (entry.write_unix_ns, number, sides[one.role], entry.record.attempt)
        for one in journals
        for number, entry in enumerate(one.entries)
        if one.role in sides and entry.record.attempt is not None
    ]
    if not found:
        return None
    _, _, side, attempt = max(found, key=lambda one: one[:2])
    return side, attempt


def _peer(side: Side, attempt: Attempt, contact: Contact) -> recovery_pb2.Peer:
    leaving = side is Side.SOURCE
    message = recovery_pb2.Peer(
        host=attempt.destination if leaving else attempt.source,
        address=attempt.destination_address if leaving else "",
        heard=contact.heard,
        failure=contact.failure,
    )
    if contact.heard_unix_ns:
        message.heard_time.FromNanoseconds(contact.heard_unix_ns)
    return message


def _journal(reading: Reading) -> recovery_pb2.Journal:
    return recovery_pb2.Journal(
        role=reading.role,
        exists=reading.exists,
        records=[_record(entry) for entry in reading.entries],
        torn_tail=reading.torn_tail,
        damage=reading.damage,
    )


def _record(entry: Entry) -> journal_pb2.JournalRecord:
    payload = records.encode(entry.record, boot_id=entry.boot_id, write_unix_ns=entry.write_unix_ns)
    message = journal_pb2.JournalRecord.FromString(payload)
    message.ClearField("ticket_nonce")
    return message


def _choice(choice: Choice) -> recovery_pb2.Choice:
    return recovery_pb2.Choice(
        name=choice.name,
        possible=choice.possible,
        why_not=choice.why_not,
        risk=choice.risk,
        command=choice.command,
    )
