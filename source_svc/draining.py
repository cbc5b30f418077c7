"""Empties this host: asks about every machine at every destination, and has the planner's decisions carried out.

    DrainHost --> drain.json --> look at machines --> ask destinations --> decide --> start migrations --> follow them
                      ^                ^                                                                      |
                      +----------------+------------------------ note how they ended <------------------------+

Promise: what is asked for is on disk before it is answered, and a restarted service goes on with it. Migrations are
begun as any caller begins them, one to a machine, by the service's own StartMigration. A machine that is blocked is
reported and never touched. What becomes of a machine is said by journals and its migration, never by the drain.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final

from source_svc.drain_figures import move_ended
from source_svc.drainstate import DrainBook, obstacle
from source_svc.inside import Inside
from vmferry.drain import activity, planner
from vmferry.drain.planner import Consequence, Decision, Facts, Failures, Placed, Prospect, Standing
from vmferry.errors import TicketExpiredError, TicketInvalidError, VmferryError
from vmferry.handoff.rights import Standing as Right
from vmferry.rpc.daemon import Host
from vmferry.security.identity import Identity
from vmferry.security.warrants import VerifiedWarrant, open_warrant
from vmferry.telemetry.logs import get_logger
from vmferry.telemetry.tracing import context_of, phase
from vmferry.together import to_the_end
from vmferry.v1 import drain_pb2 as dp
from vmferry.v1 import machine_pb2
from vmferry.v1 import migration_pb2 as pb

_LOG: Final = get_logger(__name__)
_USUAL_BYTES_PER_S: Final = 100e6
"""What a machine's memory is taken to travel at while nothing was measured."""
_ASKING: Final = 4
"""Questions to destinations at a time."""
_PASSING: Final = {"host.full", "machine.busy"}
_SOON_S: Final = 1.0
_READY: Final = {machine_pb2.MACHINE_STATE_RUNNING, machine_pb2.MACHINE_STATE_PAUSED}


@dataclass
class _Memory:
    """What is remembered while the service runs; a restart asks anew."""

    prospects: dict[tuple[str, str], Prospect] = field(default_factory=dict)
    pairs: dict[tuple[str, str], Failures] = field(default_factory=dict)
    hosts: dict[str, Failures] = field(default_factory=dict)
    host_errors: dict[str, tuple[str, str, str]] = field(default_factory=dict)
    """Reason, message and remedy of the last failure that was a host's own."""
    predicted_s: dict[str, float] = field(default_factory=dict)
    placed: dict[str, Placed] = field(default_factory=dict)
    held: set[str] = field(default_factory=set)
    asked: bool = False
    measured: bool = False


