"""The calls of ``SourceService``.

Promise: a migration is accepted or refused at once, with every bad field named; the same ``request_id`` never
starts a second one, also after a restart; what happens afterwards is told by the ``Migration`` resource.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

import grpc

from source_svc import history
from source_svc.acceptance import Acceptance
from source_svc.dispatcher import Dispatcher
from source_svc.farewells import Farewells
from source_svc.forecasts import Forecast, Forecasts
from source_svc.history import History
from source_svc.listing import find_machine, list_migrations, page_bounds, resume_token, seen_revision
from source_svc.means import Means
from source_svc.metadata import MetadataService
from source_svc.migrations import Migrations
from source_svc.orders import Order, read_destination, read_order, read_update, required
from source_svc.override import Reclaiming
from source_svc.peer import Destination
from source_svc.planning import report_to_message
from source_svc.recovery import Returned
from source_svc.restart import Restart
from source_svc.settling import SourcePart
from source_svc.store import Store
from source_svc.underway import Underway
from source_svc.update_service import UpdateService
from vmferry.errors import PointOfNoReturnError, ServiceStoppingError, WrongPhaseError
from vmferry.handoff.ledger import Role
from vmferry.machines.directory import MachineRecord
from vmferry.machines.qmp import QmpMachine
from vmferry.negotiation.path import STREAM
from vmferry.negotiation.report import Report
from vmferry.recovery.service import RecoveryService
from vmferry.rpc.daemon import Host
from vmferry.rpc.interceptors import current_caller
from vmferry.security.override import RECLAIM, Word, by_word
from vmferry.telemetry.tracing import current_traceparent, span_attributes
from vmferry.together import to_the_end
from vmferry.v1 import migration_pb2 as pb
from vmferry.v1 import migration_pb2_grpc
from vmferry.v1.migration_pb2 import DESCRIPTOR
from vmferry.v1.override_pb2 import OverrideReport

Context = grpc.aio.ServicerContext[object, object]


class SourceService(migration_pb2_grpc.SourceServiceServicer):
    """Moves machines away from this host."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._config = host.config
        self._ledger = host.ledger
        self._directory = host.directory
        self._own = host.own
        self._store = Store(host.config.memory_path, (history.SCHEMA,))
        self._history = History(
            self._store,
            max_age_days=host.config.history_max_age_days,
            max_count=host.config.history_max_count,
        )
        self._migrations = Migrations(self._history)
        self._forecasts = Forecasts(host.trackers)
        self._means = Means(host)
        self._underway = Underway()
        self._reclaiming = Reclaiming(host.ledger, host.directory)
        self._returned = Returned(host.ledger, host.directory, host.config)
        self._farewells = Farewells(host, self._means.peer, is_busy=self._underway.is_busy)
        # Also one that waits: a process before this one may have told its guest, and it goes on by that event.
        self._metadata = MetadataService(host, is_busy=lambda one: self._migrations.open_of(one) is not None)
        self._updates = UpdateService(host, self._metadata.announcements, is_busy=self._occupied)
        self._acceptance = Acceptance(
            host,
            self._migrations,
            self._means,
            self._returned,
            self._forecasts,
            announcements=self._metadata.announcements,
            is_updated=self._updates.is_busy,
        )
        self._dispatcher = Dispatcher(host, self._migrations, self._underway, self._acceptance)
        part = SourcePart(self._migrations, self._underway, self._returned, self._farewells, self._history)
        self._recovery = RecoveryService(host, Role.SOURCE, part)
        self._stopping = False

    def register(self, server: grpc.aio.Server) -> Sequence[str]:
        """Add the methods to a server."""
        migration_pb2_grpc.add_SourceServiceServicer_to_server(self, server)
        own = DESCRIPTOR.services_by_name["SourceService"].full_name
        events = self._metadata.events.register(server)
        return [own, self._recovery.register(server), events, self._updates.register(server)]

    async def recover(self) -> None:
        """Settle every attempt that was open when the service ended; called once, before serving."""
        await self._store.open()
        restart = Restart(
            self._host,
            self._means,
            self._migrations,
            self._underway,
            self._returned,
            self._farewells,
            history=self._history,
            acceptance=self._acceptance,
            dispatcher=self._dispatcher,
            updates=self._updates,
        )
        self._underway.on_end.append(lambda one: self._say_farewell(one.migration.message.machine_id))
        await restart.recover()
        await self._metadata.start()
        self._dispatcher.start()

    async def wind_down(self) -> int:
        """Take nothing new, and let nothing begin that waits; how many migrations still run."""
        self._stopping = True
        await self._dispatcher.stop()
        return len(self._underway)

    async def stop(self) -> None:
        """Give machines back whose hand-off has not begun; leave the others, and what waits, to the next start."""
        self._stopping = True
        await self._dispatcher.stop()
        await asyncio.gather(self._underway.interrupt(), self._updates.stop())
        await self._dispatcher.close()
        await self._returned.stop()
        await self._farewells.stop()
        await self._migrations.flush()

    async def close(self) -> None:
        """Let go of the memory: every migration let go of what it held when it was stopped."""
        await self._metadata.close()
        self._recovery.close()
        await self._store.close()

    # Calls

    async def PlanMigration(
        self, request: pb.PlanMigrationRequest, context: Context
    ) -> pb.PlanMigrationResponse:
        """Ask both hosts and change nothing."""
        record = await self._find(required(request.machine, "machine"))
        host, address = read_destination(request.destination, self._own)
        order = read_order(request.options, self._host, record.spec.memory_bytes)
        destination = self._means.peer(address, host)
        machine = self._directory.open(record, observe=True) if record.alive else None
        try:
            plan = self._means.plan(record, host)
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
        """Accept a migration, unless this request was answered with one already."""
        order = self._dispatcher.order(request, current_caller(), traceparent=current_traceparent())
        # A caller that goes away must not leave something accepted that nobody has begun.
        migration = await to_the_end(order)
        span_attributes(migration_id=migration.id)
        return pb.StartMigrationResponse(migration=migration.snapshot())

    async def GetMigration(
        self, request: pb.GetMigrationRequest, context: Context
    ) -> pb.GetMigrationResponse:
        """Return one migration."""
        migration = await self._migrations.find(required(request.id, "id"))
        return pb.GetMigrationResponse(migration=migration.snapshot())

    async def ListMigrations(
        self, request: pb.ListMigrationsRequest, context: Context
    ) -> pb.ListMigrationsResponse:
        """Return a page of migrations, newest first."""
        return await list_migrations(request, self._migrations, self._history)

    async def WatchMigration(
        self, request: pb.WatchMigrationRequest, context: Context
    ) -> AsyncIterator[pb.WatchMigrationResponse]:
        """Send the migration now, unless the watcher knows it, and after each change until it has ended."""
        migration = await self._migrations.find(required(request.id, "id"))
        async for message in migration.watch(seen_revision(request)):
            yield pb.WatchMigrationResponse(migration=message, resume_token=resume_token(message))

    async def CancelMigration(
        self, request: pb.CancelMigrationRequest, context: Context
    ) -> pb.CancelMigrationResponse:
        """Cancel a migration whose hand-off has not begun; an ended one stays as it is."""
        migration = await self._migrations.find(required(request.id, "id"))
        why = f"cancelled by {current_caller()}"
        if not await self._dispatcher.cancel(migration.id, why):
            running = self._underway.get(migration.id)
            if running is not None:
                running.cancel(why)
            elif not migration.ended:
                raise PointOfNoReturnError(
                    "nothing is known of the migration any more", migration=migration.id
                )
        return pb.CancelMigrationResponse(migration=migration.snapshot())

    async def UpdateMigration(
        self, request: pb.UpdateMigrationRequest, context: Context
    ) -> pb.UpdateMigrationResponse:
        """Change limits of a migration that has not paused its guest for the switch yet."""
        migration = await self._migrations.find(required(request.id, "id"))
        if await self._dispatcher.update(migration.id, request):
            return pb.UpdateMigrationResponse(migration=migration.snapshot())
        running = self._underway.get(migration.id)
        if running is None:
            remedy = f"See how it came out: vmferry status {migration.id} (GetMigration)."
            raise WrongPhaseError("the migration has ended", migration=migration.id, remedy=remedy)
        if request.HasField("priority") or request.ticket:
            field = "priority" if request.HasField("priority") else "ticket"
            raise WrongPhaseError("the migration does not wait in the queue any more", field=field)
        record = self._directory.find(migration.message.machine_id)
        options, order = read_update(request, migration.message.options, self._host, record.spec.memory_bytes)
        await running.update(options, order)
        return pb.UpdateMigrationResponse(migration=migration.snapshot())

    async def SwitchNow(self, request: pb.SwitchNowRequest, context: Context) -> pb.SwitchNowResponse:
        """Pause the guest when the round that is being copied is over; an ended migration stays as it is."""
        migration = await self._migrations.find(required(request.id, "id"))
        running = self._underway.get(migration.id)
        if running is not None:
            running.switch_now()
        elif not migration.ended:
            raise WrongPhaseError(
                "the migration waits in the queue, and there is nothing to switch yet",
                migration=migration.id,
                remedy="Raise its priority (vmferry set --priority), or wait until it copies.",
            )
        return pb.SwitchNowResponse(migration=migration.snapshot())

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
        record = await self._find(required(request.machine, "machine"))
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
            return await self._reclaiming.decide(word, self._underway.departure_of(machine_id))

        # A caller that goes away must not leave a machine half taken back.
        work = by_word(RECLAIM, request.override, current_caller(), decide, only_asked=only_asked)
        return pb.ForceReclaimResponse(report=await to_the_end(work))

    # What they are made of

    async def _find(self, machine: str) -> MachineRecord:
        return await find_machine(machine, self._directory, self._migrations, self._history)

    def _occupied(self, machine_id: str) -> str:
        """What is being done with a machine that keeps it from being updated in place."""
        if self._stopping:
            return "the source service is stopping"
        if machine_id in self._returned:
            return "its guest is yet to be resumed here"
        return "a migration of it is open" if self._migrations.open_of(machine_id) is not None else ""

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

    def _say_farewell(self, machine_id: str) -> None:
        if not self._stopping:
            self._farewells.say(machine_id)
