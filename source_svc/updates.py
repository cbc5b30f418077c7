"""The ``Update`` resource: what callers see of an update in place, and the updates that this service knows.

Promise: each change has a higher revision and wakes every watcher; an ended update never changes again; the same
request never starts a second one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Final

from vmferry.errors import UpdateNotFoundError, VmferryError
from vmferry.telemetry.tracing import current_trace_id
from vmferry.v1 import migration_pb2
from vmferry.v1 import update_pb2 as pb

MAX_ENDED: Final = 200
"""Ended updates that are remembered."""


class UpdateResource:
    """One update, as callers see it."""

    def __init__(self, message: pb.Update) -> None:
        self.message = message
        self._changed = asyncio.Condition()
        message.create_time.GetCurrentTime()
        message.trace_id = current_trace_id()

    @property
    def id(self) -> str:
        """Its identity."""
        return self.message.id

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen."""
        return self.message.phase == pb.UPDATE_PHASE_ENDED

    def snapshot(self) -> pb.Update:
        """A copy of the resource as it is now."""
        copy = pb.Update()
        copy.CopyFrom(self.message)
        return copy

    async def enter(self, phase: pb.UpdatePhase.ValueType) -> None:
        """Go on to the next phase."""
        self.message.phase = phase
        await self._touch()

    async def end(self, outcome: pb.UpdateOutcome.ValueType, error: VmferryError | None = None) -> None:
        """Say how it came out; nothing follows."""
        self.message.outcome = outcome
        self.message.end_time.GetCurrentTime()
        if error is not None:
            self.message.reason.CopyFrom(
                migration_pb2.MigrationReason(
                    reason=error.reason, message=error.message, remedy=error.instance_remedy
                )
            )
        await self.enter(pb.UPDATE_PHASE_ENDED)

    async def _touch(self) -> None:
        self.message.revision += 1
        async with self._changed:
            self._changed.notify_all()

    async def watch(self) -> AsyncIterator[pb.Update]:
        """The resource now and after each change, until it has ended; a slow reader skips what is in between."""
        copy = self.snapshot()
        while True:
            yield copy
            if copy.phase == pb.UPDATE_PHASE_ENDED:
                return
            async with self._changed:
                while self.message.revision <= copy.revision:
                    await self._changed.wait()
            copy = self.snapshot()


class Updates:
    """All updates that this process knows."""

    def __init__(self) -> None:
        self._by_id: dict[str, UpdateResource] = {}
        self._by_request: dict[str, str] = {}

    def add(self, update: UpdateResource, request_id: str = "") -> None:
        """Remember an update, and forget old ones."""
        self._by_id[update.id] = update
        if request_id:
            self._by_request[request_id] = update.id
        for old in [one for one in self._by_id.values() if one.ended][:-MAX_ENDED]:
            del self._by_id[old.id]
            self._by_request = {key: value for key, value in self._by_request.items() if value != old.id}

    def get(self, update_id: str) -> UpdateResource:
        """One update.

        Raises:
            UpdateNotFoundError: this process knows none of that identity.
        """
        if update_id not in self._by_id:
            raise UpdateNotFoundError(f"no update {update_id!r} is known here", update=update_id)
        return self._by_id[update_id]

    def of_request(self, request_id: str) -> UpdateResource | None:
        """The update that a request has started before."""
        return self._by_id.get(self._by_request.get(request_id, ""))

    def open_of(self, machine_id: str) -> UpdateResource | None:
        """The open update of a machine."""
        open_ones = (one for one in self._by_id.values() if not one.ended)
        return next((one for one in open_ones if one.message.machine_id == machine_id), None)
