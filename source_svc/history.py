"""What this host remembers of its migrations: those that ended, and those that were accepted and have not.

Promise: it is memory, not truth. What became of an attempt is said by the journals; a row that was never written, or
was lost, costs an answer to "what was that?" and nothing else. One row for each migration, written when it is
accepted (with the ticket to begin it after a restart), when it begins (from then on without), when it begins to copy,
and when it has ended. Rows of ended migrations are removed by age and by count.

For readers (lists, the web page, figures)::

    await history.get(migration_id)             # the Migration resource as it ended, or None
    await history.select(Filter(...), limit=50) # newest first; before=key_of(last one) for the next page
    await history.count_outcomes()              # {(outcome, reason): count} of all that is remembered
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from source_svc.store import Store
from vmferry.v1 import migration_pb2 as pb

SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS migrations (
    id TEXT PRIMARY KEY,
    request_id TEXT,
    machine TEXT NOT NULL,
    machine_id TEXT NOT NULL,
    destination TEXT NOT NULL,
    phase INTEGER NOT NULL,
    outcome INTEGER NOT NULL,
    reason TEXT NOT NULL,
    create_ns INTEGER NOT NULL,
    end_ns INTEGER,
    message BLOB NOT NULL,
    ticket BLOB,
    traceparent TEXT NOT NULL
);
CREATE UNIQUE INDEX IF NOT EXISTS migrations_by_request ON migrations (request_id) WHERE request_id IS NOT NULL;
CREATE INDEX IF NOT EXISTS migrations_by_age ON migrations (create_ns DESC, id DESC);
CREATE TABLE IF NOT EXISTS starts (number INTEGER NOT NULL);
"""
_DAY_NS: Final = 24 * 3600 * 10**9
_COLUMNS: Final = (
    "id, request_id, machine, machine_id, destination, phase, outcome, reason, create_ns, end_ns, message, "
    "ticket, traceparent"
)
Key: TypeAlias = tuple[int, str]
"""Where a migration stands in a list: when it was accepted, in ns, and its id."""


@dataclass(frozen=True)
class Remembered:
    """A migration that had not ended when it was last written."""

    message: pb.Migration
    ticket: bytes
    """To begin it with; empty once it has begun."""
    traceparent: str
    """Of whoever asked for it."""


@dataclass(frozen=True)
class Filter:
    """Which migrations are meant; what is empty or None leaves all."""

    machine: str = ""
    """Name or UUID."""
    destination: str = ""
    phases: Sequence[int] = ()
    outcomes: Sequence[int] = ()
    open_only: bool = False
    since_ns: int | None = None
    before_ns: int | None = None

    def matches(self, migration: pb.Migration) -> bool:
        """Whether a migration is one of them."""
        created_ns = key_of(migration)[0]
        return (
            self.machine in ("", migration.machine, migration.machine_id)
            and self.destination in ("", migration.destination.host)
            and (not self.phases or migration.phase in self.phases)
            and (not self.outcomes or migration.outcome in self.outcomes)
            and not (self.open_only and migration.phase == pb.MIGRATION_PHASE_ENDED)
            and (self.since_ns is None or created_ns >= self.since_ns)
            and (self.before_ns is None or created_ns < self.before_ns)
        )

    @property
    def wants_ended(self) -> bool:
        """Whether an ended migration can be one of them."""
        return not self.open_only and (not self.phases or pb.MIGRATION_PHASE_ENDED in self.phases)


ALL: Final = Filter()


def key_of(migration: pb.Migration) -> Key:
    """Where it stands in a list; this never changes."""
    return (migration.create_time.ToNanoseconds(), migration.id)


