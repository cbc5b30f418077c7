"""The calls of ``SourceService``.

Promise: a migration is accepted or refused at once, with every bad field named; the same ``request_id`` never
starts a second one; what happens afterwards is told by the ``Migration`` resource.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from datetime import UTC, datetime
from typing import Final

import grpc

from source_svc.departure import Departure
from source_svc.farewells import Farewells
from source_svc.forecasts import Forecast, Forecasts
from source_svc.metadata import MetadataService
from source_svc.migrations import Migration, Migrations, page_bounds
from source_svc.orders import Order, check_request_id, read_destination, read_order, read_update, required
from source_svc.outgoing import Outgoing
from source_svc.override import Reclaiming
from source_svc.peer import Destination
from source_svc.planning import Plan, report_to_message
from source_svc.recovery import (
    Recovered,
    Returned,
    not_resumed_yet,
    settle_quiet,
    unknown_migration,
)
from source_svc.settling import SourcePart
from vmferry.errors import (
    InvalidArgumentError,
    JournalDamagedError,
    MachineBusyError,
    MachineDeadError,
    MachineFailedError,
    MachineNotOwnedError,
    PointOfNoReturnError,
    ServiceStoppingError,
    TicketUsedError,
    TooManyMigrationsError,
    VmferryError,
    WrongPhaseError,
)
from vmferry.handoff import source
from vmferry.handoff.ledger import Role
from vmferry.handoff.reading import read_machine
from vmferry.machines import cpulimit
from vmferry.machines.directory import MachineRecord
from vmferry.machines.fileidentity import Contents
from vmferry.machines.qmp import QmpMachine
from vmferry.negotiation.path import STREAM
from vmferry.negotiation.report import Report
from vmferry.recovery.service import RecoveryService
from vmferry.rpc.daemon import Host
from vmferry.rpc.interceptors import current_caller
from vmferry.security.identity import Identity
from vmferry.security.override import RECLAIM, Word, by_word
from vmferry.security.renewal import CurrentMaterial
from vmferry.security.tickets import VerifiedTicket, open_ticket
from vmferry.telemetry.logs import get_logger
from vmferry.telemetry.tracing import span_attributes
from vmferry.together import to_the_end
from vmferry.v1 import migration_pb2 as pb
from vmferry.v1 import migration_pb2_grpc
from vmferry.v1.migration_pb2 import DESCRIPTOR
from vmferry.v1.override_pb2 import OverrideReport

_LOG: Final = get_logger(__name__)

Context = grpc.aio.ServicerContext[object, object]


class SourceService(migration_pb2_grpc.SourceServiceServicer):
    """Moves machines away from this host."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._config = host.config
        self._ledger = host.ledger
        self._directory = host.directory
        self._own = host.own
        self._migrations = Migrations()
        self._forecasts = Forecasts(host.trackers)
        self._contents = Contents()
        self._running: dict[str, Outgoing | Recovered] = {}
        self._departures: dict[str, Departure] = {}
        """Of the migrations that run, by migration."""
        self._reclaiming = Reclaiming(host.ledger, host.directory)
        self._returned = Returned(host.ledger, host.directory, host.config.handoff_retry_s)
        self._farewells = Farewells(host, self._peer, is_busy=self._migrations.is_busy)
        self._metadata = MetadataService(host, is_busy=self._migrations.is_busy)
        part = SourcePart(self._migrations, self._running, self._returned, self._farewells)
        self._recovery = RecoveryService(host, Role.SOURCE, part)
        self._starting = asyncio.Lock()
        self._stopping = False

    def register(self, server: grpc.aio.Server) -> Sequence[str]:
        """Add the methods to a server."""
        migration_pb2_grpc.add_SourceServiceServicer_to_server(self, server)
        return [DESCRIPTOR.services_by_name["SourceService"].full_name, self._recovery.register(server)]

    async def recover(self) -> None:
        """Settle every attempt that was open when the service ended; called once, before serving."""
        await asyncio.to_thread(cpulimit.restore_all, self._config.machines_dir)
        leaving = set(self._ledger.machines(Role.SOURCE))
        for machine_id in self._ledger.machines():
            try:
                if machine_id not in leaving or not self._follow_open(machine_id):
                    self._farewells.say(machine_id)
                    await settle_quiet(machine_id, self._ledger, self._directory)
            except MachineFailedError:
                self._returned.add(machine_id)
            except VmferryError as error:
                _LOG.critical(
                    "a machine needs an operator", machine=machine_id, reason=error.reason, detail=str(error)
                )
                await self._keep_unknown(machine_id, error)
                if isinstance(error, JournalDamagedError) and isinstance(error.__cause__, OSError):
                    # Not the journal but its disk: nobody would look after the machine until the next start.
                    self._host.journal_broken(error)
        await self._metadata.start()

    async def stop(self) -> None:
        """Give machines back whose hand-off has not begun; leave the others to the next start."""
        self._stopping = True
        await asyncio.gather(*(one.interrupt() for one in list(self._running.values())))
        await self._returned.stop()
        await self._farewells.stop()

    async def close(self) -> None:
        """Every migration let go of what it held when it was stopped."""
        await self._metadata.close()
        self._recovery.close()

    # Calls

    async def PlanMigration(
        self, request: pb.PlanMigrationRequest, context: Context
    ) -> pb.PlanMigrationResponse:
        """Ask both hosts and change nothing."""
        record = self._directory.find(required(request.machine, "machine"))
        host, address = read_destination(request.destination, self._own)
        order = read_order(request.options, self._host, record.spec.memory_bytes)
        destination = self._peer(address, host)
        machine = self._directory.open(record, observe=True) if record.alive else None
        try:
            plan = self._plan(record, host)
            plan.migrating = self._migrations.open_of(record.spec.uuid) is not None
            predict = None if request.without_prediction else self._predict(order, machine, destination)
            report = await plan.report(
                machine,
                destination,
                order.tracker,
                path=order.path,
                compression=order.compression,
                compare_bytes=order.compare_bytes,
                predict=predict,
            )
        finally:
            await destination.close()
            if machine is not None:
                await machine.close()
        return pb.PlanMigrationResponse(report=report_to_message(report, plan.forecast.message))

    async def StartMigration(
        self, request: pb.StartMigrationRequest, context: Context
    ) -> pb.StartMigrationResponse:
        """Start a migration, unless this request has started one already."""
        check_request_id(request.request_id)
        async with self._starting:
            migration = self._migrations.of_request(request.request_id)
            if migration is None:
                migration = self._start(request)
        span_attributes(migration_id=migration.id)
        return pb.StartMigrationResponse(migration=migration.snapshot())

    async def GetMigration(
        self, request: pb.GetMigrationRequest, context: Context
    ) -> pb.GetMigrationResponse:
        """Return one migration."""
        return pb.GetMigrationResponse(migration=self._migrations.get(required(request.id, "id")).snapshot())

    async def ListMigrations(
        self, request: pb.ListMigrationsRequest, context: Context
    ) -> pb.ListMigrationsResponse:
        """Return a page of migrations, newest first."""
        found = self._migrations.select(machine=request.machine, open_only=request.open_only)
        start, end, token = page_bounds(request.page_size, request.page_token, len(found))
        page = [migration.snapshot() for migration in found[start:end]]
        return pb.ListMigrationsResponse(migrations=page, next_page_token=token)

    async def WatchMigration(
        self, request: pb.WatchMigrationRequest, context: Context
    ) -> AsyncIterator[pb.WatchMigrationResponse]:
        """Send the migration now and after each change until it has ended."""
        async for message in self._migrations.get(required(request.id, "id")).watch():
            yield pb.WatchMigrationResponse(migration=message)

    async def CancelMigration(
        self, request: pb.CancelMigrationRequest, context: Context
    ) -> pb.CancelMigrationResponse:
        """Cancel a migration whose hand-off has not begun; an ended one stays as it is."""
        migration = self._migrations.get(required(request.id, "id"))
        running = self._running.get(migration.id)
        if running is not None:
            running.cancel("cancelled by a caller")
        elif not migration.ended:
            raise PointOfNoReturnError("nothing is known of the migration any more", migration=migration.id)
        return pb.CancelMigrationResponse(migration=migration.snapshot())

    async def UpdateMigration(
        self, request: pb.UpdateMigrationRequest, context: Context
    ) -> pb.UpdateMigrationResponse:
        """Change limits of a migration that has not paused its guest for the switch yet."""
        migration = self._migrations.get(required(request.id, "id"))
        running = self._running.get(migration.id)
        if running is None:
            raise WrongPhaseError("the migration has ended", migration=migration.id)
        record = self._directory.find(migration.message.machine_id)
        options, order = read_update(request, migration.message.options, self._host, record.spec.memory_bytes)
        await running.update(options, order)
        return pb.UpdateMigrationResponse(migration=migration.snapshot())

    async def ListMachines(
        self, request: pb.ListMachinesRequest, context: Context
    ) -> pb.ListMachinesResponse:
        """Return a page of machines, by name, and then of blocked ones of which only journals are left."""
        records = self._directory.list()
        strays = await self._recovery.strays(records)
        count = len(records)
        start, end, token = page_bounds(request.page_size, request.page_token, count + len(strays))
        machines = await asyncio.gather(*(self._recovery.machine(record) for record in records[start:end]))
        machines += strays[max(0, start - count) : max(0, end - count)]
        return pb.ListMachinesResponse(machines=machines, next_page_token=token)

    async def GetMachine(self, request: pb.GetMachineRequest, context: Context) -> pb.GetMachineResponse:
        """Return one machine."""
        record = self._directory.find(required(request.machine, "machine"))
        return pb.GetMachineResponse(machine=await self._recovery.machine(record))

    async def ForceReclaim(
        self, request: pb.ForceReclaimRequest, context: Context
    ) -> pb.ForceReclaimResponse:
        """Take a machine back by an admin's word."""
        only_asked = request.validate_only

        async def decide(word: Word) -> OverrideReport:
            if self._stopping:
                raise ServiceStoppingError("the source service is stopping")
            _, machine_id = self._reclaiming.find(word.machine)
            departures = (one for one in self._departures.values() if one.machine_id == machine_id)
            return await self._reclaiming.decide(word, next(departures, None))

        # A caller that goes away must not leave a machine half taken back.
        work = by_word(RECLAIM, request.override, current_caller(), decide, only_asked=only_asked)
        return pb.ForceReclaimResponse(report=await to_the_end(work))

    # What they are made of

    def _predict(
        self, order: Order, machine: QmpMachine | None, destination: Destination
    ) -> Callable[[Report], Awaitable[Forecast]]:
        """What predicts a planned migration, once it is known that it could take place."""

        async def predict(report: Report) -> Forecast:
            if machine is None or report.blocking:
                return Forecast(why_not="the machine cannot move as things are")
            if report.path == STREAM:
                return Forecast(why_not="its memory travels in the hypervisor's own stream")
            machine_id = machine.spec.uuid
            return await self._forecasts.of_plan(
                order.subject(machine, destination, self._config),
                report.tracker,
                lambda: not self._stopping and self._migrations.open_of(machine_id) is None,
            )

        return predict

    def _start(self, request: pb.StartMigrationRequest) -> Migration:
        if self._stopping:
            raise ServiceStoppingError("the source service is stopping")
        record = self._directory.find(required(request.machine, "machine"))
        host, address = read_destination(request.destination, self._own)
        ticket = self._check_ticket(request.ticket, record, host)
        if self._migrations.known(ticket.migration_id.hex()):
            raise TicketUsedError("the ticket has started a migration already", field="ticket")
        order = read_order(
            request.options, self._host, record.spec.memory_bytes, ticket.migration_id, request.ticket
        )
        self._check_free(record)
        message = pb.Migration(
            id=ticket.migration_id.hex(),
            machine=record.spec.name,
            machine_id=record.spec.uuid,
            source=self._own.uri,
            destination=request.destination,
            options=request.options,
            owner=self._own.uri,
        )
        machine, peer = self._directory.open(record), self._peer(address, host)
        departure = self._departure(record.spec.uuid)
        outgoing = Outgoing(
            order,
            Migration(message),
            departure,
            machine,
            peer,
            self._config,
            CurrentMaterial(self._host.tls),
            self._plan(record, host),
            forecasts=self._forecasts,
            announcements=self._metadata.announcements,
        )
        self._follow(outgoing, departure, request.request_id)
        return outgoing.migration

    def _check_free(self, record: MachineRecord) -> None:
        """Refuse what can be known to fail without asking anybody."""
        if self._migrations.open_of(record.spec.uuid) is not None:
            raise MachineBusyError(
                f"{record.spec.name} already has an open migration", machine=record.spec.uuid
            )
        if record.spec.uuid in self._returned:
            raise not_resumed_yet(record)
        rights = self._ledger.rights(record.spec.uuid)
        if not rights.permitted:
            raise MachineNotOwnedError(
                f"this host may not send {record.spec.name} away: {rights.standing.name}",
                machine=record.spec.uuid,
            )
        if not record.alive:
            raise MachineDeadError(f"the process of {record.spec.name} is gone", machine=record.spec.uuid)
        if len(self._running) >= self._config.max_outgoing:
            raise TooManyMigrationsError(
                f"{self._config.max_outgoing} migrations leave this host already", limit="max_outgoing"
            )

    def _check_ticket(self, data: bytes, record: MachineRecord, destination: Identity) -> VerifiedTicket:
        if not data:
            raise InvalidArgumentError(
                "a ticket is required",
                field="ticket",
                remedy="Issue one (vmferry ticket), or use vmferry migrate.",
            )
        material = self._host.tls.load()
        ticket = open_ticket(data, ca_pem=material.ca_pem, now=datetime.now(UTC))
        ticket.check(
            machine_id=record.spec.uuid,
            source=self._own,
            destination=destination,
            memory_bytes=record.spec.memory_bytes,
            vcpus=record.spec.vcpus,
            source_key_sha256=material.key_sha256,
        )
        return ticket

    def _follow(self, one: Outgoing | Recovered, departure: Departure, request_id: str = "") -> None:
        self._migrations.add(one.migration, request_id)
        self._running[one.migration.id] = one
        self._departures[one.migration.id] = departure
        task = one.start()
        task.add_done_callback(lambda done: self._forget(one, done))

    def _forget(self, one: Outgoing | Recovered, task: asyncio.Task[None]) -> None:
        migration_id = one.migration.id
        self._running.pop(migration_id, None)
        self._departures.pop(migration_id, None)
        if not self._stopping:
            self._farewells.say(one.migration.message.machine_id)
        # gRPC's ended calls are tied in circles and keep their channels until those are collected.
        asyncio.get_running_loop().call_soon(gc.collect)
        if task.cancelled() or isinstance(error := task.exception(), ServiceStoppingError):
            return
        if error is not None:
            _LOG.critical("a migration ended in an error", migration=migration_id, exc_info=error)

    async def _keep_unknown(self, machine_id: str, error: VmferryError) -> None:
        """Tell whoever asks for the machine's migration that nothing is known of it."""
        readings = read_machine(self._config.journal_dir, machine_id, error.message)
        message = unknown_migration(machine_id, readings, self._own.uri)
        if message is not None:
            message.machine = self._name_of(machine_id)
            migration = Migration(message)
            self._migrations.add(migration)
            await migration.report(pb.MIGRATION_OUTCOME_UNKNOWN, error)

    def _follow_open(self, machine_id: str) -> bool:
        """Go on with the machine's open attempt; false if there is none."""
        departure = self._departure(machine_id)
        state = departure.state
        if isinstance(state, source.Quiet):
            departure.close()
            return False
        attempt = state.attempt
        message = pb.Migration(
            id=attempt.migration_id.hex(),
            machine=self._name_of(machine_id),
            machine_id=machine_id,
            source=self._own.uri,
            destination=pb.Destination(host=attempt.destination, address=attempt.destination_address),
            phase=pb.MIGRATION_PHASE_SWITCHING,
        )
        peer = self._peer(attempt.destination_address, Identity.parse(attempt.destination))
        recovered = Recovered(Migration(message), departure, peer, self._own.uri, self._config)
        self._follow(recovered, departure)
        return True

    def _name_of(self, machine_id: str) -> str:
        names = (record.spec.name for record in self._directory.list() if record.spec.uuid == machine_id)
        return next(names, machine_id)

    def _departure(self, machine_id: str) -> Departure:
        return Departure(
            machine_id, self._ledger, self._directory, on_broken_journal=self._host.journal_broken
        )

    def _peer(self, address: str, host: Identity) -> Destination:
        material = CurrentMaterial(self._host.tls)
        return Destination(address, host, material, rpc_timeout_s=self._config.rpc_timeout_s)

    def _plan(self, record: MachineRecord, host: Identity) -> Plan:
        return Plan(
            record.spec,
            self._ledger,
            self._host.trackers,
            self._own.uri,
            host.uri,
            self._host.tls.load().not_after.timestamp(),
            self._config.switch_timeout_s,
            self._config.negotiate_timeout_s,
            self._contents,
        )
