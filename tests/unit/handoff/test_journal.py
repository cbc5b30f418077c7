"""The journal's file: what was appended is read back as a prefix, or the reader is told that it cannot be trusted."""

from __future__ import annotations

import hashlib
import os
import random
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from tests.unit.handoff.journals import LABEL, expected, filled, payload, read
from vmferry.errors import JournalDamagedError
from vmferry.handoff import journal
from vmferry.handoff.journal import MAX_PAYLOAD_BYTES, SLOT_BYTES, SLOTS_PER_EXTENT, Contents, Journal


def slots_of(data: bytes) -> list[bytes]:
    """The slots of a file, the last one perhaps cut."""
    return [data[at : at + SLOT_BYTES] for at in range(0, len(data), SLOT_BYTES)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "source.journal"


@pytest.fixture
def three(path: Path) -> bytes:
    """The file of a journal of three records."""
    filled(path, 3)
    return path.read_bytes()


@pytest.fixture
def twelve(path: Path) -> bytes:
    """The file of a journal of twelve records."""
    filled(path, 12)
    return path.read_bytes()


@pytest.mark.parametrize("durable", [True, False])
def test_what_was_appended_is_read_back(path: Path, *, durable: bool) -> None:
    """Records come back complete and in order, over several openings, the longest and the empty one too."""
    filled(path, 3, durable=durable)
    filled(path, 4, start=3, durable=durable)
    log = Journal(path, LABEL)
    log.append(b"", durable=durable)
    log.append(bytes(MAX_PAYLOAD_BYTES), durable=durable)
    log.close()
    contents = journal.read(path, LABEL)
    assert contents.payloads == (*expected(7), b"", bytes(MAX_PAYLOAD_BYTES))
    assert not contents.torn_tail
    assert not contents.damage


def test_a_missing_file_reads_as_empty(path: Path) -> None:
    """Reading makes no file."""
    assert journal.read(path, LABEL) == Contents()
    assert not path.exists()


def test_a_record_is_one_slot_at_most(path: Path) -> None:
    """A longer one is refused before anything is written, and the journal goes on."""
    log = Journal(path, LABEL)
    with pytest.raises(ValueError, match=str(MAX_PAYLOAD_BYTES)):
        log.append(bytes(MAX_PAYLOAD_BYTES + 1), durable=True)
    log.append(b"next", durable=True)
    log.close()
    assert journal.read(path, LABEL).payloads == (b"next",)


def test_only_its_owner_may_read_the_file(path: Path) -> None:
    """The file is 0600 whatever the umask."""
    before = os.umask(0)
    try:
        filled(path, 1)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_the_file_grows_by_whole_extents(path: Path) -> None:
    """More records than an extent holds: all are kept, and the file is allocated ahead of them."""
    count = 2 * SLOTS_PER_EXTENT + 5
    filled(path, count, durable=False)
    assert journal.read(path, LABEL).payloads == expected(count)
    assert path.stat().st_size == 3 * SLOTS_PER_EXTENT * SLOT_BYTES


# Damage


def test_a_file_cut_at_any_byte_gives_a_prefix_and_is_not_certain(
    three: bytes, record_property: Callable[[str, object], None]
) -> None:
    """Cut anywhere in its last two records, the file gives the whole records before, and says that it was cut."""
    record_property("lengths cut", 2 * SLOT_BYTES)
    for at in range(2 * SLOT_BYTES, 4 * SLOT_BYTES):
        contents = read(three[:at])
        whole = (at // SLOT_BYTES) - 1
        # A cut slot can only be whole if the bytes that are missing were zero.
        assert contents.payloads in (expected(whole), expected(whole + 1))
        assert contents.torn_tail
        assert not contents.damage


def test_an_append_cut_at_any_byte_is_a_torn_tail(
    three: bytes, record_property: Callable[[str, object], None]
) -> None:
    """Written up to any byte of its last two slots, the file gives the records before and a torn tail at most."""
    empty = bytes(2 * SLOT_BYTES)
    record_property("lengths cut", 2 * SLOT_BYTES)
    for at in range(2 * SLOT_BYTES, 4 * SLOT_BYTES):
        contents = journal._read_slots(three[:at].ljust(-(-at // SLOT_BYTES) * SLOT_BYTES, b"\0") + empty)
        whole = at // SLOT_BYTES
        assert contents.payloads[1:] in (expected(whole - 1), expected(whole))
        assert contents.torn_tail == (at % SLOT_BYTES > 0 and len(contents.payloads) == whole)
        assert not contents.damage


def flips(seed: int) -> Iterator[int]:
    """All bits of every header and hash, and some of what lies between."""
    chance = random.Random(seed)
    for slot in range(13):
        start, end = slot * SLOT_BYTES, (slot + 1) * SLOT_BYTES
        yield from range(start * 8, (start + 48) * 8)
        yield from range((end - 32) * 8, end * 8)
        yield from (chance.randrange((start + 48) * 8, (end - 32) * 8) for _ in range(40))


def test_any_flipped_bit_is_noticed(twelve: bytes, record_property: Callable[[str, object], None]) -> None:
    """One flipped bit in the last record is a torn tail, in any other damage; no record changes or appears."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    flipped = bytearray(twelve)
    bits = list(flips(seed))
    record_property("bits flipped", len(bits))
    for bit in bits:
        flipped[bit // 8] ^= 1 << bit % 8
        contents = read(bytes(flipped))
        flipped[bit // 8] ^= 1 << bit % 8
        slot = bit // 8 // SLOT_BYTES
        if slot == 12:
            assert contents.payloads == expected(11)
            assert contents.torn_tail
            assert not contents.damage
        else:
            assert contents.payloads == expected(max(slot - 1, 0)), f"seed {seed}, bit {bit}"
            assert contents.damage


def test_a_flipped_bit_behind_the_end_is_never_a_record(twelve: bytes) -> None:
    """In the slot after the last record it looks like an unfinished append, further on like damage."""
    for slot in range(13, SLOTS_PER_EXTENT):
        flipped = bytearray(twelve)
        flipped[slot * SLOT_BYTES + 7] ^= 16
        contents = read(bytes(flipped))
        assert contents.payloads == expected(12)
        assert contents.torn_tail == (slot == 13)
        assert bool(contents.damage) == (slot > 13)


@pytest.mark.parametrize(("first", "second"), [(1, 2), (3, 9), (0, 1), (11, 12)])
def test_slots_in_the_wrong_place_are_damage(twelve: bytes, first: int, second: int) -> None:
    """A whole slot is believed only where it was written: neither two swapped ones nor a copy of one are."""
    slots = slots_of(twelve)
    copied = [*slots[:second], slots[first], *slots[second + 1 :]]
    slots[first], slots[second] = slots[second], slots[first]
    for changed in (slots, copied):
        contents = read(b"".join(changed))
        assert contents.payloads == expected(len(contents.payloads))
        assert contents.damage or contents.torn_tail
        assert len(contents.payloads) < 12


def test_a_record_of_another_journal_does_not_fit(path: Path, twelve: bytes) -> None:
    """A valid slot of the same number from another file breaks the chain."""
    other = path.with_name("other.journal")
    log = Journal(other, LABEL)
    for number in range(12):
        log.append(payload(number) + b"!", durable=False)
    log.close()
    foreign = other.read_bytes()[5 * SLOT_BYTES : 6 * SLOT_BYTES]
    contents = read(twelve[: 5 * SLOT_BYTES] + foreign + twelve[6 * SLOT_BYTES :])
    assert contents.payloads == expected(4)
    assert contents.damage


@pytest.mark.parametrize(
    "content",
    [b"", b"\0" * SLOT_BYTES, b"not a journal", b"\xa5" * 3 * SLOT_BYTES],
    ids=["empty", "zeros", "text", "noise"],
)
def test_a_file_that_is_no_journal_is_damage(path: Path, content: bytes) -> None:
    """It is neither read as empty nor written to."""
    path.write_bytes(content)
    assert journal.read(path, LABEL).damage
    with pytest.raises(JournalDamagedError):
        Journal(path, LABEL)
    assert path.read_bytes() == content


def test_a_journal_of_another_label_is_damage(path: Path) -> None:
    """A file of another machine, role or host is not believed, although every slot of it is whole."""
    filled(path, 2)
    assert journal.read(path, LABEL + b"!").damage
    with pytest.raises(JournalDamagedError):
        Journal(path, LABEL + b"!")


@pytest.mark.parametrize("cut", [0, 1], ids=["torn", "cut"])
def test_the_next_append_heals_an_uncertain_end(path: Path, twelve: bytes, cut: int) -> None:
    """It takes the bad slot's place; nothing before is lost, and the end is certain again."""
    end = 12 * SLOT_BYTES + 100
    path.write_bytes(twelve[:end] if cut else twelve[:end].ljust(len(twelve), b"\0"))
    log = Journal(path, LABEL)
    assert log.torn_tail
    log.append(b"next", durable=True)
    assert not log.torn_tail
    log.close()
    assert journal.read(path, LABEL) == Contents((*expected(11), b"next"), last_hash=log._previous)


def test_a_file_cut_behind_its_last_record_loses_none_when_it_grows(path: Path, twelve: bytes) -> None:
    """Records in an extent that is not whole survive the next append."""
    filled(path, SLOTS_PER_EXTENT, start=12)
    whole = path.read_bytes()
    path.write_bytes(whole[: 77 * SLOT_BYTES])
    filled(path, 1, start=76)
    assert journal.read(path, LABEL).payloads == expected(77)
    assert not journal.read(path, LABEL).torn_tail


# Reading beside a writer

_WRITER: Final = """
import sys
from pathlib import Path
from tests.unit.handoff.journals import LABEL, payload
from vmferry.handoff.journal import Journal
log = Journal(Path(sys.argv[1]), LABEL)
for number in range(int(sys.argv[2])):
    log.append(payload(number), durable=number % 4 == 0)
log.close()
"""


def test_a_reader_beside_a_writer_never_sees_a_wrong_record(path: Path) -> None:
    """Whatever moment it reads at, the records are the first ones that were written, and at last they are all."""
    count = 600
    filled(path, 0)
    writer = subprocess.Popen(
        [sys.executable, "-c", _WRITER, str(path), str(count)], cwd=Path(__file__).parents[3]
    )
    seen = set()
    try:
        while writer.poll() is None:
            payloads = journal.read(path, LABEL).payloads
            assert payloads == expected(len(payloads))
            seen.add(len(payloads))
        assert writer.wait(timeout=60) == 0
    finally:
        if writer.poll() is None:
            writer.kill()
            writer.wait()
    assert journal.read(path, LABEL).payloads == expected(count)
    assert len(seen) > 1


# Slots that are whole, and not of this format


def forged(number: int, chained: bytes, **fields: Any) -> bytes:
    """A slot with a right hash and a wrong field."""
    values = {"magic": b"VMFJ", "version": 1, "length": 3, "sequence": number, "previous": chained} | fields
    head = journal._HEADER.pack(*values.values())
    body = (head + b"new").ljust(SLOT_BYTES - 32, b"\0")
    return body + hashlib.sha256(body).digest()


@pytest.mark.parametrize(
    "fields",
    [
        {"magic": b"VMFK"},
        {"version": 2},
        {"sequence": 3},
        {"sequence": 5},
        {"length": MAX_PAYLOAD_BYTES + 1},
        {"previous": bytes(32)},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_a_whole_slot_of_another_kind_is_no_record(three: bytes, fields: dict[str, Any]) -> None:
    """Of another format, another place or an impossible length: its hash alone makes it none of ours."""
    previous = three[4 * SLOT_BYTES - 32 : 4 * SLOT_BYTES]
    for slot, count in ((forged(4, previous), 4), (forged(4, previous, **fields), 3)):
        contents = read(three[: 4 * SLOT_BYTES] + slot + three[5 * SLOT_BYTES :])
        assert len(contents.payloads) == count
        assert contents.torn_tail == (count == 3)
    # Behind a bad slot it is nothing that makes that one damage, unless it is a slot of ours.
    contents = read(
        three[: 4 * SLOT_BYTES] + bytes(SLOT_BYTES) + forged(5, previous, **fields) + three[6 * SLOT_BYTES :]
    )
    assert ("slot 4 is bad" in contents.damage) == ("magic" not in fields)
    assert contents.damage


def test_a_label_that_rots_is_told_from_a_file_of_something_else(three: bytes) -> None:
    """Whoever has to decide hears that there are records behind it."""
    assert "slot 0 is bad" in read(bytes(SLOT_BYTES) + three[SLOT_BYTES:]).damage
    assert "no readable first slot" in read(b"something else").damage


def test_a_file_that_was_cut_is_whole_again_behind_the_next_record(path: Path, three: bytes) -> None:
    """Otherwise whoever reads it later would think that records are missing."""
    path.write_bytes(three[: 6 * SLOT_BYTES])
    assert journal.read(path, LABEL).torn_tail
    filled(path, 1, start=3)
    contents = journal.read(path, LABEL)
    assert contents.payloads == expected(4)
    assert not contents.torn_tail
