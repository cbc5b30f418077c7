"""The source service's memory on disk: one SQLite file, ``state_dir/source.sqlite3``, and the thread that owns it.

Promise: it is only memory. No hand-off, no start of the service and no call depends on it: a file that is damaged, or
of a later release, is set aside under another name and a new one is begun; a disk that is full, read-only or stands
still costs what could not be remembered, and is said in the log. What decides about a machine is in the journals.

For whoever keeps something here (``history``, the draining of a host)::

    SCHEMA = "CREATE TABLE IF NOT EXISTS ..."         # given to Store(); every statement must be repeatable
    store = Store(path, (SCHEMA, ...))
    await store.open()                                # never raises
    saved = await store.tell(lambda db: db.execute("INSERT ..."))            # one transaction; False: not remembered
    found = await store.ask(lambda db: db.execute("SELECT ...").fetchall(), otherwise=[])

``work`` runs in the store's own thread, one piece after another in the order of the calls, and must touch nothing but
the connection. Tables belong to the module that made them. A table that must change gets a new name, or a column that
may be absent: files of earlier releases are read, and :data:`VERSION` grows only when an older release could not use
the file any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from pathlib import Path
from typing import Any, Final, TypeAlias, TypeVar

from vmferry.telemetry.logs import get_logger

_LOG: Final = get_logger(__name__)
VERSION: Final = 1
_PATIENCE_S: Final = 5.0
"""A call goes on without the disk after so long."""
_BUSY_S: Final = 1.0
"""How long somebody else's lock on the file is waited for."""
_DAMAGE: Final = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}

Result = TypeVar("Result")
Work: TypeAlias = Callable[[sqlite3.Connection], Result]


class _OfLaterReleaseError(sqlite3.DatabaseError):
    """A later release wrote the file, in a way that this one does not know."""


class Store:
    """The file, and the thread that reads and writes it."""

    def __init__(self, path: Path, schemas: Sequence[str], *, patience_s: float = _PATIENCE_S) -> None:
        self._path = path
        self._schemas = schemas
        self._patience_s = patience_s
        self._todo: queue.SimpleQueue[tuple[Work[Any], Future[Any]] | None] = queue.SimpleQueue()
        self._connection: sqlite3.Connection | None = None
        # A daemon: a disk that stands still must not keep the process from ending.
        self._thread = threading.Thread(target=self._work, name="store", daemon=True)
        self._thread.start()

    async def open(self) -> None:
        """Open the file, or begin a new one; if neither works, nothing is remembered until the next start."""
        await self.tell(lambda _: None)

    async def tell(self, work: Work[object]) -> bool:
        """Do ``work`` in a transaction; returns whether it is on disk."""

        def in_transaction(connection: sqlite3.Connection) -> bool:
            connection.execute("BEGIN IMMEDIATE")
            try:
                work(connection)
                connection.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    connection.execute("ROLLBACK")
                raise
            return True

        return await self.ask(in_transaction, otherwise=False)

    async def ask(self, work: Work[Result], otherwise: Result) -> Result:
        """What ``work`` finds, or ``otherwise`` if the file cannot be asked."""
        future: Future[Result] = Future()
        self._todo.put((work, future))
        try:
            async with asyncio.timeout(self._patience_s):
                return await asyncio.wrap_future(future)
        except TimeoutError:
            _LOG.error("the history does not answer", path=str(self._path), seconds=self._patience_s)
        except (sqlite3.Error, OSError) as error:
            _LOG.error("the history cannot be used", path=str(self._path), detail=str(error))
        return otherwise

    async def close(self) -> None:
        """Finish what is being written, and let go of the file."""
        self._todo.put(None)
        await asyncio.to_thread(self._thread.join, self._patience_s)

    # In the thread

    def _work(self) -> None:
        while (item := self._todo.get()) is not None:
            work, future = item
            if not future.set_running_or_notify_cancel():
                continue
            try:
                result = self._done(work)
            except BaseException as error:  # noqa: BLE001 - it belongs to whoever asked
                self._answer(future.set_exception, error)
            else:
                self._answer(future.set_result, result)
        if self._connection is not None:
            self._connection.close()

    @staticmethod
    def _answer(give: Callable[[Any], None], answer: object) -> None:
        with contextlib.suppress(InvalidStateError):  # nobody waits any more
            give(answer)

    def _done(self, work: Work[Result]) -> Result:
        try:
            return work(self._opened())
        except sqlite3.DatabaseError as error:
            if not _is_damage(error):
                raise
            self._set_aside(error)
            return work(self._opened())

    def _opened(self) -> sqlite3.Connection:
        if self._connection is None:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._path.touch(mode=0o600)
            connection = sqlite3.connect(self._path, timeout=_BUSY_S, isolation_level=None)
            try:
                self._prepare(connection)
            except BaseException:
                connection.close()
                raise
            self._connection = connection
        return self._connection

    def _prepare(self, connection: sqlite3.Connection) -> None:
        (found,) = connection.execute("PRAGMA user_version").fetchone()
        if found > VERSION:
            raise _OfLaterReleaseError(f"the file is of version {found}; this release knows {VERSION}")
        if (answer := connection.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
            error = sqlite3.DatabaseError(answer)
            error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
            raise error
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        for schema in self._schemas:
            connection.executescript(schema)
        connection.execute(f"PRAGMA user_version = {VERSION}")

    def _set_aside(self, error: sqlite3.Error) -> None:
        if self._connection is not None:
            with contextlib.suppress(sqlite3.Error):
                self._connection.close()
            self._connection = None
        aside = self._path.with_name(f"{self._path.name}.damaged-{time.time_ns()}")
        for suffix in ("", "-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                self._path.with_name(self._path.name + suffix).rename(aside.with_name(aside.name + suffix))
        _LOG.error(
            "the history is damaged and was set aside; a new one is begun", kept=str(aside), detail=str(error)
        )


def _is_damage(error: sqlite3.Error) -> bool:
    code = (
        getattr(error, "sqlite_errorcode", 0) & 0xFF
    )  # extended codes have the plain one in their last byte
    return isinstance(error, _OfLaterReleaseError) or code in _DAMAGE
