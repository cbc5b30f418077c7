"""The source service's own methods, called by the host itself: what empties it goes the way that every caller goes.

Promise: the same checks, the same queue and the same journals as for a caller from outside; the caller noted is this
host, and only for it a ticket made out by warrant counts.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any, Final, cast

from vmferry.rpc.interceptors import acting_as
from vmferry.security.identity import Identity
from vmferry.v1 import migration_pb2 as pb
from vmferry.v1.compatibility_pb2 import CompatibilityReport
from vmferry.v1.machine_pb2 import Machine

if TYPE_CHECKING:
    from source_svc.service import SourceService

_PAGE: Final = 500
_NOBODY: Final = cast("Any", None)
"""There is no call of gRPC behind it; no method of the service looks at its context."""


class Inside:
    """The source service as this host uses it."""

    def __init__(self, service: SourceService, own: Identity) -> None:
        self._service = service
        self._own = own

    async def machines(self) -> list[Machine]:
        """All machines of this host, and blocked ones of which only journals are left."""
        found: list[Machine] = []
        request = pb.ListMachinesRequest(page_size=_PAGE)
        while True:
            with acting_as(self._own):
                answer = await self._service.ListMachines(request, _NOBODY)
            found += answer.machines
            if not answer.next_page_token:
                return found
            request.page_token = answer.next_page_token

    async def plan(
        self, machine_id: str, destination: pb.Destination, options: pb.MigrationOptions, *, predict: bool
    ) -> CompatibilityReport:
        """Whether a machine could go to a host."""
        request = pb.PlanMigrationRequest(
            machine=machine_id, destination=destination, options=options, without_prediction=not predict
        )
        with acting_as(self._own):
            return (await self._service.PlanMigration(request, _NOBODY)).report

    async def start(
        self, machine_id: str, destination: pb.Destination, ticket: bytes, options: pb.MigrationOptions
    ) -> pb.Migration:
        """Start a migration by a ticket that was made out by warrant."""
        request = pb.StartMigrationRequest(
            machine=machine_id,
            destination=destination,
            request_id=str(uuid.uuid4()),
            ticket=ticket,
            options=options,
        )
        with acting_as(self._own):
            return (await self._service.StartMigration(request, _NOBODY)).migration

    async def watch(self, migration_id: str) -> AsyncIterator[pb.Migration]:
        """A migration now and after each change, until it has ended."""
        async for answer in self._service.WatchMigration(pb.WatchMigrationRequest(id=migration_id), _NOBODY):
            yield answer.migration

    async def cancel_if_waiting(self, migration_id: str) -> None:
        """Take a migration back that this host ordered and that waits in the queue; one that has begun goes on."""
        answer = await self._service.GetMigration(pb.GetMigrationRequest(id=migration_id), _NOBODY)
        if self.may_take_back(answer.migration):
            with acting_as(self._own):
                await self._service.CancelMigration(pb.CancelMigrationRequest(id=migration_id), _NOBODY)

    def may_take_back(self, migration: pb.Migration) -> bool:
        """Whether nobody but this host wants it, and it has not begun, or has come back to the queue."""
        return migration.phase == pb.MIGRATION_PHASE_QUEUED and migration.caller == self._own.uri
