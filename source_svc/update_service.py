"""The calls of ``UpdateService``: hypervisors of this host are replaced beneath their running guests.

Promise: an update is accepted or refused at once, with every reason named; the same ``request_id`` never starts a
second one; an update and a migration of one machine exclude each other; an update that an earlier process left open
is brought to its end before anything else is done with its machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Final

import grpc

from source_svc.announcing import Announced, Announcements
from source_svc.orders import required
from source_svc.pause import Pause
from source_svc.update_check import Comparison, Examined, UpdateCheck
from source_svc.updates import UpdateResource, Updates
from source_svc.updating import Updating
from vmferry.errors import (
    InvalidArgumentError,
    JournalDamagedError,
    MachineBusyError,
    MachineFailedError,
    ServiceStoppingError,
    UpdateUndoneError,
    VmferryError,
)
from vmferry.events import policy
from vmferry.handoff import updating
from vmferry.handoff.ledger import Role
from vmferry.machines.beside import end_beside, find_beside
from vmferry.machines.clock import put_right, tell
from vmferry.machines.directory import MachineRecord
from vmferry.rpc.daemon import Host
from vmferry.telemetry.logs import get_logger
from vmferry.telemetry.tracing import current_trace_id, phase, span_attributes
from vmferry.v1 import update_pb2 as pb
from vmferry.v1 import update_pb2_grpc

DEFAULT_MAX_PAUSE_S: Final = 30.0
"""As Azure documents for memory-preserving updates."""
LEAST_MAX_PAUSE_S: Final = 0.05
_RESTARTED: Final = "the source service was restarted"

_LOG: Final = get_logger(__name__)
Context = grpc.aio.ServicerContext[object, object]


class UpdateService(update_pb2_grpc.UpdateServiceServicer):
    """Updates machines of this host in place."""

    def __init__(self, host: Host, announcements: Announcements, *, is_busy: Callable[[str], str]) -> None:
        """``is_busy`` says what else the source service is doing with a machine; empty for nothing."""
        self._host = host
        self._announcements = announcements
        self._is_busy = is_busy
        self._updates = Updates()
        self._check = UpdateCheck(host.config, host.directory)
        self._running: dict[str, Run] = {}
        self._starting = asyncio.Lock()

    def register(self, server: grpc.aio.Server) -> str:
        """Add the methods to a server; returns the service's full name."""
        update_pb2_grpc.add_UpdateServiceServicer_to_server(self, server)
        return pb.DESCRIPTOR.services_by_name["UpdateService"].full_name

    def is_busy(self, machine_id: str) -> bool:
        """Whether an update of the machine is open in this process."""
        return self._updates.open_of(machine_id) is not None

    async def recover(self, machine_id: str) -> bool:
        """Go on with an update that was open when the service ended; false if there was none."""
        if machine_id not in self._host.ledger.machines(Role.UPDATE):
            return False
        work = self._updating(machine_id)
        if isinstance(work.state, updating.Still):
            await work.close()
            for record in self._host.directory.list():
                if record.spec.uuid == machine_id and find_beside(record.paths) is not None:
                    await end_beside(record.paths)
            return False
        update_id = work.state.update.update_id
        names = [one.spec for one in self._host.directory.list() if one.spec.uuid == machine_id]
        message = pb.Update(
            id=update_id.hex(),
            machine=names[0].name if names else machine_id,
            machine_id=machine_id,
            memory_bytes=names[0].memory_bytes if names else 0,
            phase=pb.UPDATE_PHASE_SWITCHING,
        )
        self._follow(Run(self._host, UpdateResource(message), work))
        return True

    async def stop(self) -> None:
        """Give up what has not begun, and wait for the rest; what cannot be settled is left to the next start."""
        await asyncio.gather(*(run.interrupt() for run in list(self._running.values())))

    # Calls

    async def CheckUpdate(  # noqa: N802 - named by the contract
        self,
        request: pb.CheckUpdateRequest,
        context: Context,  # noqa: ARG002 - gRPC's
    ) -> pb.CheckUpdateResponse:
        """Say what stands in the way, and change nothing."""
        _, found = await self._examine(request.machine, request.target)
        return pb.CheckUpdateResponse(
            eligible=not found.obstacles,
            obstacles=[
                pb.UpdateObstacle(id=one.id, message=one.message, object=one.object, remedy=one.remedy)
                for one in found.obstacles
            ],
            old_version=found.old_version,
            new_version=found.new_version,
        )

    async def UpdateInPlace(  # noqa: N802 - named by the contract
        self,
        request: pb.UpdateInPlaceRequest,
        context: Context,  # noqa: ARG002 - gRPC's
    ) -> pb.UpdateInPlaceResponse:
        """Start an update, unless this request has started one already."""
        _check_request_id(request.request_id)
        max_pause_s = _max_pause_s(request)
        async with self._starting:
            update = self._updates.of_request(request.request_id)
            if update is None:
                update = await self._start(request, max_pause_s)
        span_attributes(update_id=update.id)
        return pb.UpdateInPlaceResponse(update=update.snapshot())

    async def GetUpdate(  # noqa: N802 - named by the contract
        self,
        request: pb.GetUpdateRequest,
        context: Context,  # noqa: ARG002 - gRPC's
    ) -> pb.GetUpdateResponse:
        """Return one update."""
        return pb.GetUpdateResponse(update=self._updates.get(required(request.id, "id")).snapshot())

    async def WatchUpdate(  # noqa: N802 - named by the contract
        self,
        request: pb.WatchUpdateRequest,
        context: Context,  # noqa: ARG002 - gRPC's
    ) -> AsyncIterator[pb.WatchUpdateResponse]:
        """Send the update now and after each change until it has ended."""
        async for message in self._updates.get(required(request.id, "id")).watch():
            yield pb.WatchUpdateResponse(update=message)

    # What they are made of

    async def _examine(self, machine: str, target: pb.UpdateTarget) -> tuple[MachineRecord, Examined]:
        record = self._host.directory.find(required(machine, "machine"))
        rights = await asyncio.to_thread(self._host.ledger.rights, record.spec.uuid)
        busy = self._is_busy(record.spec.uuid)
        return record, await self._check.examine(record, target, rights, busy)

    async def _start(self, request: pb.UpdateInPlaceRequest, max_pause_s: float) -> UpdateResource:
        record, found = await self._examine(request.machine, request.target)
        found.insist()
        # Nothing was awaited since it was found to be free but for the answer of its hypervisor: looked at once more.
        if (busy := self._is_busy(record.spec.uuid)) or self.is_busy(record.spec.uuid):
            raise_busy(record, busy)
        update_id = uuid.uuid4().bytes
        message = pb.Update(
            id=update_id.hex(),
            machine=record.spec.name,
            machine_id=record.spec.uuid,
            memory_bytes=record.spec.memory_bytes,
            old_version=found.old_version,
            new_version=found.new_version,
            pid=record.pid or 0,
        )
        message.max_pause.FromNanoseconds(int(max_pause_s * 1e9))
        work = self._updating(record.spec.uuid)
        event = self._announcements.announce(
            record.spec,
            pause_s=max_pause_s,
            description=policy.MAINTENANCE,
            notice_s=request.notice.ToNanoseconds() / 1e9 if request.HasField("notice") else None,
        )
        message.event_id = event.id
        run = Run(
            self._host, UpdateResource(message), work, found=found, event=event, max_pause_s=max_pause_s
        )
        self._follow(run, request.request_id)
        return run.update

    def _follow(self, run: Run, request_id: str = "") -> None:
        self._updates.add(run.update, request_id)
        self._running[run.update.id] = run
        run.start().add_done_callback(lambda _: self._running.pop(run.update.id, None))

    def _updating(self, machine_id: str) -> Updating:
        return Updating(
            machine_id,
            self._host.ledger,
            self._host.directory,
            on_broken_journal=self._host.journal_broken,
        )


