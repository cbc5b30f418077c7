"""What becomes of an attempt that was open when the service ended.

Promise: before the right to run was given up, the guest goes on here; afterwards the destination is asked until it
says what happened. Nothing is concluded from silence.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any, Final

from source_svc.clocks import ask_arrived, see_to, see_to_returned
from source_svc.departure import Departure, discard_if_gone
from source_svc.following import Followed
from source_svc.migrations import Migration
from source_svc.orders import Order
from source_svc.pause import Pause
from source_svc.peer import Destination
from vmferry.config import HostConfig
from vmferry.errors import (
    MachineBusyError,
    MachineFailedError,
    OutcomeUnknownError,
    PointOfNoReturnError,
    VmferryError,
    WrongPhaseError,
)
from vmferry.handoff import source
from vmferry.handoff.ledger import HostLedger
from vmferry.handoff.rights import Standing
from vmferry.handoff.states import AttemptState, Tell
from vmferry.machines.clock import ClockFinding
from vmferry.machines.directory import MachineDirectory, MachineRecord
from vmferry.machines.launcher import halt_machine
from vmferry.machines.port import RunState
from vmferry.telemetry.logs import bind_migration, get_logger
from vmferry.telemetry.tracing import context_of, current_trace_id, phase
from vmferry.v1 import migration_pb2 as pb

_LOG: Final = get_logger(__name__)


async def settle_quiet(machine_id: str, ledger: HostLedger, directory: MachineDirectory) -> bool:
    """With no attempt open: do what an earlier process had recorded and was ended before it did.

    Returns whether a guest was resumed, whose clock has stood still.
    """
    rights = await asyncio.to_thread(ledger.rights, machine_id)
    if rights.standing is Standing.GONE:
        await discard_if_gone(machine_id, ledger, directory)
        return False
    if rights.superseded:
        await halt_machine(machine_id, directory)
        return False
    record = next((record for record in directory.list() if record.spec.uuid == machine_id), None)
    if record is None or not record.alive or not rights.permitted:
        return False
    machine = directory.open(record)
    try:
        if await machine.run_state() not in {RunState.PAUSED, RunState.POSTMIGRATE}:
            return False
        async with ledger.permitted(machine_id) as permit:
            await machine.cont(permit)
    finally:
        await machine.close()
    return True


class Returned:
    """Machines that came back to this host while their hypervisors did not answer; resumed as soon as these do.

    Nothing else may begin with such a machine meanwhile: to resume it must never meet a pause that is meant.
    """

    def __init__(self, ledger: HostLedger, directory: MachineDirectory, config: HostConfig) -> None:
        self._ledger = ledger
        self._directory = directory
        self._retry_s = config.handoff_retry_s
        self._agent_timeout_s = config.agent_timeout_s
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._pauses: dict[str, Pause] = {}
        self._clocks: set[asyncio.Task[ClockFinding | None]] = set()
        self._why_not: dict[str, str] = {}
        """Why a machine was not resumed by the last try."""

    def __contains__(self, machine_id: str) -> bool:
        return machine_id in self._tasks

    def add(self, machine_id: str) -> None:
        """Begin to look after a machine."""
        if machine_id not in self._tasks:
            self._pauses[machine_id] = Pause()
            task = asyncio.create_task(self._settle(machine_id), name=f"return-{machine_id}")
            self._tasks[machine_id] = task
            task.add_done_callback(lambda _: self._tasks.pop(machine_id, None))

    async def hurry(self, machine_id: str) -> str:
        """Try now; returns why that came to nothing, if it did. It is then tried again until it works."""
        new = machine_id not in self._tasks
        self.add(machine_id)
        await self._pauses[machine_id].hurry(self._tasks[machine_id], tries=1 if new else 0)
        return self._why_not.get(machine_id, "")

    def see_to_clock(self, machine_id: str) -> None:
        """Look after the clock of a guest that was resumed; its agent may take its time, and keeps nobody waiting."""
        work = see_to(self._directory, machine_id, None, self._agent_timeout_s)
        task = asyncio.create_task(work, name=f"clock-{machine_id}")
        self._clocks.add(task)
        task.add_done_callback(self._clocks.discard)

    async def stop(self) -> None:
        """Leave the rest to the next start."""
        tasks: list[asyncio.Task[Any]] = [*self._tasks.values(), *self._clocks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _settle(self, machine_id: str) -> None:
        pause = self._pauses[machine_id]
        while True:
            try:
                resumed = await settle_quiet(machine_id, self._ledger, self._directory)
            except MachineFailedError as error:
                self._why_not[machine_id] = error.message
                _LOG.error("not resumed yet", machine=machine_id, detail=error.message)
            except VmferryError as error:
                self._why_not[machine_id] = error.message
                _LOG.error("cannot be resumed", machine=machine_id, detail=error.message)
                return
            else:
                self._why_not.pop(machine_id, None)
                if resumed:
                    self.see_to_clock(machine_id)
                return
            await pause.wait(self._retry_s)


def not_resumed_yet(record: MachineRecord) -> MachineBusyError:
    """Why nothing can begin with a machine that came back and is not resumed."""
    return MachineBusyError(
        f"the hypervisor of {record.spec.name} did not answer when it was to resume its guest, and is asked again",
        machine=record.spec.uuid,
        remedy="Try again when the machine runs, or end it (vmferry machine stop).",
    )


class Recovered(Followed):
    """An attempt that was open when the service ended; followed to its end without a guest to copy."""

    def __init__(
        self,
        migration: Migration,
        departure: Departure,
        destination: Destination,
        own: str,
        config: HostConfig,
        *,
        traceparent: str = "",
    ) -> None:
        self._traceparent = traceparent
        self.migration = migration
        self.retry_s = config.handoff_retry_s
        self._config = config
        self.cold_boot_wait_s = config.cold_boot_wait_s
        self.reason = "the source service was restarted"
        self._departure = departure
        self._destination = destination
        self._own = own
        self._last_heard: AttemptState | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> asyncio.Task[None]:
        """Begin, in a task of its own."""
        context = context_of(self._traceparent) if self._traceparent else None
        self._task = asyncio.create_task(self._run(), name=f"recovery-{self.migration.id}", context=context)
        return self._task

    def cancel(self, why: str) -> None:
        """There is nothing left to cancel: it is being closed, or only the destination can decide."""
        raise PointOfNoReturnError("the migration is being settled after a restart", why=why)

    def switch_now(self) -> None:
        """There is nothing left to hurry."""
        raise WrongPhaseError("the migration is being settled after a restart", migration=self.migration.id)

    async def update(self, _options: pb.MigrationOptions, _order: Order) -> None:
        """There is nothing left to change."""
        raise WrongPhaseError("the migration is being settled after a restart", migration=self.migration.id)

    async def interrupt(self) -> None:
        """The service stops; the next start goes on."""
        assert self._task is not None
        self._departure.pause.end()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        try:
            async with phase("recover", migration_id=self.migration.id):
                self.migration.message.trace_id = current_trace_id() or self.migration.message.trace_id
                bind_migration(self.migration.id)
                await self._settle()
        finally:
            await self._destination.close()
            self._departure.close()

    async def _settle(self) -> None:
        departure = self._departure
        tells: list[Tell] = []
        attempt = None if isinstance(departure.state, source.Quiet) else departure.state.attempt
        if isinstance(departure.state, source.HandedOff):
            await self.migration.enter(pb.MIGRATION_PHASE_HANDING_OFF)
            tells = await departure.apply(source.Unheard())
        else:
            wanted = source.AbortWanted(
                self.reason,
                memory_intact=await departure.memory_intact(),
                tail_certain=departure.tail_certain,
            )
            tells = await departure.apply(wanted)
            if isinstance(departure.state, source.Quiet) and attempt is not None:
                with contextlib.suppress(VmferryError):
                    await self._destination.tell("Abort", attempt, digest=b"", reason=self.reason)
        await departure.settle(self._destination, tells, self)
        await departure.release()
        await departure.keep_resuming(self)
        if self._last_heard is AttemptState.RUNNING:
            await ask_arrived(self._destination, attempt, self.migration, self._config)
            self.migration.message.owner = self._destination.expected.uri
            await self.migration.end(pb.MIGRATION_OUTCOME_COMPLETED)
        else:
            await see_to_returned(departure, self.migration, 0.0, self._config)
            self.migration.message.owner = self._own
            error = departure.overridden or WrongPhaseError(self.reason)
            await self.migration.end(pb.MIGRATION_OUTCOME_FAILED, error)

    async def hears(self, heard: source.Heard) -> None:
        """The destination said how the attempt stands."""
        self._last_heard = heard.state

    async def waits(self, why: str) -> None:
        """The outcome is not known yet."""
        await self.migration.report(pb.MIGRATION_OUTCOME_UNKNOWN, OutcomeUnknownError(why))

    async def stays_paused(self, why: MachineFailedError) -> None:
        """The machine belongs here and its guest cannot go on yet."""
        self.migration.message.owner = self._own
        await self.migration.report(pb.MIGRATION_OUTCOME_UNSPECIFIED, why)
