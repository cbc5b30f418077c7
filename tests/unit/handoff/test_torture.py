"""The life of a host's journals on a disk that fails or loses power at every single call.

A host's record of a machine that is born, leaves, comes back and leaves again; at each call the disk fails, or the
process is killed, and then the power may fail. What is read afterwards is what was promised, plus at most the record
that was being written; or it is unknown. Nothing is permitted that was not permitted by what is on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Final
from unittest import mock

import pytest

from tests.simulation.cluster.clock import Killed, Process, WouldBlockError
from tests.simulation.cluster.disk import HostDisk, View
from tests.unit.handoff.samples import MACHINE, attempt, record
from vmferry.errors import JournalDamagedError
from vmferry.handoff import journal
from vmferry.handoff.journal import SLOT_BYTES
from vmferry.handoff.ledger import HostLedger
from vmferry.handoff.rights import Rights
from vmferry.handoff.states import Append, RecordKind

K: Final = RecordKind
JOURNALS: Final = Path("/host/journal")
LIFE: Final = (
    *((attempt(1, epoch=1), kind) for kind in (K.BEGUN, K.SEALED, K.HANDED_OFF, K.DONE)),
    *((attempt(1, epoch=2), kind) for kind in (K.ACCEPTED, K.PREPARED, K.OWNED, K.RAN)),
    *((attempt(2, epoch=3), kind) for kind in (K.BEGUN, K.SEALED, K.ABORTED)),
    *((attempt(3, epoch=3), kind) for kind in (K.BEGUN, K.SEALED, K.HANDED_OFF)),
)
LAZY: Final = {K.SEALED, K.PREPARED, K.RAN}


@pytest.fixture(autouse=True)
def _small_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Journals that grow several times in their life, and readers that need not wait for a writer."""
    monkeypatch.setattr("vmferry.handoff.journal.SLOTS_PER_EXTENT", 4)
    monkeypatch.setattr("vmferry.handoff.journal._EXTENT_BYTES", 4 * SLOT_BYTES)
    monkeypatch.setattr("vmferry.handoff.ledger.time.sleep", lambda _: None)


class Host:
    """A disk, and a process that lives on it until something happens at a given call."""

    def __init__(self, strikes_at: int = -1, fault: str = "") -> None:
        self.disk = HostDisk()
        self.calls: list[str] = []
        self.history: list[Rights] = []
        """What was promised: after each record that was on disk."""
        self.durable = [0, 0]
        """From which entry on each journal is certain to survive, the outgoing one first."""
        self._strikes_at = strikes_at
        self._fault = fault
        self._process = Process("life", "a")

    def step(self, kind: str, name: str) -> str:
        """A call of the disk."""
        number = len(self.calls)
        self.calls.append(f"{kind} {name}")
        if number == self._strikes_at:
            if self._fault == "kill":
                self._process.alive = False
            elif self._fault == "full":
                self.disk.full = True
            else:
                return self._fault
        return ""

    def live(self) -> bool:
        """Write all records; false if something happened."""
        try:
            for _ in self._records():
                rights = self.seen()
                self.history.append(rights)
        except (JournalDamagedError, Killed):
            return False
        return True

    def _records(self) -> Iterator[None]:
        ledger = HostLedger(JOURNALS, View(self.disk, self._process, self.step))
        yield
        ledger.birth(MACHINE)
        self.durable = [1, 1]
        yield
        with (
            closing(ledger.open_source(MACHINE)) as outgoing,
            closing(ledger.open_destination(MACHINE)) as incoming,
        ):
            for about, kind in LIFE:
                durable = kind not in LAZY
                action = Append(record(kind, about), durable=durable)
                leaving = kind.value < K.ACCEPTED.value
                outgoing.append(action) if leaving else incoming.append(action)
                if durable:
                    self.durable[0 if leaving else 1] = len(self.history)
                yield

    def seen(self, how: str = "") -> Rights:
        """What another process reads."""
        view = View(self.disk, Process("reader", "a"), lambda *_: "")
        return HostLedger(JOURNALS, view).rights(MACHINE, settled=bool(how))

    def reopened(self) -> Rights:
        """What a new process finds that opens all journals to go on."""
        view = View(self.disk, Process("next", "a"), lambda *_: "")
        self.disk.full = False
        for node in self.disk.names.values():
            node.holder = None
        ledger = HostLedger(JOURNALS, view)
        for use in (ledger.open_source, ledger.open_destination):
            use(MACHINE).close()
        return ledger.rights(MACHINE, settled=True)