class Draining:
    """The drain of one host."""

    def __init__(self, host: Host, inside: Inside, book: DrainBook) -> None:
        self._host = host
        self._config = host.config
        self._inside = inside
        self._book = book
        self._now = _Memory()
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._followers: dict[str, asyncio.Task[None]] = {}

    def resume(self) -> None:
        """Go on with what is on disk; called once, when the service can start migrations."""
        for item in self._book.drain.machines:
            if item.state == dp.DRAINED_MACHINE_STATE_MOVING and item.migration_id:
                self._follow(item.machine_id, item.migration_id)
            if any(
                one.tried and planner.consequence(one.reason) is Consequence.HELD for one in item.obstacles
            ):
                self._now.held.add(item.machine_id)
        if self._book.record.draining:
            self.go_on()

    def renew(self, *, afresh: bool) -> None:
        """Go on with a request that is on disk now; whatever rested is tried again.

        Args:
            afresh: the host was not being emptied before, so costs are measured anew.
        """
        known = self._now
        self._now = _Memory(predicted_s=known.predicted_s, placed=known.placed, measured=known.measured)
        if afresh:
            self._now.predicted_s, self._now.measured = {}, False
        self.go_on()

    async def halt(self) -> None:
        """Look and begin no more until told to go on; what was being written down is on disk."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    async def take_back(self) -> None:
        """Take back what only waits; called when it is on disk that the host need not be empty any more."""
        for item in list(self._book.drain.machines):
            if item.state != dp.DRAINED_MACHINE_STATE_MOVING:
                continue
            with contextlib.suppress(VmferryError):
                await self._inside.cancel_if_waiting(item.migration_id)
        await self._book.save()

    async def stop(self) -> None:
        """The service stops; its next start goes on."""
        await self.halt()
        followers = list(self._followers.values())
        for task in followers:
            task.cancel()
        await asyncio.gather(*followers, return_exceptions=True)

    def go_on(self) -> None:
        """Look again at once, and from then on."""
        self._wake.set()
        if self._task is None or self._task.done():
            # Not within the call that asked for it: every migration has a trace of its own, however long this takes.
            self._task = asyncio.create_task(self._run(), name="drain", context=context_of(""))

    # The loop

    async def _run(self) -> None:
        while True:
            self._wake.clear()
            wait_s = _SOON_S
            try:
                wait_s = await self._step()
            except VmferryError as error:
                _LOG.error("the drain is held up", reason=error.reason, detail=error.message)
                await self._book.hold_up(error)
            except Exception as error:  # noqa: BLE001 - a drain that died would look like one that waits
                _LOG.critical("the drain met an unexpected error, and tries again", exc_info=error)
            # Not wait_for: before Python 3.12 it may take a cancellation for the event that came at the same time.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._wake.wait()

    async def _step(self) -> float:
        """Look, ask, decide, begin; how long nothing needs to be done then."""
        warrant = self._warrant()
        machines = await self._look()
        facts = self._facts(machines)
        decision = planner.decide(facts)
        if decision.ask:
            if not self._now.asked:
                self._now.asked = True
                await self._book.settle(machines, decision, activity.asking(machines, facts.destinations))
            await self._ask_all(decision)
            await self._measure(machines)
            facts = self._facts(machines)
            decision = planner.decide(facts)
        began = False
        for machine_id, host in decision.start if warrant is not None else ():
            # Whoever ends the drain must find what was begun by it.
            began = await to_the_end(self._begin(machine_id, host, warrant)) or began
        self._say_why(facts, decision)
        names = {item.machine_id: item.machine or item.machine_id for item in self._book.drain.machines}
        await self._book.settle(machines, decision, activity.what_next(facts, decision, names))
        return _SOON_S if began else max(0.05, min(decision.wake_s - time.time(), self._config.drain_look_s))

    def _say_why(self, facts: Facts, decision: Decision) -> None:
        """What stays because a host is left alone was never refused by it: say what that host failed with."""
        for machine_id in decision.stays:
            item = self._book.items[machine_id]
            told = {one.destination for one in item.obstacles}
            for host, why in self._now.host_errors.items():
                rests = facts.hosts.get(host, Failures()).until_s(facts.rest_s) > facts.now_s
                if rests and host not in told:
                    self._book.put(item, obstacle(host, *why))

    def _facts(self, machines: list[planner.Machine]) -> Facts:
        under_way = sum(1 for task in self._now.placed.values() if task.under_way)
        return Facts(
            machines=machines,
            destinations=[one.host for one in self._book.drain.destinations],
            prospects=self._now.prospects,
            now_s=time.time(),
            room=max(0, self._config.max_outgoing - under_way),
            rest_s=self._config.drain_retry_s,
            fresh_s=self._config.drain_look_s,
            placed=list(self._now.placed.values()),
            pairs=self._now.pairs,
            hosts=self._now.hosts,
        )

    async def _look(self) -> list[planner.Machine]:
        """Every machine that is here, as the planner sees it; what has gone is noted."""
        found = []
        here = await self._inside.machines()
        sizes = {one.uuid: one.spec.memory_mib << 20 for one in here}
        costs = planner.costs_of(self._now.predicted_s, sizes, _USUAL_BYTES_PER_S)
        for one in here:
            if one.right == machine_pb2.MACHINE_RIGHT_GONE and not one.HasField("blockage"):
                continue
            item = self._book.item(one.uuid, one.name, sizes[one.uuid])
            item.predicted_cost.FromNanoseconds(int(costs[one.uuid] * 1e9))
            item.cost_measured = one.uuid in self._now.predicted_s
            standing = self._standing(one, item)
            found.append(planner.Machine(one.uuid, standing, sizes[one.uuid], costs[one.uuid]))
        for item in self._book.gone({one.id for one in found}):
            rights = await asyncio.to_thread(self._host.ledger.rights, item.machine_id)
            self._book.note_gone(item, moved=rights.standing is Right.GONE)
        return found

    def _standing(self, one: machine_pb2.Machine, item: dp.DrainedMachine) -> Standing:
        if one.uuid in self._followers:
            known = self._now.placed.get(one.uuid)
            # One whose outcome is unknown is still followed, and holds nothing up.
            return Standing.BLOCKED if known is not None and not known.under_way else Standing.MOVING
        if one.migration_id:  # somebody else's, or one that this service found open when it started
            item.migration_id = one.migration_id
            self._follow(one.uuid, one.migration_id)
            return Standing.MOVING
        if one.HasField("blockage") or one.right != machine_pb2.MACHINE_RIGHT_OWNED:
            self._book.block(item, one)
            return Standing.BLOCKED
        if one.state not in _READY:
            found = obstacle("", "MACHINE_NOT_RUNNING", f"{one.name} does not run", _START_OR_STOP)
            self._book.put(item, found)
            return Standing.HELD
        if one.uuid in self._now.held:
            return Standing.HELD
        if one.uuid not in self._book.warranted:
            found = obstacle(
                "", "NOT_IN_WARRANT", f"{one.name} came after the drain was asked for", _ASK_AGAIN
            )
            self._book.put(item, found)
            return Standing.HELD
        return Standing.READY

    def _warrant(self) -> VerifiedWarrant | None:
        """What machines may be moved by, while it is good."""
        try:
            ca_pem = self._host.tls.load().ca_pem
            warrant = open_warrant(self._book.record.warrant, ca_pem=ca_pem, now=datetime.now(UTC))
        except (TicketExpiredError, TicketInvalidError) as error:
            self._book.problem(error)
            return None
        self._book.problem(None)
        self._book.warranted = frozenset(warrant.machines)
        return warrant

    # Asking

    async def _ask_all(self, decision: Decision) -> None:
        limit = asyncio.Semaphore(_ASKING)

        async def ask(machine_id: str, host: str) -> None:
            async with limit:
                if self._now.hosts.get(host, Failures()).until_s(self._config.drain_retry_s) <= time.time():
                    await self._ask(machine_id, host, predict=False)

        await asyncio.gather(*(ask(machine_id, host) for machine_id, host in decision.ask))

    async def _ask(self, machine_id: str, host: str, *, predict: bool) -> None:
        item, destination = self._book.items.get(machine_id), self._book.destination(host)
        if item is None or destination is None:
            return  # another request came meanwhile
        try:
            options = self._book.record.options
            report = await self._inside.plan(machine_id, destination, options, predict=predict)
        except VmferryError as error:
            self._now.prospects.pop((machine_id, host), None)
            self._fail(item, host, error.reason, error.message, error.instance_remedy, tried=False)
            return
        self._now.hosts.pop(host, None)
        blocking = [one for one in report.items if one.severity >= _BLOCKS]
        self._now.prospects[machine_id, host] = Prospect(
            compatible=report.compatible,
            room_bytes=report.available_memory_bytes,
            asked_at_s=time.time(),
            warnings=sum(one.severity == _WARNS for one in report.items),
            passing=any(one.id in _PASSING for one in report.items)
            and all(one.id in _PASSING for one in blocking),
        )
        found = [obstacle(host, one.id, one.message, one.remedy) for one in blocking]
        self._book.answered(item, host, found, still_tried=report.compatible)
        if report.HasField("prediction"):
            self._now.predicted_s[machine_id] = report.prediction.total.expected.ToNanoseconds() / 1e9

    async def _measure(self, machines: list[planner.Machine]) -> None:
        """Predict what moving costs, smallest machines first, in the time there is for that; once in a drain."""
        limit_s = self._config.drain_measure_s
        ready = {one.id for one in machines if one.standing is Standing.READY}
        where = {
            machine_id: host
            for (machine_id, host), known in self._now.prospects.items()
            if known.compatible and machine_id in ready
        }
        if self._now.measured or not where:
            return
        self._now.measured = True
        if not self._book.drain.HasField("problem"):
            self._book.drain.state = dp.DRAIN_STATE_DRAINING
        smallest_first = sorted(where, key=lambda machine_id: self._book.items[machine_id].memory_bytes)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                for done, machine_id in enumerate(smallest_first):
                    self._book.drain.activity = activity.measuring(done, len(where), limit_s)
                    await self._book.save()
                    await self._ask(machine_id, where[machine_id], predict=True)
        for index, one in enumerate(machines):
            cost_s = self._now.predicted_s.get(one.id)
            if cost_s is not None:
                machines[index] = planner.Machine(one.id, one.standing, one.memory_bytes, cost_s)
                self._book.items[one.id].predicted_cost.FromNanoseconds(int(cost_s * 1e9))
                self._book.items[one.id].cost_measured = True

    # Moving

    async def _begin(self, machine_id: str, host: str, warrant: VerifiedWarrant | None) -> bool:
        """Start a migration; whether that was done."""
        item, destination = self._book.items.get(machine_id), self._book.destination(host)
        if warrant is None or item is None or destination is None:
            return False  # another request came meanwhile
        try:
            ticket = warrant.make_ticket(
                machine_id=machine_id, destination=Identity.parse(host), now=datetime.now(UTC)
            )
            async with phase("order", machine=item.machine, drain_trace=self._book.drain.trace_id):
                options = self._book.record.options
                migration = await self._inside.start(machine_id, destination, ticket, options)
        except VmferryError as error:
            self._fail(item, host, error.reason, error.message, error.instance_remedy, tried=True)
            return False
        item.attempts += 1
        item.migration_id = migration.id
        item.destination.CopyFrom(destination)
        item.state = dp.DRAINED_MACHINE_STATE_MOVING
        self._now.placed[machine_id] = Placed(host, item.memory_bytes, time.time(), under_way=True)
        self._follow(machine_id, migration.id)
        await self._book.save()
        return True

    def _follow(self, machine_id: str, migration_id: str) -> None:
        task = asyncio.create_task(self._watch(machine_id, migration_id), name=f"drain-{migration_id}")
        self._followers[machine_id] = task

    async def _watch(self, machine_id: str, migration_id: str) -> None:
        try:
            async for migration in self._inside.watch(migration_id):
                self._seen(machine_id, migration)
                if not self._book.record.draining and self._inside.may_take_back(migration):
                    # It was about to begin when the drain was undone, and found no room at its destination.
                    await self._inside.cancel_if_waiting(migration_id)
        except VmferryError as error:  # nobody knows it any more: the journals say what became of the machine
            _LOG.info("a migration is not known any more", migration=migration_id, reason=error.reason)
            self._state(machine_id, dp.DRAINED_MACHINE_STATE_WAITING)
        finally:
            self._followers.pop(machine_id, None)
            known = self._now.placed.get(machine_id)
            if known is not None:
                self._occupy(machine_id, known.destination, known.memory_bytes, under_way=False)
        try:
            await self._book.save()
        except VmferryError as error:
            _LOG.error("the drain cannot be written down", detail=error.message)
        self._wake.set()

    def _seen(self, machine_id: str, migration: pb.Migration) -> None:
        """Note how a migration stands."""
        item = self._book.items.get(machine_id)
        if item is None:
            return
        item.destination.CopyFrom(migration.destination)
        unknown = migration.outcome == pb.MIGRATION_OUTCOME_UNKNOWN
        self._occupy(machine_id, migration.destination.host, item.memory_bytes, under_way=not unknown)
        if unknown:
            self._put_reason(item, migration)
            self._wake.set()
        elif migration.phase == pb.MIGRATION_PHASE_ENDED:
            self._ended(item, migration)
        else:
            item.state = dp.DRAINED_MACHINE_STATE_MOVING

    def _state(self, machine_id: str, state: dp.DrainedMachineState.ValueType) -> None:
        item = self._book.items.get(machine_id)
        if item is not None:
            item.state = state

    def _occupy(self, machine_id: str, host: str, size: int, *, under_way: bool) -> None:
        known = self._now.placed.get(machine_id)
        at_s = known.at_s if known is not None and known.destination == host else time.time()
        self._now.placed[machine_id] = Placed(host, size, at_s, under_way=under_way)

    def _ended(self, item: dp.DrainedMachine, migration: pb.Migration) -> None:
        host = migration.destination.host
        move_ended(self._book.record, item, migration)
        if migration.outcome == pb.MIGRATION_OUTCOME_COMPLETED:
            item.state = dp.DRAINED_MACHINE_STATE_MOVED
            del item.obstacles[:]
            self._now.hosts.pop(host, None)
            return
        self._now.placed.pop(item.machine_id, None)
        goes_on = self._book.record.draining
        item.state = dp.DRAINED_MACHINE_STATE_WAITING if goes_on else dp.DRAINED_MACHINE_STATE_STAYS
        why = migration.reason
        self._fail(item, host, why.reason, why.message, why.remedy, tried=True)
        _LOG.warning(
            "a machine came back from a drain", machine=item.machine, destination=host, reason=why.reason
        )

    def _fail(
        self, item: dp.DrainedMachine, host: str, reason: str, message: str, remedy: str, *, tried: bool
    ) -> None:
        self._book.put(item, obstacle(host, reason, message, remedy, tried=tried))
        now_s = time.time()
        pair = item.machine_id, host
        match planner.consequence(reason):
            case Consequence.ELSEWHERE:
                self._now.pairs[pair] = self._now.pairs.get(pair, Failures()).again(now_s)
            case Consequence.HOST:
                self._now.host_errors[host] = reason, message, remedy
                known = self._now.hosts.get(host, Failures())
                if known.until_s(self._config.drain_retry_s) <= now_s:  # several at a time are one failure
                    self._now.hosts[host] = known.again(now_s)
                if tried:
                    self._now.pairs[pair] = self._now.pairs.get(pair, Failures()).again(now_s)
            case Consequence.HELD:
                self._now.held.add(item.machine_id)

    def _put_reason(self, item: dp.DrainedMachine, migration: pb.Migration) -> None:
        why = migration.reason
        found = obstacle(migration.destination.host, why.reason, why.message, why.remedy, tried=True)
        self._book.put(item, found)


_BLOCKS: Final = 3
_WARNS: Final = 2
_START_OR_STOP: Final = "Start it (vmferry machine start), or end it for good (vmferry machine stop)."
_ASK_AGAIN: Final = "Ask for the drain once more (vmferry drain): that allows it to move, too."
