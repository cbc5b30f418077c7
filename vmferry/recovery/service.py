"""The calls of ``RecoveryService``, which both services of a host serve.

Promise: an inspection changes nothing; settling does what the service would try next by itself, through the service's
own decisions, and is over within a caller's patience: what takes longer goes on without the caller.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Protocol

import grpc

from vmferry.errors import InvalidArgumentError, VmferryError
from vmferry.handoff.blocked import Reason
from vmferry.handoff.ledger import Role
from vmferry.machines.directory import MachineRecord
from vmferry.recovery.contact import Contact
from vmferry.recovery.examination import Examiner, Known
from vmferry.recovery.wire import as_inspection
from vmferry.rpc.daemon import Host
from vmferry.telemetry.logs import get_logger
from vmferry.telemetry.metrics import observe_blocked
from vmferry.v1 import machine_pb2, recovery_pb2, recovery_pb2_grpc
from vmferry.v1.migration_pb2 import Migration
from vmferry.web.view import Arriving

SETTLE_S: Final = 20.0
"""Longest time a caller waits for what is being settled."""
_CENSUS_S: Final = 10.0
_MOST_OPEN: Final = 1000

_LOG: Final = get_logger(__name__)
Context = grpc.aio.ServicerContext[object, object]


class Part(Protocol):
    """What one service adds: what it heard, and its own way to settle."""

    def contact(self, machine_id: str) -> Contact:
        """The newest word from the other end of the machine's attempt."""

    def migration_of(self, machine_id: str) -> str:
        """The machine's open migration away from this host; empty if there is none."""

    async def settle(self, known: Known) -> Sequence[str]:
        """Do now what would be tried next; returns what was done, in sentences."""

    def migrations(self, *, open_only: bool, limit: int) -> list[Migration]:
        """The newest migrations away from this host."""

    async def history(self, *, limit: int) -> list[Migration]:
        """The same, with those that ended before this process began."""

    def arrivals(self) -> list[Arriving]:
        """What this host is receiving."""


class RecoveryService(recovery_pb2_grpc.RecoveryServiceServicer):
    """Shows and settles the machines of one host, for one of its services."""

    def __init__(self, host: Host, role: Role, part: Part) -> None:
        self._own = host.own.uri
        self._part = part
        self._directory = host.directory
        self._examiner = Examiner(
            host.directory, host.config.journal_dir, host.ledger, service=role, contact=part.contact
        )
        self._stop_observing: Callable[[], None] = lambda: None
        host.views.append(self)

    def register(self, server: grpc.aio.Server) -> str:
        """Add the methods to a server, and let blocked machines be measured; returns the service's full name."""
        recovery_pb2_grpc.add_RecoveryServiceServicer_to_server(self, server)
        loop = asyncio.get_running_loop()
        self._stop_observing = observe_blocked(lambda: self._measure(loop))
        return recovery_pb2.DESCRIPTOR.services_by_name["RecoveryService"].full_name

    def close(self) -> None:
        """Nothing is measured any more; safe to call twice."""
        self._stop_observing()

    # Calls

    async def InspectMachine(  # noqa: N802 - named by the contract
        self,
        request: recovery_pb2.InspectMachineRequest,
        context: Context,  # noqa: ARG002 - gRPC's
    ) -> recovery_pb2.InspectMachineResponse:
        """Say all that is known of a machine."""
        known = await self._examiner.find(_required(request.machine))
        return recovery_pb2.InspectMachineResponse(inspection=self._inspection(known))

    async def SettleMachine(  # noqa: N802 - named by the contract
        self,
        request: recovery_pb2.SettleMachineRequest,
        context: Context,  # noqa: ARG002 - gRPC's
    ) -> recovery_pb2.SettleMachineResponse:
        """Do now what would be tried next."""
        known = await self._examiner.find(_required(request.machine))
        try:
            async with asyncio.timeout(SETTLE_S):
                done = list(await self._part.settle(known))
        except TimeoutError:
            done = [f"it is still being tried after {SETTLE_S:g} s, and goes on"]
        _LOG.info("settling was asked for", machine=known.machine_id, done=done)
        known = await self._examiner.find(known.machine_id)
        return recovery_pb2.SettleMachineResponse(done=done, inspection=self._inspection(known))

    # For the service

    async def machine(self, record: MachineRecord) -> machine_pb2.Machine:
        """A machine as the API shows it."""
        return await self._examiner.machine(record, self._part.migration_of(record.spec.uuid))

    async def strays(self, records: Sequence[MachineRecord]) -> list[machine_pb2.Machine]:
        """Blocked machines of which only journals are left here."""
        return await self._examiner.strays(records)

    # For metrics and the web page

    async def machines(self) -> list[machine_pb2.Machine]:
        """All machines of this host, and blocked ones of which only journals are left."""
        records = self._directory.list()
        found = await asyncio.gather(*(self.machine(record) for record in records))
        return [*found, *await self.strays(records)]

    async def migrations(self, *, limit: int) -> list[Migration]:
        """The newest migrations away from this host."""
        return await self._part.history(limit=limit)

    def open_migrations(self) -> list[Migration]:
        """Those that have not ended."""
        return self._part.migrations(open_only=True, limit=_MOST_OPEN)

    def arrivals(self) -> list[Arriving]:
        """What this host is receiving."""
        return self._part.arrivals()

    def _inspection(self, known: Known) -> recovery_pb2.MachineInspection:
        migration_id = self._part.migration_of(known.machine_id)
        return as_inspection(known, self._examiner, host=self._own, migration_id=migration_id)

    def _measure(self, loop: asyncio.AbstractEventLoop) -> Mapping[str, int] | None:
        """How many machines are blocked, by reason; called by the exporter's thread, which waits and nobody else."""
        census = self._examiner.census()
        try:
            future = asyncio.run_coroutine_threadsafe(census, loop)
        except RuntimeError:  # the service has ended
            census.close()
            return None
        try:
            found = future.result(_CENSUS_S)
        except (TimeoutError, concurrent.futures.CancelledError, VmferryError, OSError):
            future.cancel()
            return None
        # All reasons, so that one that nobody has any more is seen to be gone.
        return {reason.value: found[reason] for reason in Reason}


def _required(machine: str) -> str:
    if not machine:
        raise InvalidArgumentError("machine is required", field="machine")
    return machine
