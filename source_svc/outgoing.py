"""One migration from its start to its end: negotiate, reserve, pre-copy, switch, hand over, release.

Promise: whatever fails before the right to run is given up, the guest runs on here and nothing is left at either
side; from then on only the destination's answer decides, however long it takes, and the guest stays paused here
until it has come. The guest is paused once, for the last round, the device state and the hand-off.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from functools import partial
from typing import Final

from source_svc.announcing import Announcements
from source_svc.clocks import ask_arrived, see_to_returned
from source_svc.copying import Copy, CopySettings
from source_svc.departure import Departure
from source_svc.ending import Deadline
from source_svc.files import incompatible, shown
from source_svc.following import Followed
from source_svc.forecasts import Forecasts
from source_svc.link import granted, until_reached
from source_svc.migrations import Migration
from source_svc.noticing import Notice
from source_svc.orders import Order
from source_svc.peer import Destination
from source_svc.planning import Plan
from source_svc.readiness import Readiness
from source_svc.room import has_no_room, until_room
from source_svc.streaming import StreamedCopy
from source_svc.switching import Switch
from source_svc.terms import Terms
from vmferry.config import HostConfig
from vmferry.errors import (
    CancelledByCallerError,
    InternalError,
    MachineFailedError,
    OutcomeUnknownError,
    PointOfNoReturnError,
    TooManyMigrationsError,
    VmferryError,
    WrongPhaseError,
)
from vmferry.failpoints import reach
from vmferry.handoff import source
from vmferry.handoff.states import Attempt, AttemptState
from vmferry.machines.qmp import QmpMachine
from vmferry.machines.throttle import Throttle
from vmferry.negotiation.path import STREAM
from vmferry.security.renewal import CurrentMaterial
from vmferry.telemetry.logs import bind_migration, get_logger
from vmferry.telemetry.tracing import context_of, phase, span_attributes, span_event
from vmferry.together import to_the_end, together
from vmferry.transfer.compression import methods
from vmferry.v1 import handoff_pb2
from vmferry.v1 import migration_pb2 as pb

_LOG: Final = get_logger(__name__)


class Outgoing(Followed):
    """A migration in progress."""

    def __init__(
        self,
        order: Order,
        migration: Migration,
        departure: Departure,
        machine: QmpMachine,
        destination: Destination,
        config: HostConfig,
        material: CurrentMaterial,
        plan: Plan,
        *,
        forecasts: Forecasts,
        announcements: Announcements,
        traceparent: str,
    ) -> None:
        self.migration = migration
        self.taken_in = False
        """The destination has room for it, and has taken it."""
        self.on_taken_in: Callable[[], None] = lambda: None
        self.no_room = False
        """It ended because the destination had no room; nothing came of it, and it may be begun again."""
        self.ended_by: VmferryError | None = None
        """What put an end to it from outside: a caller, or its deadline."""
        self.retry_s = config.handoff_retry_s
        self.cold_boot_wait_s = config.cold_boot_wait_s
        self.reason = ""
        self._order = order
        self._departure = departure
        self._machine = machine
        self._destination = destination
        self._config = config
        self._material = material
        self._own = material.get().identity.uri
        self._plan = plan
        self._forecasts = forecasts
        self._notice = Notice(announcements, migration, machine.spec, order)
        self._subject = order.subject(machine, destination, config)
        self._terms = Terms(order)
        self._throttle = Throttle.of(machine, departure.held_back)
        self._began = False
        self._committed = False
        self._traceparent = traceparent
        self._deadline = Deadline(self._end)
        self._switch: Switch | None = None
        self._may_be_paused = False
        """The guest was, or is, or will be paused for this migration, even if nobody said that it was."""
        self._last_heard: AttemptState | None = None
        self._copy: Copy | StreamedCopy | None = None
        self._attempt: Attempt | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> asyncio.Task[None]:
        """Begin, in a task of its own."""
        # In the trace of whoever asked for it, whatever the queue did meanwhile.
        context = context_of(self._traceparent)
        self._task = asyncio.create_task(self._run(), name=f"migration-{self.migration.id}", context=context)
        self._deadline.keep(self.migration.message.options)
        return self._task

    @property
    def departure(self) -> Departure:
        """The machine's journal, which it holds."""
        return self._departure

    def cancel(self, why: str) -> None:
        """Give the machine back, if that is still this host's to decide.

        Raises:
            PointOfNoReturnError: the right to run has been given up.
        """
        if self._committed:
            raise PointOfNoReturnError("the hand-off has begun", migration=self.migration.id)
        self._end(CancelledByCallerError(why))

    def switch_now(self) -> None:
        """Pause the guest after the round that is being copied, whatever the pause; twice is as good as once."""
        self._terms.switch_now()

    async def update(self, options: pb.MigrationOptions, order: Order) -> None:
        """Go on with other options.

        Raises:
            WrongPhaseError: it is too late for that, or cannot be changed on the way.
        """
        before = self._terms.limits.max_throttle_percent
        if self.migration.message.path == STREAM and order.max_throttle_percent and not before:
            raise WrongPhaseError(
                "a hypervisor that streams its memory must know from the beginning that it may slow its guest down",
                field="max_throttle_percent",
                remedy="Cancel the migration and start it again with max_throttle_percent.",
            )
        self._terms.change(order)
        self.migration.message.options.CopyFrom(options)
        self._deadline.keep(self.migration.message.options)
        await self.migration.touch()

    async def interrupt(self) -> None:
        """The service stops: give the machine back, or leave an open hand-off to the next start."""
        assert self._task is not None
        self._departure.pause.end()
        if not self._committed:
            self.cancel("the source service stops")
        await asyncio.gather(self._task, return_exceptions=True)

    def _end(self, error: VmferryError) -> None:
        if not self._committed and self.ended_by is None and self._task is not None:
            self.ended_by = error
            if self._began:  # a task that is cancelled before that would do nothing at all
                self._task.cancel()

    async def _run(self) -> None:
        self._began, migration_id = True, self.migration.id
        bind_migration(migration_id)
        try:
            async with phase("migrate", machine=self.migration.message.machine, migration_id=migration_id):
                try:
                    await self._work()
                except BaseException as error:
                    if self._committed:
                        raise
                    # A second cancellation must not interrupt giving the machine back.
                    await to_the_end(self._give_back(self._translated(error)))
        finally:
            self._notice.close(unsettled=not isinstance(self._departure.state, source.Quiet))
            self._deadline.cancel()
            await self._tidy_up()
            await self._destination.close()
            self._departure.close()

    async def _work(self) -> None:
        if self.ended_by is not None:
            raise self.ended_by
        async with self._terms.total_timeout():
            await self._negotiate()
        await self._notice.give()
        async with self._terms.total_timeout():
            await self._reserve()
            await self.migration.enter(pb.MIGRATION_PHASE_PRECOPYING)
            assert self._copy is not None
            async with phase("precopy", path=self.migration.message.path, tracker=self._copy.tracker_kind):
                await self._copy.converge(self._readiness.both)
        await self.migration.enter(pb.MIGRATION_PHASE_SWITCHING)
        async with phase("switchover"):
            ready = await self._switch_over()
            self._committed = True  # from here on nobody can cancel
            await self.migration.enter(pb.MIGRATION_PHASE_HANDING_OFF)
            async with phase("commit"):
                tells = await self._departure.apply(ready)
                if isinstance(self._departure.state, source.Sealed):
                    self._committed = False
                    raise WrongPhaseError("the destination is not ready with what was sealed")
                await self._departure.settle(self._destination, tells, self)
        await self._conclude()

    # Phases

    async def _negotiate(self) -> None:
        await self.migration.enter(pb.MIGRATION_PHASE_NEGOTIATING)
        async with phase("negotiate"):
            order = self._order
            self._plan.forecast = self._forecasts.planned(self._subject)
            report = await self._plan.report(
                self._machine,
                self._destination,
                order.tracker,
                path=order.path,
                compression=order.compression,
                compare_bytes=order.compare_bytes,
            )
            message = self.migration.message
            message.tracker, message.path = report.tracker, report.path
            message.path_reason, self._encodings = report.path_reason, report.encodings
            span_attributes(tracker=report.tracker, path=report.path, findings=len(report.findings))
            if report.blocking:
                raise incompatible(report.blocking)
            if full := [found.message for found in report.findings if found.id == "host.full"]:
                raise TooManyMigrationsError(full[0], limit="max_incoming")
            self._attempt = self._plan.attempt(
                self._order.migration_id, self._departure.next_attempt_number(), self._destination.address
            )
            self._protocol_version = report.protocol_version

    async def _reserve(self) -> None:
        await self.migration.enter(pb.MIGRATION_PHASE_RESERVING)
        assert self._attempt is not None
        order, attempt = self._order, self._attempt
        tracker = self.migration.message.tracker
        async with (
            self._forecasts.meanwhile(self._subject, tracker, self.migration.message),
            phase("reserve"),
        ):
            await self._departure.begin(attempt)
            begun = await self._begin(attempt)
            self.taken_in = True
            self.on_taken_in()
            reach("source.accepted")
        streamed = self.migration.message.path == STREAM
        self._terms.live(live=not streamed or self._machine.spec.streams_live)
        # Outside of the phase: lanes live longer, and note on their span when they had to be reopened.
        settings = CopySettings(
            self._plan.budget.window(
                order.lanes, min(self._config.window_bytes, begun.window_bytes), self._config.chunk_bytes
            ),
            self._terms,
            self._throttle,
            order.stall_timeout_s,
            granted(order.reconnect_timeout_s, begun),
            tracker,
            self._plan.trackers,
            self._config.state_dir,
            methods(self._encodings, order.compression),
            self.migration.message.prediction.link_bytes_per_second,
        )
        if streamed:
            self._may_be_paused = True  # by the hypervisor itself
            self._copy = StreamedCopy(self._machine, self._destination, self.migration, settings)
        else:
            self._copy = Copy(self._machine, self._destination, self.migration, settings)
        await self._copy.open(order.migration_id, begun.transfer_token)
        self._readiness = Readiness(
            attempt,
            self._copy,
            self._departure,
            self._destination,
            self._material,
            switch_timeout_s=self._config.switch_timeout_s,
            reserve_timeout_s=order.reserve_timeout_s,
            reconnect_timeout_s=settings.reconnect_timeout_s,
        )

    async def _begin(self, attempt: Attempt) -> handoff_pb2.BeginResponse:
        """Show the destination what is to come, and have it take the memory."""
        order, machine = self._order, self._machine
        async with shown(machine.spec, self._plan.contents, pid=machine.pid) as files:
            files.check()
            ask = partial(
                self._destination.begin,
                attempt,
                ticket=order.ticket,
                spec=machine.spec,
                lanes=order.lanes,
                protocol_version=self._protocol_version,
                files=files.identities,
                path=self.migration.message.path,
                encodings=self._encodings,
                reconnect_timeout_s=order.reconnect_timeout_s,
                timeout_s=order.reserve_timeout_s,
            )
            reached = partial(until_reached, ask, "Begin", order.reconnect_timeout_s)
            return await until_room(reached, self.migration, self._config)

    async def _switch_over(self) -> source.Heard:
        """Pause the guest and bring the destination to READY."""
        assert self._copy is not None
        assert self._attempt is not None
        self._may_be_paused = True
        self._switch = Switch(
            self._attempt,
            self._copy,
            self._departure,
            self._destination,
            self._machine,
            self._terms,
            self._notice,
            compare_bytes=self._order.compare_bytes,
            switch_timeout_s=self._config.switch_timeout_s,
        )
        return await self._switch.to_ready()

    # Afterwards

    async def hears(self, heard: source.Heard) -> None:
        """The destination said how the attempt stands."""
        self._last_heard = heard.state
        if heard.state is AttemptState.RUNNING:
            self._notice.resumed()
            paused_at = self._switch.paused_at if self._switch is not None else 0.0
            if paused_at:
                downtime_s = time.monotonic() - paused_at
                self.migration.message.downtime.FromNanoseconds(int(downtime_s * 1e9))
                span_attributes(downtime_ms=round(downtime_s * 1e3, 3))
            self.migration.message.owner = self._destination.expected.uri
            await self.migration.enter(pb.MIGRATION_PHASE_RELEASING)
        # What follows takes hold of the hypervisor by itself, and QEMU serves one client at a time.
        await self._machine.close()

    async def waits(self, why: str) -> None:
        """The outcome is not known yet."""
        if isinstance(self._departure.state, source.HandedOff):
            self.migration.message.owner = ""
        await self._machine.close()  # for whoever will resume it: QEMU serves one client at a time
        span_event("outcome unknown", why=why)
        await self.migration.report(pb.MIGRATION_OUTCOME_UNKNOWN, OutcomeUnknownError(why))

    async def stays_paused(self, why: MachineFailedError) -> None:
        """The machine belongs here and its guest cannot go on yet."""
        span_event("not resumed yet", why=why.message)
        self.migration.message.owner = self._own
        await self.migration.report(pb.MIGRATION_OUTCOME_UNSPECIFIED, why)

    async def _conclude(self) -> None:
        last_round_bytes = self._copy.last_round_bytes if isinstance(self._copy, Copy) else 0
        await self._tidy_up()
        await self._departure.release()
        await self._departure.keep_resuming(self)
        await self._clock()
        if self._last_heard is AttemptState.RUNNING:
            await self.migration.end(pb.MIGRATION_OUTCOME_COMPLETED)
            self._forecasts.judge(self._subject, self.migration.message, last_round_bytes)
            return
        self.migration.message.owner = self._own
        error = MachineFailedError("the destination returned the machine instead of running it")
        await self.migration.end(pb.MIGRATION_OUTCOME_FAILED, self._departure.overridden or error)

    async def _give_back(self, error: VmferryError) -> None:
        """The guest goes on here, and the destination keeps nothing."""
        self.no_room = has_no_room(error)
        log = _LOG.info if self.no_room else _LOG.warning
        log("giving the machine back", reason=error.reason, detail=error.message)
        span_attributes(reason=error.reason)
        self.reason = f"{error.reason}: {error.message}"
        await self._tidy_up()
        wanted = source.AbortWanted(
            self.reason,
            memory_intact=await self._departure.memory_intact(),
            tail_certain=self._departure.tail_certain,
            never_sealed=isinstance(self._departure.state, source.Begun),
        )
        tells = await self._departure.apply(wanted)
        if isinstance(self._departure.state, source.Quiet):
            goodbye = [self._say_goodbye(self._attempt)] if self._attempt is not None and tells else []
            await together(*goodbye, self._keep_resuming())
            self._notice.resumed()
        else:
            await self._departure.settle(self._destination, tells, self)
            await self._departure.release()
            await self._keep_resuming()
        await self._clock()
        if self._last_heard is AttemptState.RUNNING:
            await self.migration.end(pb.MIGRATION_OUTCOME_COMPLETED)
            return
        self.migration.message.owner = self._own
        if self.no_room:
            return
        cancelled = isinstance(error, CancelledByCallerError) and not self._departure.overridden
        outcome = pb.MIGRATION_OUTCOME_CANCELLED if cancelled else pb.MIGRATION_OUTCOME_FAILED
        await self.migration.end(outcome, self._departure.overridden or error)

    async def _clock(self) -> None:
        if self._last_heard is AttemptState.RUNNING:
            await ask_arrived(self._destination, self._attempt, self.migration, self._config)
        elif self._may_be_paused:
            paused_at = self._switch.paused_at if self._switch is not None else 0.0
            await see_to_returned(self._departure, self.migration, paused_at, self._config)

    async def _keep_resuming(self) -> None:
        """See that a guest that was paused for this migration goes on, however long its hypervisor refuses."""
        if self._may_be_paused or self._throttle.used:
            await self._departure.keep_resuming(self)

    async def _say_goodbye(self, attempt: Attempt) -> None:
        """Spare the destination waiting for its own time limit."""
        with contextlib.suppress(VmferryError):  # told again by ``farewells`` until it answers
            await self._destination.tell("Abort", attempt, digest=b"", reason=self.reason)

    async def _tidy_up(self) -> None:
        copy, self._copy = self._copy, None
        if copy is not None:
            await copy.close()
        await self._machine.close()

    def _translated(self, error: BaseException) -> VmferryError:
        if isinstance(error, VmferryError):
            return error
        if isinstance(error, asyncio.CancelledError):
            return self.ended_by or CancelledByCallerError("the migration was interrupted")
        _LOG.error("a migration failed unexpectedly", exc_info=error)
        return InternalError(f"unexpected: {error!r}")
