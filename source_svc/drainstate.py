"""What this host knows of its drain: the resource that callers see, and the record on disk.

Promise: what callers are shown is on disk; every change has a higher revision and wakes every watcher. It says
DRAINED once no machine is left, and not before.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Container, Iterable, Sequence
from typing import Final

from google.protobuf.timestamp_pb2 import Timestamp

from source_svc.drain_figures import EMPTIED, UNDONE, drain_ended
from vmferry.config import HostConfig
from vmferry.drain.activity import turns
from vmferry.drain.planner import Decision, Machine, Standing
from vmferry.drain.record import DrainFile
from vmferry.errors import ConfigError, VmferryError
from vmferry.security.identity import Identity
from vmferry.security.warrants import VerifiedWarrant
from vmferry.telemetry.logs import get_logger
from vmferry.telemetry.tracing import current_trace_id, current_traceparent
from vmferry.together import to_the_end
from vmferry.v1 import drain_pb2 as dp
from vmferry.v1 import machine_pb2
from vmferry.v1 import migration_pb2 as pb

_LOG: Final = get_logger(__name__)
_LONGEST_TEXT: Final = 500
_REMEMBERED: Final = 100
"""Requests that a repetition is recognised of."""
_STATES: Final = {
    Standing.READY: dp.DRAINED_MACHINE_STATE_WAITING,
    Standing.MOVING: dp.DRAINED_MACHINE_STATE_MOVING,
    Standing.BLOCKED: dp.DRAINED_MACHINE_STATE_BLOCKED,
    Standing.HELD: dp.DRAINED_MACHINE_STATE_STAYS,
}


class DrainBook:
    """The drain of one host, in memory and on disk."""

    def __init__(self, config: HostConfig, own: Identity) -> None:
        self.file = DrainFile(config.state_dir)
        self.warranted: Container[str] = frozenset()
        """Machines that may be moved."""
        self.damaged: ConfigError | None = None
        self._own = own
        self._config = config
        self._changed = asyncio.Condition()
        self._saving = asyncio.Lock()
        self.record = self._load()
        self._shown = self._copy()

    @property
    def drain(self) -> dp.Drain:
        """The resource, to be changed; callers get :meth:`snapshot`."""
        return self.record.drain

    @property
    def items(self) -> dict[str, dp.DrainedMachine]:
        """Its machines, by identity."""
        return {item.machine_id: item for item in self.drain.machines}

    def snapshot(self) -> dp.Drain:
        """The resource as it was last written to disk."""
        return self._shown

    def knows(self, request_id: str) -> bool:
        """Whether a request was answered before."""
        return request_id in self.record.request_ids

    async def begin(self, request: dp.DrainHostRequest, warrant: VerifiedWarrant, caller: Identity) -> None:
        """Write down that this host is to be empty; what is known of its machines is kept while it is.

        Raises:
            ConfigError: the disk does not take it; nothing has changed.
        """
        afresh = not self.record.draining or self.damaged is not None
        trace_id, traceparent = current_trace_id(), current_traceparent()
        now = _now()

        def change(record: dp.DrainRecord) -> None:
            drain = record.drain
            if afresh:
                moving = [one for one in drain.machines if one.state == dp.DRAINED_MACHINE_STATE_MOVING]
                drain.CopyFrom(dp.Drain(machines=moving, revision=drain.revision, trace_id=trace_id))
                drain.create_time.CopyFrom(now)
                record.traceparent, record.counted = traceparent, False
            record.draining = True
            record.warrant = request.warrant
            record.options.CopyFrom(request.options)
            record.request_ids.append(request.request_id)
            del record.request_ids[:-_REMEMBERED]
            del drain.destinations[:]
            drain.destinations.extend(request.destinations)
            for field in ("end_time", "problem"):
                drain.ClearField(field)
            drain.host, drain.caller, drain.request_id = self._own.uri, caller.uri, request.request_id
            drain.warrant_expire_time.FromDatetime(warrant.expires)
            drain.state = dp.DRAIN_STATE_DRAINING

        await to_the_end(self._change(change))
        self.warranted = frozenset(warrant.machines)

    async def undo(self, caller: Identity) -> None:
        """Write down that this host need not be empty any more.

        Raises:
            ConfigError: the disk does not take it; nothing has changed.
        """
        now = _now()

        def change(record: dp.DrainRecord) -> None:
            record.draining = False
            record.warrant = b""
            drain = record.drain
            drain.host, drain.caller = self._own.uri, caller.uri
            drain.state = dp.DRAIN_STATE_NONE
            for field in ("problem", "activity"):
                drain.ClearField(field)
            drain.end_time.CopyFrom(now)
            for item in drain.machines:
                item.ClearField("turn")
                if item.state == dp.DRAINED_MACHINE_STATE_WAITING:
                    item.state = dp.DRAINED_MACHINE_STATE_STAYS

        await to_the_end(self._change(change))
        if self.drain.HasField("create_time"):
            drain_ended(self.record, UNDONE)

    async def save(self) -> None:
        """Put it on disk and tell watchers, if anything is different; that is done even if the caller is cancelled.

        Raises:
            ConfigError: the disk does not take it; watchers are told nothing.
        """
        await to_the_end(self._save())

    async def _save(self) -> None:
        async with self._saving:
            self._say_about_newcomers(self.record)
            if self._same():
                return
            self.drain.revision += 1
            record = dp.DrainRecord()
            record.CopyFrom(self.record)
            await self._write(record)
        await self._tell()

    async def _change(self, change: Callable[[dp.DrainRecord], None]) -> None:
        """Change the record once the disk has taken the change, which must be the same both times.

        What came about while it was written is kept.
        """
        async with self._saving:
            record = dp.DrainRecord()
            record.CopyFrom(self.record)
            change(record)
            record.drain.revision += 1
            damaged, self.damaged = self.damaged, None  # what cannot be read is replaced
            self._say_about_newcomers(record)
            try:
                await self._write(record)
            except VmferryError:
                self.damaged = damaged
                raise
            change(self.record)
            self._say_about_newcomers(self.record)
            self.drain.revision = record.drain.revision
        await self._tell()

    async def _write(self, record: dp.DrainRecord) -> None:
        await asyncio.to_thread(self.file.write, record)
        self._shown = record.drain

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def watch(self) -> AsyncIterator[dp.Drain]:
        """The resource now and after each change, until nothing is under way and nothing will be begun."""
        while True:
            shown = self.snapshot()
            yield shown
            if _is_over(shown):
                return
            async with self._changed:
                while self._shown.revision <= shown.revision:
                    await self._changed.wait()

    # Machines

    def destination(self, host: str) -> pb.Destination | None:
        """One of the hosts that machines may go to."""
        return next((one for one in self.drain.destinations if one.host == host), None)

    def item(self, machine_id: str, name: str, memory_bytes: int) -> dp.DrainedMachine:
        """What is known of a machine; made if there is nothing yet. One that came back is a new one."""
        found = self.items.get(machine_id)
        if found is not None and found.state == dp.DRAINED_MACHINE_STATE_MOVED:
            self.drain.machines.remove(found)
            found = None
        if found is None:
            found = self.drain.machines.add(
                machine=name, machine_id=machine_id, state=dp.DRAINED_MACHINE_STATE_WAITING
            )
        if name:
            found.machine = name
        if memory_bytes:
            found.memory_bytes = memory_bytes
        return found

    def gone(self, here: Container[str]) -> list[dp.DrainedMachine]:
        """Machines that are not here any more and are not noted as moved, nor followed."""
        settled = (dp.DRAINED_MACHINE_STATE_MOVED, dp.DRAINED_MACHINE_STATE_MOVING)
        return [
            item for item in self.drain.machines if item.machine_id not in here and item.state not in settled
        ]

    def note_gone(self, item: dp.DrainedMachine, *, moved: bool) -> None:
        """A machine is not here any more: another host has it, or somebody ended it."""
        if moved:
            item.state = dp.DRAINED_MACHINE_STATE_MOVED
            del item.obstacles[:]
        else:
            self.drain.machines.remove(item)

    def block(self, item: dp.DrainedMachine, machine: machine_pb2.Machine) -> None:
        """A machine must not be touched; say why."""
        if machine.HasField("blockage"):
            why = machine.blockage
            self.put(item, obstacle("", why.reason, why.message, why.remedy))
            return
        right = machine_pb2.MachineRight.Name(machine.right).removeprefix("MACHINE_RIGHT_")
        message = f"the journals of this host say {right} about {machine.name or machine.uuid}"
        self.put(
            item, obstacle("", right, message, "See what is known on both hosts: vmferry recover MACHINE.")
        )

    def put(self, item: dp.DrainedMachine, found: dp.DrainObstacle) -> None:
        """Note what is in a machine's way at a destination; what was noted of that before is replaced."""
        same = [
            one
            for one in item.obstacles
            if one.destination == found.destination and (one.tried == found.tried or found.tried)
        ]
        for one in same:
            if (one.reason, one.message, one.tried) == (found.reason, found.message, found.tried):
                return  # since then
            item.obstacles.remove(one)
        item.obstacles.append(found)

    def answered(
        self, item: dp.DrainedMachine, host: str, found: Iterable[dp.DrainObstacle], *, still_tried: bool
    ) -> None:
        """A destination was asked anew: what it said before counts no more; what it says again is as old as it was.

        Args:
            item: the machine.
            host: the destination.
            found: what is in the machine's way there.
            still_tried: a migration that came back from there is still worth telling of.
        """
        before = {(one.destination, one.reason, one.message): one for one in item.obstacles if not one.tried}
        kept = [
            one for one in item.obstacles if one.destination not in ("", host) or (one.tried and still_tried)
        ]
        kept += [before.get((one.destination, one.reason, one.message), one) for one in found]
        obstacles = [dp.DrainObstacle.FromString(one.SerializeToString()) for one in kept]
        del item.obstacles[:]
        item.obstacles.extend(obstacles)

    # The whole

    def problem(self, error: VmferryError | None) -> None:
        """What holds all of it up."""
        self.drain.ClearField("problem")
        if error is not None:
            self.drain.problem.CopyFrom(
                pb.MigrationReason(reason=error.reason, message=error.message, remedy=error.instance_remedy)
            )

    async def hold_up(self, error: VmferryError) -> None:
        """Something kept the drain from going on; it is tried again."""
        self.problem(error)
        try:
            await self.save()
        except ConfigError as failure:
            _LOG.error("the drain cannot be written down", detail=failure.message)

    async def settle(self, machines: Sequence[Machine], decision: Decision, activity: str) -> None:
        """Say how each machine and the whole stand, as it was decided, and what comes next."""
        items = self.items
        turn = {machine_id: number for number, machine_id in enumerate(turns(decision), 1)}
        for machine in machines:
            item = items[machine.id]
            if item.state == dp.DRAINED_MACHINE_STATE_MOVED or (
                item.state == dp.DRAINED_MACHINE_STATE_MOVING and machine.standing is Standing.READY
            ):
                continue  # it was begun, or has ended, meanwhile
            stays = machine.id in decision.stays
            item.state = dp.DRAINED_MACHINE_STATE_STAYS if stays else _STATES[machine.standing]
        for item in items.values():
            waits = item.state == dp.DRAINED_MACHINE_STATE_WAITING
            item.turn = turn.get(item.machine_id, 0) if waits else 0
        drain = self.drain
        drain.activity = "" if drain.HasField("problem") else activity
        followed = any(item.state == dp.DRAINED_MACHINE_STATE_MOVING for item in drain.machines)
        if not machines and not followed:
            if drain.state != dp.DRAIN_STATE_DRAINED:
                drain.end_time.GetCurrentTime()
            drain.state = dp.DRAIN_STATE_DRAINED
            drain_ended(self.record, EMPTIED)
        else:
            drain.ClearField("end_time")
            stuck = not followed and (drain.HasField("problem") or decision.is_stuck(machines))
            drain.state = dp.DRAIN_STATE_STUCK if stuck else dp.DRAIN_STATE_DRAINING
        await self.save()

    def _say_about_newcomers(self, record: dp.DrainRecord) -> None:
        drain, by_settings = record.drain, self._config.draining
        drain.takes_newcomers = not (by_settings or record.draining or self.damaged)
        drain.newcomers_note = (
            "its configuration says draining = true" if by_settings and not record.draining else ""
        )

    def _load(self) -> dp.DrainRecord:
        try:
            record = self.file.read() or dp.DrainRecord()
        except ConfigError as error:
            _LOG.error("this host counts as being emptied", detail=error.message)
            self.damaged = error
            record = dp.DrainRecord(draining=True)
            record.drain.state = dp.DRAIN_STATE_STUCK
            record.drain.problem.CopyFrom(
                pb.MigrationReason(reason=error.reason, message=error.message, remedy=error.instance_remedy)
            )
        record.drain.host = self._own.uri
        if record.drain.state == dp.DRAIN_STATE_UNSPECIFIED:
            record.drain.state = dp.DRAIN_STATE_NONE
        return record

    def _copy(self) -> dp.Drain:
        self._say_about_newcomers(self.record)
        copy = dp.Drain()
        copy.CopyFrom(self.record.drain)
        return copy

    def _same(self) -> bool:
        return self.damaged is None and self.drain == self._shown


def obstacle(
    destination: str, reason: str, message: str, remedy: str, *, tried: bool = False
) -> dp.DrainObstacle:
    """What is in a machine's way, found now."""
    found = dp.DrainObstacle(
        destination=destination,
        reason=reason,
        message=message[:_LONGEST_TEXT],
        remedy=remedy[:_LONGEST_TEXT],
        tried=tried,
    )
    found.time.GetCurrentTime()
    return found


def _now() -> Timestamp:
    found = Timestamp()
    found.GetCurrentTime()
    return found


def _is_over(drain: dp.Drain) -> bool:
    moving = any(item.state == dp.DRAINED_MACHINE_STATE_MOVING for item in drain.machines)
    return drain.state == dp.DRAIN_STATE_DRAINED or (drain.state == dp.DRAIN_STATE_NONE and not moving)
