"""Attempts and journals that the suites of the hand-off share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

from vmferry.handoff.states import Attempt, Record, RecordKind

MACHINE: Final = "6f1c7f5e-3b0e-4c57-9d53-2f6a6a1d8a01"
OTHER_MACHINE: Final = "0f8fad5b-d9cb-469f-a165-70867728950e"
A: Final = "spiffe://example.org/vmhost/a"
B: Final = "spiffe://example.org/vmhost/b"
C: Final = "spiffe://example.org/vmhost/c"
ADMIN: Final = "spiffe://example.org/admin/night"
INCARNATION_A: Final = "11111111-1111-4111-8111-111111111111"
INCARNATION_B: Final = "22222222-2222-4222-8222-222222222222"
DIGEST: Final = bytes(range(32))
OTHER_DIGEST: Final = bytes(32)


def attempt(
    number: int = 1, *, epoch: int = 1, source: str = A, destination: str = B, tag: int = 0
) -> Attempt:
    """Attempt ``number`` from one host to another; ``tag`` makes another one with the same number."""
    return Attempt(
        machine_id=MACHINE,
        migration_id=bytes(
            (*b"migration-", tag, epoch, number, *source[-1].encode(), *destination[-1].encode(), 0)
        ),
        number=number,
        epoch_from=epoch,
        source=source,
        destination=destination,
        source_incarnation=INCARNATION_A,
        destination_incarnation=INCARNATION_B,
    )


def record(kind: RecordKind, about: Attempt | None = None, **values: Any) -> Record:
    """A record of ``kind``, with the fields such a record has."""
    about = about or attempt()
    made = Record(kind, about.machine_id, about)
    if kind in {RecordKind.SEALED, RecordKind.HANDED_OFF, RecordKind.PREPARED, RecordKind.OWNED}:
        made = replace(made, digest=DIGEST)
    if kind is RecordKind.OWNED:
        made = replace(made, epoch=about.epoch_to)
    if kind is RecordKind.FORCED:
        made = replace(made, epoch=about.epoch_from + 2, operator=ADMIN, note="power is off")
    if kind is RecordKind.RECLAIMED:
        made = replace(made, epoch=about.epoch_from + 2)
    if kind is RecordKind.ACCEPTED:
        made = replace(made, ticket_nonce=about.migration_id, ticket_expire_unix=1)
    return replace(made, **values)


def foreign_attempts(mine: Attempt) -> list[Attempt]:
    """Attempts that are not ``mine`` although they differ in one thing only."""
    return [
        replace(mine, machine_id=OTHER_MACHINE),
        replace(mine, migration_id=bytes(16)),
        replace(mine, number=mine.number + 1),
        replace(mine, epoch_from=mine.epoch_from + 1),
        replace(mine, source=C),
        replace(mine, destination=C),
        replace(mine, source_incarnation=INCARNATION_B),
        replace(mine, destination_incarnation=INCARNATION_A),
    ]