def whole_life() -> Host:
    host = Host()
    assert host.live()
    return host


@pytest.mark.parametrize("fault", ["eio", "full", "kill"])
@pytest.mark.parametrize("then", ["nothing", "keep", "lose", "torn"])
def test_a_failure_at_any_call_leaves_what_was_promised(
    fault: str, then: str, record_property: Callable[[str, object], None]
) -> None:
    """Whatever call fails, and whatever the power failure behind it takes: no promise is lost, none made up."""
    whole, failed = whole_life(), 0
    for number in range(len(whole.calls)):
        host = Host(number, fault)
        if host.live():
            continue  # a disk may be full without anybody needing space
        failed += 1
        if then != "nothing":
            host.disk.crash(then)
        rights = host.reopened()
        where = f"{fault} at call {number}, {whole.calls[number]}, then {then}"
        assert not rights.damaged, where
        # Each journal from the last record that was certain to the one that was under way.
        leaving, arriving = (whole.history[start : len(host.history) + 1] for start in host.durable)
        assert rights.outgoing in [promised.outgoing for promised in leaving], where
        assert rights.incoming.current in [promised.incoming.current for promised in arriving], where
        assert not rights.permitted or any(promised.permitted for promised in (*leaving, *arriving)), where
    record_property("calls that fail", failed)


def test_a_disk_that_fails_twice_is_still_not_believed() -> None:
    """A sync that failed is not made good by one that works: the next start writes again what the first one lost."""
    whole = whole_life()
    for number, call in enumerate(whole.calls):
        if not call.startswith("sync "):
            continue
        host = Host(number, "eio")
        if host.live():
            continue
        first = host.reopened()  # from now on somebody may have acted on it
        host.disk.crash("lose")
        again = host.reopened()
        assert (again.outgoing, again.incoming.current) == (first.outgoing, first.incoming.current), call


@pytest.mark.parametrize("name", ["operator", "source", "destination"])
def test_any_flipped_bit_is_noticed_by_whoever_asks(
    name: str, record_property: Callable[[str, object], None]
) -> None:
    """Of every part of a journal that holds records: nothing changes, or nobody may resume the machine."""
    host = whole_life()
    expected = host.seen()
    node = host.disk.names[JOURNALS / MACHINE / f"{name}.journal"]
    used = len(node.seen.rstrip(b"\0"))
    bits = (*range(0, used * 8, 61), *range(48 * 8))
    record_property("bits flipped", len(bits))
    for bit in bits:
        node.seen[bit // 8] ^= 1 << bit % 8
        rights = host.seen()
        node.seen[bit // 8] ^= 1 << bit % 8
        # The last record may be one that was not on disk yet, RAN here, and then looks unfinished.
        known = [promised.incoming.current for promised in host.history]
        assert rights.damaged or rights.outgoing == expected.outgoing, bit
        assert rights.damaged or rights.incoming.current in known[-9:], bit
        assert not rights.permitted, bit
    assert not host.seen().damaged


def test_every_bit_of_a_small_journal_counts(record_property: Callable[[str, object], None]) -> None:
    """In a journal of one record no bit can be flipped without a trace."""
    first = journal._encode(0, bytes(32), b"label")
    record_slot = journal._encode(1, first[-32:], b"record")
    record_property("bits flipped", 2 * SLOT_BYTES * 8)
    for slot in (0, 1):
        slots = [bytearray(first), bytearray(record_slot)]
        for bit in range(SLOT_BYTES * 8):
            slots[slot][bit // 8] ^= 1 << bit % 8
            contents = journal._read_slots(bytes(slots[0]) + bytes(slots[1]))
            slots[slot][bit // 8] ^= 1 << bit % 8
            assert len(contents.payloads) == slot, bit
            assert contents.damage if slot == 0 else contents.torn_tail, bit


def test_two_processes_on_one_directory_take_turns() -> None:
    """While one is between looking and writing, nobody else gets the machine's lock."""
    disk = HostDisk()
    one, two = (HostLedger(JOURNALS, View(disk, Process(name, "a"), lambda *_: "")) for name in "xy")
    with one.machine_lock(MACHINE), pytest.raises(WouldBlockError), two.machine_lock(MACHINE):
        pytest.fail("both have it")
    with mock.patch("vmferry.handoff.ledger.time.sleep"), two.machine_lock(MACHINE):
        pass
