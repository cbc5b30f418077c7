"""Journal records and attempts as protobuf, byte for byte the same on every host and in every release.

Promise: decoding what was encoded gives the same record (a long note is cut); anything else raises ``ValueError``.
Every record of an attempt fits its slot if the first one did.
"""

from __future__ import annotations

from typing import Final

from google.protobuf.message import DecodeError

from vmferry.errors import InvalidArgumentError
from vmferry.handoff.states import Attempt, Record, RecordKind, Update
from vmferry.v1 import handoff_pb2, journal_pb2

MAX_NAME_BYTES: Final = 384
"""Of each identity, address and incarnation; an identity of ours has at most 262."""
MAX_NOTE_BYTES: Final = 512


def attempt_to_ref(attempt: Attempt) -> handoff_pb2.AttemptRef:
    """The attempt as it goes over the wire and into the journal."""
    return handoff_pb2.AttemptRef(
        machine_id=attempt.machine_id,
        migration_id=attempt.migration_id,
        attempt=attempt.number,
        epoch_from=attempt.epoch_from,
        epoch_to=attempt.epoch_to,
        source=attempt.source,
        destination=attempt.destination,
        source_incarnation=attempt.source_incarnation,
        destination_incarnation=attempt.destination_incarnation,
        destination_address=attempt.destination_address,
    )


def attempt_from_ref(ref: handoff_pb2.AttemptRef) -> Attempt:
    """The attempt that ``ref`` describes; raises ``ValueError`` if it contradicts itself."""
    if ref.epoch_to != ref.epoch_from + 1:
        raise ValueError("epoch_to must be epoch_from + 1")
    if len(ref.migration_id) != 16:  # noqa: PLR2004 - 128 bits
        raise ValueError("migration_id must have 16 bytes")
    return Attempt(
        machine_id=ref.machine_id,
        migration_id=ref.migration_id,
        number=ref.attempt,
        epoch_from=ref.epoch_from,
        source=ref.source,
        destination=ref.destination,
        source_incarnation=ref.source_incarnation,
        destination_incarnation=ref.destination_incarnation,
        destination_address=ref.destination_address,
    )


def encode(record: Record, *, boot_id: str, write_unix_ns: int) -> bytes:
    """The record as the payload of a journal slot.

    Raises:
        InvalidArgumentError: a name is too long for a slot.
    """
    _check_names(record)
    message = journal_pb2.JournalRecord(
        kind=journal_pb2.RecordKind.ValueType(record.kind.value),
        machine_id=record.machine_id,
        digest=record.digest,
        epoch=record.epoch,
        ticket_nonce=record.ticket_nonce,
        boot_id=boot_id,
        note=_cut(record.note),
        operator=record.operator,
        with_memory=record.with_memory,
    )
    if record.attempt is not None:
        message.attempt.CopyFrom(attempt_to_ref(record.attempt))
    if record.update is not None:
        message.update.update_id, message.update.number = record.update.update_id, record.update.number
    if record.ticket_expire_unix:
        message.ticket_expire_time.FromSeconds(record.ticket_expire_unix)
    message.write_time.FromNanoseconds(write_unix_ns)
    return message.SerializeToString(deterministic=True)


def decode(payload: bytes) -> tuple[Record, str]:
    """The record in a slot and the boot it was written in."""
    try:
        message = journal_pb2.JournalRecord.FromString(payload)
    except DecodeError as error:
        raise ValueError("not a journal record") from error
    record = Record(
        kind=RecordKind(message.kind),
        machine_id=message.machine_id,
        attempt=attempt_from_ref(message.attempt) if message.HasField("attempt") else None,
        digest=message.digest,
        epoch=message.epoch,
        ticket_nonce=message.ticket_nonce,
        ticket_expire_unix=message.ticket_expire_time.seconds,
        note=message.note,
        operator=message.operator,
        with_memory=message.with_memory,
        update=_update(message) if message.HasField("update") else None,
    )
    return record, message.boot_id


def _update(message: journal_pb2.JournalRecord) -> Update:
    return Update(message.machine_id, message.update.update_id, message.update.number)


def write_unix_ns(payload: bytes) -> int:
    """When the record in a slot was written, by its host's clock; for reading only, no rule uses it."""
    return journal_pb2.JournalRecord.FromString(payload).write_time.ToNanoseconds()


def _check_names(record: Record) -> None:
    names = {"machine_id": record.machine_id, "operator": record.operator}
    if record.attempt is not None:
        for name in (
            "machine_id",
            "source",
            "destination",
            "source_incarnation",
            "destination_incarnation",
            "destination_address",
        ):
            names[f"attempt.{name}"] = getattr(record.attempt, name)
    for field, value in names.items():
        if len(value.encode(errors="surrogatepass")) > MAX_NAME_BYTES:
            raise InvalidArgumentError(f"{field} has more than {MAX_NAME_BYTES} bytes", field=field)


def _cut(note: str) -> str:
    # A note is often the text of an error and may hold anything; it must never keep a record from being written.
    return note.encode(errors="replace")[:MAX_NOTE_BYTES].decode(errors="ignore")
