"""The ``Migration`` resource: what callers see of a migration, and the migrations this host knows.

Promise: a resource changes only through its methods, each change has a higher revision, also than those of earlier
runs of the service, and wakes every watcher; an ended migration never changes again. What has ended is handed to the
history, and tried again if that could not take it; nobody waits for that.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Final

from source_svc.figures import Figures
from source_svc.history import Filter, History
from vmferry.errors import MigrationNotFoundError, VmferryError
from vmferry.telemetry.tracing import current_trace_id
from vmferry.v1 import migration_pb2 as pb

Phase = pb.MigrationPhase
Outcome = pb.MigrationOutcome
MAX_ENDED: Final = 1000
"""Ended migrations that are held in memory; the history remembers more."""
_REVISIONS_BITS: Final = 20
"""Of one run of the service; above them stands the number of the start. Both fit what JavaScript can count."""


class Migration:
    """One migration, as callers see it."""

    def __init__(self, message: pb.Migration) -> None:
        self.message = message
        self.on_change: Callable[[Migration], None] = lambda _: None
        """Told of every change, right after it."""
        self.copying_saved = False
        if not message.HasField("create_time"):
            message.create_time.GetCurrentTime()
        if not message.trace_id and not self.ended:
            message.trace_id = current_trace_id()
        age_ns = time.time_ns() - message.create_time.ToNanoseconds()
        self._started = time.monotonic() - max(0, age_ns) / 1e9
        self._phase_started = time.monotonic()
        if message.timings:
            in_phase_ns = time.time_ns() - message.timings[-1].start_time.ToNanoseconds()
            self._phase_started -= max(0, in_phase_ns) / 1e9
        self._changed = asyncio.Condition()
        self._figures = Figures(message)

    @property
    def id(self) -> str:
        """Its identity."""
        return self.message.id

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen."""
        return self.message.phase == pb.MIGRATION_PHASE_ENDED

    def snapshot(self) -> pb.Migration:
        """A copy of the resource as it is now."""
        copy = pb.Migration()
        copy.CopyFrom(self.message)
        if not self.ended:
            copy.total.FromNanoseconds(int((time.monotonic() - self._started) * 1e9))
            if copy.timings:
                copy.timings[-1].elapsed.FromNanoseconds(int((time.monotonic() - self._phase_started) * 1e9))
        return copy

    async def enter(self, phase: Phase.ValueType) -> None:
        """Go on to the next phase."""
        self._close_phase()
        self.message.ClearField("queue")
        self.message.phase = phase
        timing = self.message.timings.add(phase=phase)
        timing.start_time.GetCurrentTime()
        await self.touch()

    async def queue(self, state: pb.QueueState) -> None:
        """Wait in the queue; a try that found no room counts as waiting."""
        timings = self.message.timings
        if not timings or timings[-1].phase != pb.MIGRATION_PHASE_QUEUED:
            began = timings[0].start_time if timings else self.message.create_time
            timing = pb.PhaseTiming(phase=pb.MIGRATION_PHASE_QUEUED, start_time=began)
            del timings[:]
            timings.append(timing)
            self.message.ClearField("progress")
            self.message.phase = pb.MIGRATION_PHASE_QUEUED
            waited_ns = max(0, time.time_ns() - began.ToNanoseconds())
            self._phase_started = time.monotonic() - waited_ns / 1e9
        self.message.queue.CopyFrom(state)
        await self.touch()

    async def end(self, outcome: Outcome.ValueType, error: VmferryError | None = None) -> None:
        """Say how it came out; nothing follows."""
        self._close_phase()
        self.message.ClearField("queue")
        self.message.phase = pb.MIGRATION_PHASE_ENDED
        self.message.end_time.GetCurrentTime()
        self.message.total.FromNanoseconds(int((time.monotonic() - self._started) * 1e9))
        await self.report(outcome, error)
        self._figures.ended()

    async def report(self, outcome: Outcome.ValueType, error: VmferryError | None = None) -> None:
        """Say how it stands, and why."""
        self.message.outcome = outcome
        self.message.ClearField("reason")
        if error is not None:
            self.message.reason.CopyFrom(
                pb.MigrationReason(reason=error.reason, message=error.message, remedy=error.instance_remedy)
            )
        await self.touch()

    async def touch(self) -> None:
        """Tell watchers that something changed."""
        self._figures.changed()
        self.message.revision += 1
        self.on_change(self)
        async with self._changed:
            self._changed.notify_all()

    async def watch(self, seen: int | None = None) -> AsyncIterator[pb.Migration]:
        """The resource now and after each change, until it has ended; a slow reader skips what is in between.

        Args:
            seen: the revision that the watcher knows already.
        """
        while True:
            async with self._changed:
                while self.message.revision == seen and not self.ended:
                    await self._changed.wait()
            if self.message.revision == seen:
                return
            copy = self.snapshot()
            seen = copy.revision
            yield copy
            if copy.phase == pb.MIGRATION_PHASE_ENDED:
                return

    def _close_phase(self) -> None:
        now = time.monotonic()
        if self.message.timings:
            self.message.timings[-1].elapsed.FromNanoseconds(int((now - self._phase_started) * 1e9))
            self._figures.left(self.message.timings[-1].phase, now - self._phase_started)
        self._phase_started = now


