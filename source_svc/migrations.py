"""The ``Migration`` resource: what callers see of a migration, and the migrations this host knows.

Promise: a resource changes only through :meth:`Migration.update`, each change has a higher revision and wakes every
watcher; an ended migration never changes again.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator
from typing import Final

from source_svc.figures import Figures
from vmferry.errors import InvalidArgumentError, MigrationNotFoundError, VmferryError
from vmferry.telemetry.tracing import current_trace_id
from vmferry.v1 import migration_pb2 as pb

Phase = pb.MigrationPhase
Outcome = pb.MigrationOutcome
_DEFAULT_PAGE: Final = 50
_LARGEST_PAGE: Final = 500
_PAGE_TOKEN: Final = re.compile(r"[0-9]{0,9}")
MAX_ENDED: Final = 1000
"""Ended migrations that are remembered."""


class Migration:
    """One migration, as callers see it."""

    def __init__(self, message: pb.Migration) -> None:
        self.message = message
        self._started = time.monotonic()
        self._phase_started = self._started
        self._changed = asyncio.Condition()
        self._figures = Figures(message)
        message.create_time.GetCurrentTime()
        message.trace_id = current_trace_id()

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
        self.message.phase = phase
        timing = self.message.timings.add(phase=phase)
        timing.start_time.GetCurrentTime()
        await self.touch()

    async def end(self, outcome: Outcome.ValueType, error: VmferryError | None = None) -> None:
        """Say how it came out; nothing follows."""
        self._close_phase()
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
        async with self._changed:
            self._changed.notify_all()

    async def watch(self) -> AsyncIterator[pb.Migration]:
        """The resource now and after each change, until it has ended; a slow reader skips what is in between."""
        copy = self.snapshot()
        while True:
            yield copy
            if copy.phase == pb.MIGRATION_PHASE_ENDED:
                return
            async with self._changed:
                while self.message.revision <= copy.revision:
                    await self._changed.wait()
            copy = self.snapshot()

    def _close_phase(self) -> None:
        now = time.monotonic()
        if self.message.timings:
            self.message.timings[-1].elapsed.FromNanoseconds(int((now - self._phase_started) * 1e9))
            self._figures.left(self.message.timings[-1].phase, now - self._phase_started)
        self._phase_started = now


class Migrations:
    """All migrations of this host, newest first."""

    def __init__(self) -> None:
        self._by_id: dict[str, Migration] = {}
        self._by_request: dict[str, Migration] = {}

    def add(self, migration: Migration, request_id: str = "") -> None:
        """Remember a migration."""
        self._by_id[migration.id] = migration
        if request_id:
            self._by_request[request_id] = migration
        ended = [other.id for other in self._by_id.values() if other.ended]
        for old in ended[: max(0, len(ended) - MAX_ENDED)]:
            gone = self._by_id.pop(old)
            self._by_request = {key: value for key, value in self._by_request.items() if value is not gone}

    def get(self, migration_id: str) -> Migration:
        """The migration of this id.

        Raises:
            MigrationNotFoundError: there is none.
        """
        try:
            return self._by_id[migration_id]
        except KeyError:
            raise MigrationNotFoundError(
                f"no migration {migration_id!r} on this host", id=migration_id
            ) from None

    def known(self, migration_id: str) -> bool:
        """Whether there is a migration of this id, ended or not."""
        return migration_id in self._by_id

    def of_request(self, request_id: str) -> Migration | None:
        """The migration that was started by this request, if any."""
        return self._by_request.get(request_id)

    def open_of(self, machine_id: str) -> Migration | None:
        """The machine's open migration, if any."""
        found = (
            one for one in self._by_id.values() if one.message.machine_id == machine_id and not one.ended
        )
        return next(found, None)

    def is_busy(self, machine_id: str) -> bool:
        """Whether the machine has an open migration."""
        return self.open_of(machine_id) is not None

    def open(self) -> list[Migration]:
        """All migrations that have not ended."""
        return [migration for migration in self._by_id.values() if not migration.ended]

    def select(self, *, machine: str, open_only: bool) -> list[Migration]:
        """Migrations that match, newest first."""
        return [
            migration
            for migration in reversed(self._by_id.values())
            if machine in ("", migration.message.machine, migration.message.machine_id)
            and not (open_only and migration.ended)
        ]


def page_bounds(page_size: int, page_token: str, total: int) -> tuple[int, int, str]:
    """Start and end of a page in a list, and the token of the next one.

    Raises:
        InvalidArgumentError: the size is negative or the token is not one of ours.
    """
    if page_size < 0:
        raise InvalidArgumentError("page_size must not be negative", field="page_size")
    if not _PAGE_TOKEN.fullmatch(page_token):
        raise InvalidArgumentError("the token is not one of this service's", field="page_token")
    start = min(int(page_token or "0"), total)
    end = min(start + min(page_size or _DEFAULT_PAGE, _LARGEST_PAGE), total)
    return start, end, str(end) if end < total else ""