class Run:
    """One update that goes on in a task of its own: a new one, or one that an earlier process left open."""

    def __init__(
        self,
        host: Host,
        update: UpdateResource,
        work: Updating,
        *,
        found: Examined | None = None,
        event: Announced | None = None,
        max_pause_s: float = DEFAULT_MAX_PAUSE_S,
    ) -> None:
        self.update = update
        self.retry_s = host.config.handoff_retry_s
        self.pause = Pause()
        self._host = host
        self._work = work
        self._found = found
        self._event = event
        self._max_pause_s = max_pause_s
        self._pause_s: float | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> asyncio.Task[None]:
        """Begin, in a task of its own."""
        self._task = asyncio.create_task(self._run(), name=f"update-{self.update.id}")
        return self._task

    async def interrupt(self) -> None:
        """The service stops."""
        assert self._task is not None
        self.pause.end()
        if self.update.message.phase in {pb.UPDATE_PHASE_UNSPECIFIED, pb.UPDATE_PHASE_ANNOUNCED}:
            self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def paused(self) -> None:
        """The guest is about to be paused."""
        if self._event is not None:
            self._event.started()
        await self.update.enter(pb.UPDATE_PHASE_SWITCHING)

    async def resumed(self, pause_s: float) -> None:
        """The guest goes on, after so long."""
        self._pause_s = pause_s
        self.update.message.pause.FromNanoseconds(int(pause_s * 1e9))
        if self._event is not None:
            self._event.over(lasted_s=pause_s)

    async def _run(self) -> None:
        try:
            async with phase("update", machine=self.update.message.machine, update_id=self.update.id):
                self.update.message.trace_id = current_trace_id()
                await self._through()
        except ServiceStoppingError:
            if self._event is not None:
                self._event.leave_open()
        except JournalDamagedError as error:
            _LOG.critical("an update stops", update=self.update.id, detail=error.message)
        except asyncio.CancelledError:
            stopping = ServiceStoppingError("the source service is stopping")
            await self.update.end(pb.UPDATE_OUTCOME_ROLLED_BACK, stopping)
        finally:
            if self._event is not None:
                self._event.over(why=self.update.message.reason.message[:200])
            await self._work.close()

    async def _through(self) -> None:
        error: VmferryError | None = None
        try:
            if self._found is None:
                await self._work.settle(_RESTARTED, self)
                error = None if self._work.completed else UpdateUndoneError(_RESTARTED)
            else:
                await self._announced()
                await self.update.enter(pb.UPDATE_PHASE_STARTING)
                update_id = bytes.fromhex(self.update.id)
                await self._work.run(update_id, self._found.spec, self._max_pause_s, self, Comparison())
        except (ServiceStoppingError, JournalDamagedError):
            raise
        except VmferryError as undone:
            error = undone
        except OSError as undone:
            error = MachineFailedError(f"the update failed: {undone}")
        await self._finish(error)

    async def _announced(self) -> None:
        assert self._event is not None
        await self.update.enter(pb.UPDATE_PHASE_ANNOUNCED)
        async with phase("announce", event_id=self._event.id):
            await self._event.allowed()

    async def _finish(self, error: VmferryError | None) -> None:
        await self.update.enter(pb.UPDATE_PHASE_FINISHING)
        if self._work.lost:
            await self.update.end(
                pb.UPDATE_OUTCOME_LOST, error or MachineFailedError("the hypervisor crashed meanwhile")
            )
            return
        with contextlib.suppress(VmferryError):
            await self._look(self._host.directory.find(self.update.message.machine_id))
        if self._work.completed:
            await self.update.end(pb.UPDATE_OUTCOME_COMPLETED)
        else:
            await self.update.end(pb.UPDATE_OUTCOME_ROLLED_BACK, error)

    async def _look(self, record: MachineRecord) -> None:
        """Put the clock right, and say what runs the guest now."""
        message = self.update.message
        message.pid = record.pid or 0
        machine = self._host.directory.open(record)
        try:
            if self._pause_s is not None or self._found is None:  # an earlier process may have paused it
                limit_s = self._host.config.agent_timeout_s
                tell(await put_right(machine, self._pause_s, agent_timeout_s=limit_s), message.clock)
            if self._work.completed and not message.new_version:
                message.new_version = await machine.version()
        finally:
            await machine.close()


def raise_busy(record: MachineRecord, busy: str) -> None:
    """Refuse: something else is going on with the machine."""
    raise MachineBusyError(busy or f"{record.spec.name} is being updated", machine=record.spec.uuid)


def _max_pause_s(request: pb.UpdateInPlaceRequest) -> float:
    if not request.HasField("max_pause"):
        return DEFAULT_MAX_PAUSE_S
    seconds = request.max_pause.ToNanoseconds() / 1e9
    if not LEAST_MAX_PAUSE_S <= seconds <= 3600:  # noqa: PLR2004 - an hour
        raise InvalidArgumentError("max_pause must be from 50 ms to an hour", field="max_pause")
    return seconds


def _check_request_id(request_id: str) -> None:
    try:
        uuid.UUID(request_id)
    except ValueError:
        raise InvalidArgumentError("request_id must be a UUID", field="request_id") from None
