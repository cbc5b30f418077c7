"""The queue: migrations that were accepted, until there is room for them here and at their destinations.

Promise: who begins when is decided by ``queue_policy``; whatever waits can be cancelled, has the deadline that its
caller gave it and that of its ticket, and is there again after a restart; a destination that has no room makes a
migration wait, never fail. Nothing is held for a migration that waits: no journal, connection or hypervisor.

For others in this service: :meth:`Dispatcher.order` does what ``StartMigration`` does, :meth:`Dispatcher.cancel` ends
what waits, and each migration's ``queue`` field says where it stands; those in phase QUEUED are the queue's length.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final

from source_svc import queue_policy
from source_svc.acceptance import Acceptance, Accepted
from source_svc.ending import check_deadline, deadline_passed
from source_svc.migrations import Migration, Migrations
from source_svc.orders import check_request_id, read_update
from source_svc.outgoing import Outgoing
from source_svc.recovery import Recovered
from source_svc.underway import Underway
from vmferry.errors import (
    CancelledByCallerError,
    InternalError,
    InvalidArgumentError,
    ServiceStoppingError,
    TicketExpiredError,
    TooManyMigrationsError,
    VmferryError,
)
from vmferry.rpc.daemon import Host
from vmferry.security.identity import Identity
from vmferry.security.tickets import CLOCK_SKEW
from vmferry.telemetry.logs import get_logger
from vmferry.telemetry.tracing import past_phase
from vmferry.v1 import migration_pb2 as pb

_LOG: Final = get_logger(__name__)
_LONGEST_SLEEP_S: Final = 30.0
"""The clock on the wall may be set meanwhile, and deadlines are by it."""


class Dispatcher:
    """The queue of one source service."""

    def __init__(
        self, host: Host, migrations: Migrations, underway: Underway, acceptance: Acceptance
    ) -> None:
        self._host = host
        self._config = host.config
        self._migrations = migrations
        self._underway = underway
        self._acceptance = acceptance
        self._patience = queue_policy.Patience(host.config.queue_retry_s, host.config.max_queue_retry_s)
        self._waiting: dict[str, Accepted] = {}
        self._begun: dict[str, Accepted] = {}
        """Those that left the queue and may come back to it."""
        self._full: dict[str, queue_policy.Full] = {}
        self._served: dict[str, int] = {}
        self._numbers = itertools.count(1)
        self._due = asyncio.Event()
        self._ordering = asyncio.Lock()
        self._deciding = asyncio.Lock()
        self._stopping = False
        self._task: asyncio.Task[None] | None = None
        underway.on_end.append(self._left)

    def start(self) -> None:
        """Begin to let migrations begin."""
        self._task = asyncio.create_task(self._run(), name="queue")

    async def stop(self) -> None:
        """Let nothing begin any more; what waits is left to the next start."""
        self._stopping = True
        if self._task is not None:
            async with self._deciding:  # what is just beginning is then interrupted like the others
                self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def close(self) -> None:
        """Have what came back to the queue while the service stopped known to the next start."""
        for accepted in list(self._waiting.values()):
            if accepted.ended_by is not None:
                await self._end(accepted, accepted.ended_by)
            elif not accepted.remembered:
                await self._remember(accepted)

    async def order(
        self, request: pb.StartMigrationRequest, caller: Identity, *, traceparent: str
    ) -> Migration:
        """Accept a migration and have it begin as soon as there is room, unless this request was answered with one.

        Args:
            request: what is asked for.
            caller: who asks, and takes turns with others.
            traceparent: the span that all of it hangs under.

        Raises:
            VmferryError: it cannot be meant, or can be known to fail.
        """
        check_request_id(request.request_id)
        async with self._ordering:
            migration = await self._migrations.of_request(request.request_id)
            if migration is not None:
                return migration
            if self._stopping:
                raise ServiceStoppingError("the source service is stopping")
            if len(self._waiting) >= self._config.max_queued:
                raise TooManyMigrationsError(
                    f"{self._config.max_queued} migrations wait at this host already", limit="max_queued"
                )
            accepted = await self._acceptance.accept(request, caller, traceparent=traceparent)
            migration = accepted.migration
            self._migrations.add(migration)
            self._add(accepted)
            await self._remember(accepted)
        await self._decide()
        return migration

    async def restore(self, accepted: Accepted) -> None:
        """Take in what waited when the service ended; before :meth:`start`."""
        self._migrations.add(accepted.migration)
        self._add(accepted)
        await accepted.migration.queue(pb.QueueState(waits_for="the source service was restarted"))

    async def cancel(self, migration_id: str, why: str) -> bool:
        """End a migration that waits; false if it does not."""
        error = CancelledByCallerError(why)
        if migration_id in self._begun and self._underway.get(migration_id) is None:
            self._begun[migration_id].ended_by = error  # it is just about to leave the queue
            return True
        accepted = self._waiting.get(migration_id)
        if accepted is None:
            return False
        await self._end(accepted, error)
        self._due.set()
        await self._migrations.flush()  # no journal knows of it, and a restart must not let it begin
        return True

    async def update(self, migration_id: str, request: pb.UpdateMigrationRequest) -> bool:
        """Change what is asked of a migration that waits; false if it does not wait.

        Raises:
            VmferryError: it cannot be meant.
        """
        accepted = self._waiting.get(migration_id)
        if accepted is None:
            return False
        message = accepted.migration.message
        record = self._host.directory.find(message.machine_id)
        options, _ = read_update(request, message.options, self._host, record.spec.memory_bytes)
        if request.HasField("deadline"):
            check_deadline(options)
        if request.ticket:
            ticket = self._acceptance.check_ticket(
                request.ticket, record, Identity.parse(message.destination.host), caller=""
            )
            if ticket.migration_id.hex() != migration_id:
                raise InvalidArgumentError("the ticket is for another migration", field="ticket")
            accepted.ticket, accepted.start_by = request.ticket, ticket.start_by + CLOCK_SKEW
        message.options.CopyFrom(options)
        await accepted.migration.touch()
        await self._migrations.remember(accepted.migration, ticket=request.ticket)
        self._due.set()
        return True

    # What goes on

    def _add(self, accepted: Accepted) -> None:
        accepted.number = next(self._numbers)
        self._waiting[accepted.migration.id] = accepted
        self._due.set()

    async def _run(self) -> None:
        while True:
            self._due.clear()
            try:
                seconds: float | None = await self._decide()
            except Exception:  # noqa: BLE001 - of one migration; the others must not wait for it for ever
                _LOG.exception("the queue met an error")
                seconds = self._config.queue_retry_s
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._due.wait()

    async def _decide(self) -> float | None:
        """Let begin whatever can; returns after how many seconds to ask again, if there is anything to wait for."""
        async with self._deciding:
            if self._stopping:
                return None
            await self._end_expired()
            for back in [one for one in self._waiting.values() if not one.remembered]:
                await self._remember(back)
            while True:
                now_s = asyncio.get_running_loop().time()
                plan = queue_policy.decide(self._facts(now_s))
                if not plan.start or self._stopping:
                    break
                for migration_id in plan.start:
                    if (
                        migration_id in self._waiting and not self._stopping
                    ):  # both may have changed meanwhile
                        await self._begin(self._waiting[migration_id])
            for migration_id, place in plan.places.items():
                if (accepted := self._waiting.get(migration_id)) is not None:
                    await self._show(accepted, place, len(plan.places), now_s)
            times = [] if plan.wake_s is None else [plan.wake_s - now_s]
            times += [
                (self._expires(one) - datetime.now(UTC)).total_seconds() for one in self._waiting.values()
            ]
            return max(0.0, min([*times, _LONGEST_SLEEP_S])) if self._waiting else None

    def _facts(self, now_s: float) -> queue_policy.Facts:
        waiting = [
            queue_policy.Waiting(
                one.migration.id,
                one.migration.message.caller,
                one.destination,
                one.number,
                one.migration.message.options.priority,
            )
            for one in self._waiting.values()
        ]
        running = [
            queue_policy.Running(
                one.migration.message.caller,
                one.migration.message.destination.host,
                asking=isinstance(one, Outgoing) and not one.taken_in,
            )
            for one in self._underway
        ]
        return queue_policy.Facts(
            waiting, running, self._config.max_outgoing, now_s, self._full, self._served
        )

    async def _remember(self, accepted: Accepted) -> None:
        accepted.remembered = True
        await self._migrations.remember(
            accepted.migration, ticket=accepted.ticket, traceparent=accepted.traceparent
        )

    async def _begin(self, accepted: Accepted) -> None:
        migration = accepted.migration
        self._begun[migration.id] = self._waiting.pop(migration.id)
        accepted.remembered = False
        await self._migrations.begun(migration)
        if accepted.ended_by is not None:  # meanwhile
            await self._end(accepted, accepted.ended_by)
            return
        self._served[migration.message.caller] = max(self._served.values(), default=0) + 1
        try:
            outgoing = self._acceptance.begin(accepted)
        except VmferryError as error:
            await self._end(accepted, error)
            return
        except Exception as error:  # noqa: BLE001 - of one migration; the others must not wait for it
            _LOG.exception("a migration could not begin", migration=migration.id)
            await self._end(accepted, InternalError(f"unexpected: {error!r}"))
            return
        if migration.message.HasField("queue"):
            began_ns = migration.message.create_time.ToNanoseconds()
            past_phase("queue", began_ns, parent=accepted.traceparent, migration_id=migration.id)
        outgoing.on_taken_in = self._taken_in(accepted.destination)
        self._underway.follow(outgoing, outgoing.departure)

    async def _show(self, accepted: Accepted, place: queue_policy.Place, length: int, now_s: float) -> None:
        state = pb.QueueState(
            position=place.position, length=length, waits_for=place.waits_for, tries=accepted.tries
        )
        if place.next_try_s is not None:
            next_try_ns = time.time_ns() + int((place.next_try_s - now_s) * 1e9)
            state.next_try_time.FromNanoseconds(next_try_ns // 10**8 * 10**8)
        now = accepted.migration.message
        if not now.HasField("queue") or now.queue != state:
            await accepted.migration.queue(state)

    def _taken_in(self, destination: str) -> Callable[[], None]:
        def note() -> None:
            self._full = queue_policy.without(self._full, destination)
            self._due.set()

        return note

    def _left(self, one: Outgoing | Recovered) -> None:
        """A migration has ended, or its destination had no room for it."""
        destination = one.migration.message.destination.host
        accepted = self._begun.pop(one.migration.id, None)
        now_s = asyncio.get_running_loop().time()
        if accepted is not None and isinstance(one, Outgoing) and one.no_room:
            known = self._full.get(destination)
            share = random.uniform(0.5, 1.0)  # noqa: S311 - spreads questions, hides nothing
            self._full[destination] = self._patience.after(known, now_s, share=share)
            accepted.tries += 1
            accepted.ended_by = one.ended_by
            self._waiting[accepted.migration.id] = accepted
            _LOG.info(
                "waiting for room", migration=one.migration.id, destination=destination, tries=accepted.tries
            )
        else:
            self._full = queue_policy.sooner(self._full, destination, now_s)
        self._due.set()

    async def _end_expired(self) -> None:
        now = datetime.now(UTC)
        for accepted in [one for one in self._waiting.values() if self._expires(one) <= now]:
            await self._end(accepted, accepted.ended_by or _why_expired(accepted, now))

    async def _end(self, accepted: Accepted, error: VmferryError) -> None:
        self._waiting.pop(accepted.migration.id, None)
        self._begun.pop(accepted.migration.id, None)
        cancelled = isinstance(error, CancelledByCallerError)
        outcome = pb.MIGRATION_OUTCOME_CANCELLED if cancelled else pb.MIGRATION_OUTCOME_FAILED
        await accepted.migration.end(outcome, error)

    def _expires(self, accepted: Accepted) -> datetime:
        if accepted.ended_by is not None:
            return datetime.min.replace(tzinfo=UTC)
        return min(accepted.start_by, accepted.deadline or accepted.start_by)


def _why_expired(accepted: Accepted, now: datetime) -> VmferryError:
    if accepted.deadline is not None and accepted.deadline <= now:
        return deadline_passed(accepted.migration.message.options)
    return TicketExpiredError(
        f"it waited in the queue until its ticket was too old ({accepted.start_by:%Y-%m-%dT%H:%M:%SZ})",
        field="ticket",
        remedy="Start it again, or give what waits a new ticket in time (UpdateMigration, field ticket).",
    )
