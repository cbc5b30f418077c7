"""The records' codec: what is read is what was written, and every record fits its slot."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.handoff.samples import MACHINE, attempt, record
from vmferry.errors import InvalidArgumentError
from vmferry.handoff.journal import MAX_PAYLOAD_BYTES
from vmferry.handoff.records import (
    MAX_NAME_BYTES,
    MAX_NOTE_BYTES,
    attempt_from_ref,
    attempt_to_ref,
    decode,
    encode,
)
from vmferry.handoff.states import Attempt, AttemptState, Record, RecordKind, Update
from vmferry.security.identity import MAX_URI_CHARS
from vmferry.v1 import handoff_pb2, journal_pb2

NUMBERS: Final = st.integers(0, 2**64 - 1)
NAMES: Final = st.text(st.characters(codec="ascii"), max_size=MAX_NAME_BYTES)
ATTEMPTS: Final = st.builds(
    Attempt,
    NAMES,
    st.binary(min_size=16, max_size=16),
    NUMBERS,
    st.integers(0, 2**64 - 2),
    NAMES,
    NAMES,
    NAMES,
    NAMES,
    destination_address=NAMES,
)
RECORDS: Final = st.builds(
    Record,
    st.sampled_from(RecordKind),
    NAMES,
    st.none() | ATTEMPTS,
    digest=st.binary(max_size=32),
    epoch=NUMBERS,
    ticket_nonce=st.binary(max_size=32),
    ticket_expire_unix=st.integers(0, 2**32),
    note=st.text(st.characters(codec="ascii"), max_size=MAX_NOTE_BYTES),
    operator=NAMES,
)


@given(RECORDS, st.binary(max_size=16), st.integers(0, 2**64 - 1))
def test_a_record_of_an_update_is_read_back(entry: Record, update_id: bytes, number: int) -> None:
    """Which update it is about is kept, and a record without one has none."""
    about = replace(entry, update=Update(entry.machine_id, update_id, number))
    assert decode(encoded(about))[0] == about
    assert decode(encoded(entry))[0].update is None


def encoded(entry: Record) -> bytes:
    """The record as of some boot and time."""
    return encode(entry, boot_id="b" * 36, write_unix_ns=2**62)


@given(RECORDS)
def test_what_is_decoded_is_what_was_encoded(entry: Record) -> None:
    """Any record that can be written is read back the same, with the boot it was written in."""
    assert decode(encoded(entry)) == (entry, "b" * 36)
    if entry.attempt is not None:
        found, _ = decode(encoded(entry))
        assert found.attempt is not None
        assert found.attempt.destination_address == entry.attempt.destination_address


@given(RECORDS)
def test_the_same_record_has_the_same_bytes(entry: Record) -> None:
    """A record has one spelling."""
    assert encoded(entry) == encoded(decode(encoded(entry))[0])


@given(st.binary(max_size=200))
def test_other_bytes_are_refused_or_a_record(data: bytes) -> None:
    """Bytes that were not written by the codec give a record or a ValueError, never another error."""
    try:
        found, _ = decode(data)
    except ValueError:
        return
    assert isinstance(found.kind, RecordKind)


def test_every_record_fits_its_slot_at_its_longest() -> None:
    """With every field as long as it may be, in characters that take most bytes, a record fits."""
    longest = "\N{MUSICAL SYMBOL G CLEF}" * (MAX_NAME_BYTES // 4)
    number = 2**64 - 1
    about = Attempt(longest, b"\xff" * 16, number, number - 1, *(longest,) * 4, destination_address=longest)
    for kind in RecordKind:
        entry = Record(
            kind, longest, about, b"\xff" * 64, number, b"\xff" * 64, 2**37, longest * 10, operator=longest
        )
        assert len(encode(entry, boot_id="b" * 36, write_unix_ns=2**62)) <= MAX_PAYLOAD_BYTES


def test_an_identity_of_ours_is_short_enough() -> None:
    """The longest legal SPIFFE identity is below the limit of a name, and so is an address."""
    assert max(MAX_URI_CHARS, 253 + len(":65535")) <= MAX_NAME_BYTES


@pytest.mark.parametrize(
    "field",
    [
        "machine_id",
        "source",
        "destination",
        "source_incarnation",
        "destination_incarnation",
        "destination_address",
    ],
)
def test_a_name_that_is_too_long_is_refused_by_name(field: str) -> None:
    """It is refused at the first record of an attempt, so that no later one fails to fit."""
    changed: dict[str, Any] = {field: "x" * (MAX_NAME_BYTES + 1)}
    about = replace(attempt(), **changed)
    with pytest.raises(InvalidArgumentError) as caught:
        encoded(Record(RecordKind.BEGUN, MACHINE, about))
    assert caught.value.field == f"attempt.{field}"


@pytest.mark.parametrize(
    "note", ["n" * 2000, "\N{MUSICAL SYMBOL G CLEF}" * 200, "\udcff broken \ud800", "a\0b"]
)
def test_no_note_keeps_a_record_from_being_written(note: str) -> None:
    """A note of any length and content is cut to what fits, and what is left of it is readable."""
    entry = record(RecordKind.ABORTED, note=note)
    found, _ = decode(encoded(entry))
    assert replace(found, note="") == replace(entry, note="")
    assert len(found.note.encode()) <= MAX_NOTE_BYTES
    assert note.encode(errors="replace").decode().startswith(found.note)


@pytest.mark.parametrize(
    "ref",
    [
        handoff_pb2.AttemptRef(migration_id=bytes(16), epoch_from=3, epoch_to=3),
        handoff_pb2.AttemptRef(migration_id=bytes(16), epoch_from=3, epoch_to=5),
        handoff_pb2.AttemptRef(migration_id=bytes(15), epoch_from=3, epoch_to=4),
        handoff_pb2.AttemptRef(epoch_from=3, epoch_to=4),
    ],
)
def test_an_attempt_that_contradicts_itself_is_refused(ref: handoff_pb2.AttemptRef) -> None:
    """Epochs grow by one and a migration's identity has 128 bits, on the wire as in the journal."""
    with pytest.raises(ValueError, match=r"epoch_to|migration_id"):
        attempt_from_ref(ref)


@pytest.mark.parametrize("kind", [0, 21, 99])
def test_a_record_of_an_unknown_kind_is_refused(kind: int) -> None:
    """What a later release writes is not guessed at."""
    message = journal_pb2.JournalRecord(kind=journal_pb2.RecordKind.ValueType(kind), machine_id=MACHINE)
    with pytest.raises(ValueError, match=str(kind)):
        decode(message.SerializeToString())


@pytest.mark.parametrize(
    ("ours", "wire"), [(RecordKind, journal_pb2.RecordKind), (AttemptState, handoff_pb2.AttemptState)]
)
def test_kinds_and_states_have_the_numbers_of_the_contract(ours: type, wire: object) -> None:
    """Names and numbers are those of the protobuf enumeration, all of them."""
    prefix = "RECORD_KIND_" if ours is RecordKind else "ATTEMPT_STATE_"
    expected = {name.removeprefix(prefix): number for name, number in wire.items() if number}  # type: ignore[attr-defined]
    assert {member.name: member.value for member in ours} == expected  # type: ignore[attr-defined]


def test_an_attempt_survives_the_wire() -> None:
    """The reference that goes over the wire describes the same attempt."""
    assert attempt_from_ref(attempt_to_ref(attempt())) == attempt()
