"""What is accepted to be moved, and how it is begun: the checks before a migration waits, and again when it begins.

Promise: a request that can never succeed is refused at once, by the name of its field; what changed while a migration
waited (the machine is gone, its ticket is too old) ends it by name when it is to begin, and nothing was begun then.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from source_svc.announcing import Announcements
from source_svc.ending import check_deadline
from source_svc.forecasts import Forecasts
from source_svc.means import Means
from source_svc.migrations import Migration, Migrations
from source_svc.orders import check_request_id, read_destination, read_order, required
from source_svc.outgoing import Outgoing
from source_svc.recovery import Returned, not_resumed_yet
from vmferry.errors import (
    InvalidArgumentError,
    MachineBusyError,
    MachineDeadError,
    MachineNotOwnedError,
    TicketUsedError,
    VmferryError,
)
from vmferry.machines.directory import MachineRecord
from vmferry.rpc.daemon import Host
from vmferry.security.identity import Identity
from vmferry.security.renewal import CurrentMaterial
from vmferry.security.tickets import CLOCK_SKEW, VerifiedTicket
from vmferry.security.warrants import open_permission
from vmferry.v1 import migration_pb2 as pb


@dataclass
class Accepted:
    """A migration that may begin."""

    migration: Migration
    ticket: bytes
    start_by: datetime
    """When its ticket is too old to begin."""
    traceparent: str
    """Of whoever asked for it."""
    number: int = 0
    """Its place in the order of arrival."""
    tries: int = 0
    """How often its destination had no room."""
    remembered: bool = True
    """Whether it would be there after a restart."""
    ended_by: VmferryError | None = None
    """What put an end to it just as it came back to the queue."""

    @property
    def destination(self) -> str:
        """The host it goes to."""
        return self.migration.message.destination.host

    @property
    def deadline(self) -> datetime | None:
        """When it is given up, by the caller's wish."""
        options = self.migration.message.options
        return options.deadline.ToDatetime(tzinfo=UTC) if options.HasField("deadline") else None


class Acceptance:
    """Accepts and begins the migrations of one source service."""

    def __init__(
        self,
        host: Host,
        migrations: Migrations,
        means: Means,
        returned: Returned,
        forecasts: Forecasts,
        *,
        announcements: Announcements,
        is_updated: Callable[[str], bool],
    ) -> None:
        """``is_updated`` says whether an update of a machine in place is open."""
        self._is_updated = is_updated
        self._host = host
        self._migrations = migrations
        self._means = means
        self._returned = returned
        self._forecasts = forecasts
        self._announcements = announcements

    async def accept(
        self, request: pb.StartMigrationRequest, caller: Identity, *, traceparent: str
    ) -> Accepted:
        """Check a request and make its migration, which nobody knows yet.

        Raises:
            VmferryError: it cannot be meant, or can be known to fail.
        """
        check_request_id(request.request_id)
        record = self._host.directory.find(required(request.machine, "machine"))
        host, _ = read_destination(request.destination, self._host.own)
        ticket = self.check_ticket(request.ticket, record, host, caller=caller.uri)
        if await self._migrations.known(ticket.migration_id.hex()):
            raise TicketUsedError("the ticket has started a migration already", field="ticket")
        read_order(request.options, self._host, record.spec.memory_bytes)
        check_deadline(request.options)
        # Nothing below waits for anything, so that two requests for one machine cannot both find it free.
        if self._migrations.open_of(record.spec.uuid) is not None:
            raise MachineBusyError(
                f"{record.spec.name} already has an open migration", machine=record.spec.uuid
            )
        self._check_may_leave(record)
        message = pb.Migration(
            id=ticket.migration_id.hex(),
            machine=record.spec.name,
            machine_id=record.spec.uuid,
            source=self._host.own.uri,
            destination=request.destination,
            options=request.options,
            owner=self._host.own.uri,
            phase=pb.MIGRATION_PHASE_QUEUED,
            caller=caller.uri,
            request_id=request.request_id,
        )
        return Accepted(Migration(message), request.ticket, ticket.start_by + CLOCK_SKEW, traceparent)

    def resume(self, migration: Migration, ticket: bytes, traceparent: str) -> Accepted:
        """What waited when an earlier run of the service ended.

        Raises:
            VmferryError: it cannot begin any more.
        """
        message = migration.message
        host, _ = read_destination(message.destination, self._host.own)
        record = self._host.directory.find(message.machine_id)
        start_by = self.check_ticket(ticket, record, host, caller=message.caller).start_by + CLOCK_SKEW
        return Accepted(migration, ticket, start_by, traceparent)

    def begin(self, accepted: Accepted) -> Outgoing:
        """Make what moves the machine; it has still to be started.

        Raises:
            VmferryError: it cannot begin, or not any more.
        """
        message = accepted.migration.message
        host, address = read_destination(message.destination, self._host.own)
        record = self._host.directory.find(message.machine_id)
        ticket = self.check_ticket(accepted.ticket, record, host, caller=message.caller)
        check_deadline(message.options)
        self._check_may_leave(record)
        options, memory_bytes = message.options, record.spec.memory_bytes
        order = read_order(options, self._host, memory_bytes, ticket.migration_id, accepted.ticket)
        return Outgoing(
            order,
            accepted.migration,
            self._means.departure(record.spec.uuid),
            self._host.directory.open(record),
            self._means.peer(address, host),
            self._host.config,
            CurrentMaterial(self._host.tls),
            self._means.plan(record, host),
            forecasts=self._forecasts,
            announcements=self._announcements,
            traceparent=accepted.traceparent,
        )

    def check_ticket(
        self, data: bytes, record: MachineRecord, destination: Identity, *, caller: str
    ) -> VerifiedTicket:
        """What a ticket allows, if it is good now and for exactly this."""
        if not data:
            raise InvalidArgumentError(
                "a ticket is required",
                field="ticket",
                remedy="Issue one (vmferry ticket), or use vmferry migrate.",
            )
        material = self._host.tls.load()
        own = caller == self._host.own.uri  # the drain, which makes tickets out by warrant
        ticket = open_permission(data, ca_pem=material.ca_pem, now=datetime.now(UTC), by_warrant=own)
        ticket.check(
            machine_id=record.spec.uuid,
            source=self._host.own,
            destination=destination,
            memory_bytes=record.spec.memory_bytes,
            vcpus=record.spec.vcpus,
            source_key_sha256=material.key_sha256,
        )
        return ticket

    def _check_may_leave(self, record: MachineRecord) -> None:
        """Refuse what can be known to fail without asking anybody."""
        if record.spec.uuid in self._returned:
            raise not_resumed_yet(record)
        if self._is_updated(record.spec.uuid):
            raise MachineBusyError(
                f"{record.spec.name} is being updated in place",
                machine=record.spec.uuid,
                remedy="Try again when that has ended; it takes seconds.",
            )
        rights = self._host.ledger.rights(record.spec.uuid)
        if not rights.permitted:
            raise MachineNotOwnedError(
                f"this host may not send {record.spec.name} away: {rights.standing.name}",
                machine=record.spec.uuid,
            )
        if not record.alive:
            raise MachineDeadError(f"the process of {record.spec.name} is gone", machine=record.spec.uuid)