class Migrations:
    """All migrations of this host."""

    def __init__(self, history: History) -> None:
        self._history = history
        self._by_id: dict[str, Migration] = {}
        self._by_request: dict[str, Migration] = {}
        self._first_revision = 0
        self._saving: set[asyncio.Task[None]] = set()
        self._unsaved: dict[str, Migration] = {}

    def started(self, number: int) -> None:
        """This is the run of the service that has this number: revisions are higher than in earlier ones."""
        self._first_revision = number << _REVISIONS_BITS

    def add(self, migration: Migration) -> None:
        """Know a migration from now on."""
        migration.message.revision = max(migration.message.revision, self._first_revision)
        migration.on_change = self._changed
        self._by_id[migration.id] = migration
        if migration.message.request_id:
            self._by_request[migration.message.request_id] = migration
        ended = [other.id for other in self._by_id.values() if other.ended]
        for old in ended[: max(0, len(ended) - MAX_ENDED)]:
            gone = self._by_id.pop(old)
            self._by_request.pop(gone.message.request_id, None)

    async def remember(self, migration: Migration, *, ticket: bytes = b"", traceparent: str = "") -> None:
        """Have what is asked of a migration that waits known after a restart, too."""
        await self._history.save(migration.snapshot(), ticket=ticket, traceparent=traceparent)

    async def begun(self, migration: Migration) -> None:
        """Have it known that a migration has left the queue."""
        await self._history.begun(migration.id)

    async def find(self, migration_id: str) -> Migration:
        """The migration of this id, ended ones of the history included.

        Raises:
            MigrationNotFoundError: there is none.
        """
        known = self._by_id.get(migration_id)
        if known is None and (message := await self._history.get(migration_id)) is not None:
            # While that was read, the migration may have come to be known here.
            known = self._by_id.get(migration_id) or Migration(message)
        if known is None:
            raise MigrationNotFoundError(f"no migration {migration_id!r} on this host", id=migration_id)
        return known

    async def of_request(self, request_id: str) -> Migration | None:
        """The migration that was accepted for this request, if any, also before a restart."""
        known = self._by_request.get(request_id)
        if known is None and (message := await self._history.of_request(request_id)) is not None:
            known = self._by_id.get(message.id) or Migration(message)
        return known

    async def known(self, migration_id: str) -> bool:
        """Whether there is, or was, a migration of this id."""
        return migration_id in self._by_id or await self._history.get(migration_id) is not None

    def open_of(self, machine_id: str) -> Migration | None:
        """The machine's open migration, if any; it may wait in the queue."""
        found = (
            one for one in self._by_id.values() if one.message.machine_id == machine_id and not one.ended
        )
        return next(found, None)

    def open(self) -> list[Migration]:
        """All migrations that have not ended."""
        return [migration for migration in self._by_id.values() if not migration.ended]

    def select(self, wanted: Filter) -> list[pb.Migration]:
        """Those in memory that match, in no order."""
        return [one.snapshot() for one in self._by_id.values() if wanted.matches(one.message)]

    async def flush(self) -> None:
        """Return when everything that has ended was offered to the history."""
        while self._saving:
            await asyncio.gather(*self._saving)

    def _changed(self, migration: Migration) -> None:
        if migration.ended:
            self._unsaved[migration.id] = migration
        begins_to_copy = (
            migration.message.phase == pb.MIGRATION_PHASE_PRECOPYING and not migration.copying_saved
        )
        if migration.ended or begins_to_copy:  # by then it is known what was predicted and agreed
            migration.copying_saved = True
            task = asyncio.create_task(self._save(migration), name=f"save-{migration.id}")
            self._saving.add(task)
            task.add_done_callback(self._saving.discard)

    async def _save(self, migration: Migration) -> None:
        if not migration.ended:
            await self._history.save(migration.snapshot())
            return
        for one in list(self._unsaved.values()):  # the disk may have had no room for earlier ones
            if not await self._history.save(one.snapshot()):
                break
            self._unsaved.pop(one.id, None)
        while len(self._unsaved) > MAX_ENDED:
            self._unsaved.pop(next(iter(self._unsaved)))
