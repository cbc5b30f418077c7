"""Journals and their register, as the suites of both share them."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Final

import pytest

from tests.unit.handoff.samples import MACHINE, attempt, record
from vmferry.errors import JournalDamagedError, MachineExistsError
from vmferry.handoff.ledger import HostLedger, Role
from vmferry.handoff.register import Mark
from vmferry.handoff.rights import Standing
from vmferry.handoff.states import Append, Record, RecordKind, Update

K: Final = RecordKind
AWAY: Final = attempt(1, epoch=1)
BACK: Final = attempt(1, epoch=2)
NAME: Final = f"{MACHINE}/source"


def mark(slots: int) -> Mark:
    return Mark(slots, bytes([slots]) * 32)


def travelled(directory: Path) -> HostLedger:
    """A machine was born here, handed off, came back, and is on its way out again."""
    made = HostLedger(directory)
    made.birth(MACHINE)
    with closing(made.open_source(MACHINE)) as log:
        for kind in (K.BEGUN, K.SEALED, K.HANDED_OFF, K.DONE):
            log.append(Append(record(kind, AWAY), durable=kind is not K.SEALED))
    with closing(made.open_destination(MACHINE)) as log:
        for kind in (K.ACCEPTED, K.PREPARED, K.OWNED):
            log.append(Append(record(kind, BACK), durable=kind is not K.PREPARED))
    with closing(made.open_update(MACHINE)) as log:
        for kind in (K.UPDATE_BEGUN, K.UPDATE_UNDONE):
            log.append(Append(Record(kind, MACHINE, update=Update(MACHINE, bytes(16), 1))))
    return made


def file_of(ledger: HostLedger, role: Role) -> Path:
    return ledger.directory / MACHINE / f"{role}.journal"


def is_unknown(ledger: HostLedger) -> None:
    """Nobody may resume the machine or write about it, now or after a restart, and it is still listed."""
    for one in (ledger, HostLedger(ledger.directory)):
        assert one.rights(MACHINE).standing is Standing.UNKNOWN
        assert MACHINE in one.machines()
        with pytest.raises(JournalDamagedError):
            one.permit(MACHINE)
        with pytest.raises(JournalDamagedError):
            one.end(MACHINE)
        with pytest.raises(MachineExistsError):
            one.birth(MACHINE)
