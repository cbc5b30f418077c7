"""One host's source service, as a scheduler calls it.

Promise: it is mutually authenticated and goes to the host that was named or to none; whatever goes wrong is an error
of vmferry's catalogue; a call is repeated only where a second one cannot do what the first has not: questions, and
what carries a request id or sets an absolute value. A machine is never moved twice because an answer was lost.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from datetime import datetime, timedelta
from typing import Final

from vmferry.client.draining import DrainCalls, new_request_id
from vmferry.client.places import Target
from vmferry.client.updating import UpdateCalls
from vmferry.client.watching import AWAY, PATIENCE, Patience, Watched, watch
from vmferry.errors import (
    MachineNotFoundError,
    PeerUnreachableError,
    TimedOutError,
    WrongPhaseError,
)
from vmferry.security.identity import Identity
from vmferry.security.tickets import MAX_VALID_S, TicketSigner
from vmferry.v1 import migration_pb2 as pb
from vmferry.v1.compatibility_pb2 import CompatibilityReport
from vmferry.v1.machine_pb2 import Machine

_MIB: Final = 1024 * 1024
_PAGE: Final = 500
"""The most that a page of a list may hold."""


class SourceClient(DrainCalls, UpdateCalls):
    """An open connection to a source service; made by :meth:`open`."""

    # Machines

    async def get_machine(self, machine: str) -> Machine:
        """A machine by name or UUID."""
        request = pb.GetMachineRequest(machine=machine)
        return (await self.ask(lambda: self.call(self.stub.GetMachine, request))).machine

    # Migrations

    async def plan(
        self,
        machine: str,
        to: Target,
        *,
        options: pb.MigrationOptions | None = None,
        predict: bool = True,
    ) -> CompatibilityReport:
        """Whether a machine could move, and how long it would take; changes nothing."""
        request = pb.PlanMigrationRequest(
            machine=machine, destination=to.message(), options=options, without_prediction=not predict
        )
        return (await self.ask(lambda: self.call(self.stub.PlanMigration, request))).report

    async def start(
        self,
        machine: str,
        to: Target,
        *,
        options: pb.MigrationOptions | None = None,
        request_id: str = "",
        ticket: bytes = b"",
    ) -> pb.Migration:
        """Start a migration; repeated with the same request id while the answer is lost, so at most one begins.

        Args:
            machine: name or UUID.
            to: where it goes.
            options: what to do differently from the service's configuration.
            request_id: of an earlier call whose answer was lost, or of one's own choice (a UUID).
            ticket: one made elsewhere; without it one is signed with the key in the TLS directory.

        Raises:
            VmferryError: it was not started, or (PeerUnreachableError) that is not known.
        """
        destination = to.message()
        request_id = request_id or new_request_id()
        if not ticket:
            found = await self.get_machine(machine)
            machine, ticket = found.uuid, self.ticket(found, to.host)
        request = pb.StartMigrationRequest(
            machine=machine, destination=destination, request_id=request_id, ticket=ticket, options=options
        )
        try:
            return (await self.ask(lambda: self.call(self.stub.StartMigration, request))).migration
        except (*AWAY, TimedOutError) as error:
            raise PeerUnreachableError(
                f"the source does not answer, and may have started the migration or not: {error}",
                remedy=f"Call again with --request-id {request_id}: the same one never starts a second migration.",
                request_id=request_id,
            ) from error

    def ticket(self, machine: Machine, to_host: str, *, migration_id: bytes | None = None) -> bytes:
        """A ticket for moving a machine from here to a host, signed with the key in the TLS directory.

        Args:
            machine: what is to move.
            to_host: where it may go.
            migration_id: of a migration that waits already; without it one is made up.

        Raises:
            ConfigError: there is no usable key.
        """
        return TicketSigner.load(self.tls_dir).issue(
            machine_id=machine.uuid,
            source=self.host,
            destination=Identity.parse(to_host),
            max_memory_bytes=machine.spec.memory_mib * _MIB,
            max_vcpus=machine.spec.vcpus,
            migration_id=migration_id,
        )

    async def keep_ticket(self, migration: pb.Migration, *, every_s: float = MAX_VALID_S / 2) -> None:
        """Give a migration new tickets for as long as it waits in the queue; ends when it has left it."""
        migration_id = bytes.fromhex(migration.id)
        while migration.phase == pb.MIGRATION_PHASE_QUEUED:
            await asyncio.sleep(every_s)
            try:
                machine = await self.get_machine(migration.machine_id)
                ticket = self.ticket(machine, migration.destination.host, migration_id=migration_id)
                request = pb.UpdateMigrationRequest(id=migration.id, ticket=ticket)
                migration = (await self.call(self.stub.UpdateMigration, request)).migration
            except AWAY:
                continue
            except (WrongPhaseError, MachineNotFoundError):  # it has begun, or has gone
                return

    async def migrate(
        self,
        machine: str,
        to: Target,
        *,
        options: pb.MigrationOptions | None = None,
        request_id: str = "",
        patience: Patience = PATIENCE,
    ) -> pb.Migration:
        """Move a machine; returns how it came out, and raises nothing because it came out badly."""
        started = await self.start(machine, to, options=options, request_id=request_id)
        async with self.keeping_ticket(started):
            return await self.wait(started.id, last=started, patience=patience)

    @contextlib.asynccontextmanager
    async def keeping_ticket(self, migration: pb.Migration) -> AsyncIterator[None]:
        """Have :meth:`keep_ticket` done meanwhile; what it meets harms nobody but the ticket."""
        keeping = asyncio.create_task(self.keep_ticket(migration))
        try:
            yield
        finally:
            keeping.cancel()
            await asyncio.gather(keeping, return_exceptions=True)

    async def watch(
        self,
        migration_id: str,
        *,
        last: pb.Migration | None = None,
        patience: Patience = PATIENCE,
        on_lost: Callable[[], None] = lambda: None,
    ) -> AsyncGenerator[pb.Migration, None]:
        """A migration now and after each change, until it has ended or has stayed unknown; see :func:`watch`."""
        request = pb.WatchMigrationRequest(id=migration_id)

        async def states(_last: pb.Migration | None) -> AsyncGenerator[pb.Migration, None]:
            self.connect_anew()
            async for answer in self.stub.WatchMigration(request):
                request.resume_token = answer.resume_token
                yield answer.migration

        watched = Watched(
            open=states,
            ended=lambda seen: seen.phase == pb.MIGRATION_PHASE_ENDED,
            unknown=lambda seen: seen.outcome == pb.MIGRATION_OUTCOME_UNKNOWN,
            translate=lambda error: self.explain(error, self.host),
            resume=f"When the source answers again: vmferry watch {migration_id}",
        )
        seen = watch(watched, last=last, patience=patience, on_lost=on_lost)
        async with contextlib.aclosing(seen):
            async for migration in seen:
                yield migration

    async def wait(
        self,
        migration_id: str,
        *,
        last: pb.Migration | None = None,
        show: Callable[[pb.Migration], None] = lambda _: None,
        patience: Patience = PATIENCE,
    ) -> pb.Migration:
        """The migration when it has ended, or has stayed unknown for a while; ``show`` gets each state before."""
        async for seen in self.watch(migration_id, last=last, patience=patience):
            last = seen
            show(seen)
        assert last is not None
        return last

    async def get_migration(self, migration_id: str) -> pb.Migration:
        """A migration as it stands."""
        request = pb.GetMigrationRequest(id=migration_id)
        return (await self.ask(lambda: self.call(self.stub.GetMigration, request))).migration

    async def history(self, *, machine: str = "", open_only: bool = False) -> list[pb.Migration]:
        """The migrations that the host knows, ended ones included, newest first."""
        return await self.migrations(pb.ListMigrationsRequest(machine=machine, open_only=open_only))

    async def migrations(self, wanted: pb.ListMigrationsRequest, *, limit: int = 0) -> list[pb.Migration]:
        """The migrations that are wanted, newest first: all pages, or as many as it takes for ``limit`` of them."""
        found: list[pb.Migration] = []
        request = pb.ListMigrationsRequest()
        request.CopyFrom(wanted)
        request.page_size = min(limit or _PAGE, wanted.page_size or _PAGE)
        while True:
            answer = await self.ask(lambda: self.call(self.stub.ListMigrations, request))
            found.extend(answer.migrations)
            if not answer.next_page_token or 0 < limit <= len(found):
                return found[:limit] if limit else found
            request.page_token = answer.next_page_token

    async def cancel(self, migration_id: str) -> pb.Migration:
        """Cancel a migration whose hand-off has not begun.

        Raises:
            PointOfNoReturnError: only the destination's answer is missing.
        """
        request = pb.CancelMigrationRequest(id=migration_id)
        return (await self.ask(lambda: self.call(self.stub.CancelMigration, request))).migration

    async def switch_now(self, migration_id: str) -> pb.Migration:
        """Have the guest paused after this round, whatever the pause; asked for twice it is done once."""
        request = pb.SwitchNowRequest(id=migration_id)
        return (await self.ask(lambda: self.call(self.stub.SwitchNow, request))).migration

    async def set_limits(
        self,
        migration_id: str,
        *,
        max_bandwidth: int | None = None,
        switchover_bandwidth: int | None = None,
        downtime_limit: timedelta | None = None,
        max_downtime: timedelta | None = None,
        total_timeout: timedelta | None = None,
        max_throttle_percent: int | None = None,
        on_no_convergence: pb.OnNoConvergence.ValueType = pb.ON_NO_CONVERGENCE_UNSPECIFIED,
        deadline: datetime | None = None,
        priority: int | None = None,
    ) -> pb.Migration:
        """Change limits of a migration that has not paused its guest; what is not given stays as it is.

        Rates are in bytes per second, and 0 is the service's configuration.
        """
        request = pb.UpdateMigrationRequest(
            id=migration_id,
            max_bandwidth=max_bandwidth,
            switchover_bandwidth=switchover_bandwidth,
            max_throttle_percent=max_throttle_percent,
            on_no_convergence=on_no_convergence,
            priority=priority,
        )
        if deadline is not None:
            request.deadline.FromDatetime(deadline)
        for part, value in (
            (request.downtime_limit, downtime_limit),
            (request.max_downtime, max_downtime),
            (request.total_timeout, total_timeout),
        ):
            if value is not None:
                part.FromTimedelta(value)
        return (await self.ask(lambda: self.call(self.stub.UpdateMigration, request))).migration