class History:
    """The table of migrations."""

    def __init__(self, store: Store, *, max_age_days: float, max_count: int) -> None:
        self._store = store
        self._max_age_ns = int(max_age_days * _DAY_NS)
        self._max_count = max_count

    async def count_start(self) -> int:
        """A number that is higher than at every earlier start of the service, as far as anybody remembers."""
        now = int(time.time())

        def count(db: sqlite3.Connection) -> int:
            (last,) = db.execute("SELECT max(number) FROM starts").fetchone()
            number = max(now, (last or 0) + 1)
            db.execute("DELETE FROM starts")
            db.execute("INSERT INTO starts VALUES (?)", (number,))
            return number

        return await self._store.ask(count, otherwise=now)

    async def save(
        self, message: pb.Migration, *, request_id: str = "", ticket: bytes = b"", traceparent: str = ""
    ) -> bool:
        """Write a migration as it is now; returns whether that is on disk."""
        values = {
            "id": message.id,
            "request_id": request_id or message.request_id or None,
            "machine": message.machine,
            "machine_id": message.machine_id,
            "destination": message.destination.host,
            "phase": message.phase,
            "outcome": message.outcome,
            "reason": message.reason.reason,
            "create_ns": key_of(message)[0],
            "end_ns": message.end_time.ToNanoseconds() if message.HasField("end_time") else None,
            "message": message.SerializeToString(),
            "ticket": ticket or None,
            "traceparent": traceparent,
        }
        ended = message.phase == pb.MIGRATION_PHASE_ENDED

        def write(db: sqlite3.Connection) -> None:
            marks = ", ".join(f":{name.strip()}" for name in _COLUMNS.split(","))
            kept = "ticket = NULL" if ended else "ticket = coalesce(excluded.ticket, ticket)"
            db.execute(
                f"INSERT INTO migrations ({_COLUMNS}) VALUES ({marks}) ON CONFLICT (id) DO UPDATE SET "  # noqa: S608 - constants
                f"phase = excluded.phase, outcome = excluded.outcome, reason = excluded.reason, "
                f"end_ns = excluded.end_ns, message = excluded.message, {kept}",
                values,
            )
            if ended:
                self._prune(db)

        return await self._store.tell(write)

    async def begun(self, migration_id: str) -> None:
        """Note that a migration has left the queue, so that a restart does not begin it a second time."""
        await self._store.tell(
            lambda db: db.execute("UPDATE migrations SET ticket = NULL WHERE id = ?", (migration_id,))
        )

    async def prune(self) -> None:
        """Remove what is too old or too much."""
        await self._store.tell(self._prune)

    async def get(self, migration_id: str) -> pb.Migration | None:
        """The migration as it was last written."""
        return await self._one("id = ?", migration_id)

    async def of_request(self, request_id: str) -> pb.Migration | None:
        """The migration that this request was answered with."""
        return await self._one("request_id = ?", request_id)

    async def select(self, wanted: Filter, *, before: Key | None = None, limit: int) -> list[pb.Migration]:
        """Ended migrations, newest first, at most so many; only those behind ``before`` in that order."""
        if not wanted.wants_ended:
            return []
        conditions, values = _conditions(wanted, before)
        query = (
            f"SELECT message FROM migrations WHERE {' AND '.join(conditions)} "  # noqa: S608 - constants
            "ORDER BY create_ns DESC, id DESC LIMIT ?"
        )
        rows = await self._store.ask(
            lambda db: db.execute(query, (*values, limit)).fetchall(), otherwise=list[Any]()
        )
        return [pb.Migration.FromString(data) for (data,) in rows]

    async def unfinished(self) -> list[Remembered]:
        """What had not ended when it was last written, in the order of acceptance."""
        rows = await self._store.ask(
            lambda db: db.execute(
                "SELECT message, ticket, traceparent FROM migrations WHERE phase != ? ORDER BY create_ns, id",
                (pb.MIGRATION_PHASE_ENDED,),
            ).fetchall(),
            otherwise=list[Any](),
        )
        return [
            Remembered(pb.Migration.FromString(data), ticket or b"", parent) for data, ticket, parent in rows
        ]

    async def count_outcomes(self) -> dict[tuple[int, str], int]:
        """How many of those remembered came out how: by outcome and reason."""
        rows = await self._store.ask(
            lambda db: db.execute(
                "SELECT outcome, reason, count(*) FROM migrations WHERE phase = ? GROUP BY outcome, reason",
                (pb.MIGRATION_PHASE_ENDED,),
            ).fetchall(),
            otherwise=list[Any](),
        )
        return {(outcome, reason): count for outcome, reason, count in rows}

    async def _one(self, condition: str, value: str) -> pb.Migration | None:
        query = f"SELECT message FROM migrations WHERE {condition}"  # noqa: S608 - constants
        row = await self._store.ask(lambda db: db.execute(query, (value,)).fetchone(), otherwise=None)
        return pb.Migration.FromString(row[0]) if row is not None else None

    def _prune(self, db: sqlite3.Connection) -> None:
        ended = pb.MIGRATION_PHASE_ENDED
        db.execute(
            "DELETE FROM migrations WHERE phase = ? AND end_ns < ?",
            (ended, time.time_ns() - self._max_age_ns),
        )
        db.execute(
            "DELETE FROM migrations WHERE phase = :ended AND id NOT IN "
            "(SELECT id FROM migrations WHERE phase = :ended ORDER BY create_ns DESC, id DESC LIMIT :count)",
            {"ended": ended, "count": self._max_count},
        )


def _conditions(wanted: Filter, before: Key | None) -> tuple[list[str], list[object]]:
    conditions, values = ["phase = ?"], list[object]([pb.MIGRATION_PHASE_ENDED])
    if wanted.machine:
        conditions.append("(machine = ? OR machine_id = ?)")
        values += [wanted.machine, wanted.machine]
    if wanted.destination:
        conditions.append("destination = ?")
        values.append(wanted.destination)
    if wanted.outcomes:
        conditions.append(f"outcome IN ({', '.join('?' * len(wanted.outcomes))})")
        values += wanted.outcomes
    if wanted.since_ns is not None:
        conditions.append("create_ns >= ?")
        values.append(wanted.since_ns)
    if wanted.before_ns is not None:
        conditions.append("create_ns < ?")
        values.append(wanted.before_ns)
    if before is not None:
        conditions.append("(create_ns, id) < (?, ?)")
        values += before
    return conditions, values
