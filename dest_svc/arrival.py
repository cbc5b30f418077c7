"""The thin shell around the destination's half of the hand-off: one machine's arrivals at this host.

Promise: every step is decided by ``vmferry.handoff.destination.decide`` and done in its order: a record is on disk
before the effect that needs it, the guest runs only with a permit minted from the journals, and every answer is
what the journal says.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Final, assert_never

from dest_svc.outcomes import count_record
from dest_svc.receiver import Receiver
from vmferry.errors import (
    JournalDamagedError,
    MachineDeadError,
    MachineNotFoundError,
    MachineNotOwnedError,
    ServiceStoppingError,
    VmferryError,
)
from vmferry.failpoints import reach
from vmferry.handoff import destination
from vmferry.handoff.ledger import HostLedger
from vmferry.handoff.states import (
    Action,
    Answer,
    Append,
    Attempt,
    Halt,
    Release,
    Resume,
    Tell,
    Wait,
)
from vmferry.machines.clock import ClockFinding, put_right
from vmferry.machines.directory import MachineDirectory
from vmferry.machines.launcher import discard_leftover, halt_machine
from vmferry.machines.port import RunState
from vmferry.machines.qmp import QmpMachine
from vmferry.telemetry.logs import get_logger, within_migration
from vmferry.telemetry.tracing import phase

_LOG: Final = get_logger(__name__)
_JUST_S: Final = 600.0
"""How long ago a machine may have come whose clock is looked at again when the service starts."""
_JUST_LOADED_S: Final = 1.0
"""How long the word of a hypervisor that it has loaded its copy counts, if its process lives."""


class Arrival:
    """One machine's journal at this destination, and what its open attempt holds here."""

    def __init__(
        self,
        machine_id: str,
        ledger: HostLedger,
        directory: MachineDirectory,
        *,
        resume_retry_s: float,
        agent_timeout_s: float,
        on_broken_journal: Callable[[VmferryError], None],
    ) -> None:
        self.machine_id = machine_id
        self.lock = asyncio.Lock()
        self.receiver: Receiver | None = None
        self.heard_at = -math.inf
        """When the machine's source last called, by the clock of ``time.monotonic``."""
        self._ledger = ledger
        self._directory = directory
        self._journal = ledger.open_destination(machine_id)
        self._resume_retry_s = resume_retry_s
        self._agent_timeout_s = agent_timeout_s
        self._clock: tuple[Attempt, asyncio.Task[ClockFinding | None]] | None = None
        """The attempt by which the guest was resumed here, and what is found about its clock."""
        self._on_broken_journal = on_broken_journal
        self._resuming: asyncio.Task[None] | None = None
        self._hindered = ""
        """Why the guest could not be resumed the last time."""
        self._afterwards: asyncio.Task[None] | None = None
        self._settling: asyncio.Task[None] | None = None

    @property
    def state(self) -> destination.DestinationState:
        """What the journal says."""
        return self._journal.state

    def answer(self, attempt: Attempt) -> Answer:
        """How an attempt stands, by the journal."""
        return destination.answer(self.state, attempt)

    def probe_journal(self) -> None:
        """Check that the records to come could be written."""
        self._journal.probe()

    async def apply(self, event: destination.DestinationEvent, reason: str = "") -> Answer | None:
        """Decide about one event and do it; the caller holds the lock. Returns an answer if the decision has one.

        Args:
            event: what happened.
            reason: why, in the words of the catalogue of errors, for those who count.
        """
        given = None
        for action in destination.decide(self.state, event):
            if isinstance(action, Answer):
                given = action
            else:
                await self._do(action)
                if isinstance(action, Append):
                    count_record(action.record.kind, event, reason)
        return given

    async def _do(self, action: Action) -> None:
        match action:
            case Append():
                await self._append(action)
            case Release():
                await self._discard()
            case Halt():
                _LOG.critical("superseded by a later right: the guest is stopped", machine=self.machine_id)
                await halt_machine(self.machine_id, self._directory)
            case Resume():
                await self._try_resume()
            case Wait(why=why):
                _LOG.warning("waiting", machine=self.machine_id, why=why)
            case Answer() | Tell():
                pass
            case _:
                assert_never(action)

    async def _append(self, action: Append) -> None:
        place = action.record.kind.name.lower().replace("_", "-")
        reach(f"dest.recording.{place}")
        try:
            if action.durable:
                await asyncio.to_thread(self._journal.append, action)
            else:
                # 4 KiB into the page cache cost less than handing them to a thread.
                self._journal.append(action)
        except JournalDamagedError as error:
            # What is on disk is unknown now; a fresh process must find out. Nothing may follow in this one.
            self._on_broken_journal(error)
            raise
        reach(f"dest.recorded.{place}")
        record = action.record
        whose = {"migration": record.attempt.migration_id.hex()} if record.attempt is not None else {}
        _LOG.info("recorded", machine=self.machine_id, record=record.kind.name, note=record.note, **whose)

    async def _discard(self) -> None:
        receiver, self.receiver = self.receiver, None
        if receiver is not None:
            await receiver.discard()
        else:
            await discard_leftover(self.machine_id, self._directory)
        reach("dest.discarded")

    async def _try_resume(self) -> None:
        """Resume; a failure leaves the attempt OWNED and is tried again until it works."""
        try:
            await self.resume()
        except VmferryError as error:
            self._hindered = error.message
            _LOG.error("owned, and not resumed yet", machine=self.machine_id, detail=error.message)
            if self._resuming is None or self._resuming.done():
                self._resuming = asyncio.create_task(self._keep_resuming())

    async def resume(self) -> None:
        """Let the guest run here, record that it did, and tell the network."""
        async with phase("resume"):
            machine = self.machine()
            try:
                async with self._ledger.permitted(self.machine_id) as permit:
                    await machine.cont(permit)
                reach("dest.resumed")
            except MachineNotOwnedError:
                # It was sent on from here since, so it has run here.
                await self._let_go(machine)
                await self.apply(destination.GuestRan())
                return
            except JournalDamagedError as error:
                self._on_broken_journal(error)
                await self._let_go(machine)
                raise
            except BaseException:
                await self._let_go(machine)
                raise
        await self.apply(destination.GuestRan())
        # The source waits for the answer with the guest's pause on its clock; the rest can follow.
        self._afterwards = asyncio.create_task(self._after_resume(machine))
        self._see_to_clock(after=self._afterwards)

    async def _after_resume(self, machine: QmpMachine) -> None:
        try:
            await machine.announce()
        except VmferryError as error:
            _LOG.warning("the network was not told", machine=self.machine_id, detail=error.message)
        receiver, self.receiver = self.receiver, None
        if receiver is not None:
            await receiver.release()
        reach("dest.released")
        await machine.close()

    def _see_to_clock(self, *, after: asyncio.Task[None] | None) -> None:
        """Look after the clock of the guest that was resumed here, and keep what was found for whoever asks."""
        now = self.state.current
        if not isinstance(now, destination.Empty):
            self._clock = (now.attempt, asyncio.create_task(self._put_clock_right(after)))

    async def _put_clock_right(self, before: asyncio.Task[None] | None) -> ClockFinding | None:
        """Look after the guest's clock, once the rest is done; None if the machine has ended since."""
        if before is not None:
            await asyncio.wait([before])
        try:
            machine = self.machine()
        except VmferryError as error:
            _LOG.warning("no clock was put right", machine=self.machine_id, detail=error.message)
            return None
        try:
            return await put_right(machine, None, agent_timeout_s=self._agent_timeout_s)
        finally:
            await machine.close()

    async def clock_of(self, attempt: Attempt) -> ClockFinding | None:
        """What was found about the clock of the guest that came by an attempt; None if that is not known."""
        if self._clock is None or not self._clock[0].matches(attempt):
            return None
        return await asyncio.shield(self._clock[1])

    async def _keep_resuming(self) -> None:
        while True:
            await asyncio.sleep(self._resume_retry_s)
            async with self.lock:
                now = self.state.current
                if not isinstance(now, destination.Owned) or now.ran:
                    return
                try:
                    await self.resume()
                except MachineDeadError as error:
                    _LOG.critical(
                        "the machine was lost with its process here",
                        machine=self.machine_id,
                        detail=str(error),
                    )
                    return
                except VmferryError as error:
                    _LOG.error("owned, and not resumed yet", machine=self.machine_id, detail=error.message)

    def machine(self) -> QmpMachine:
        """The machine's hypervisor on this host.

        Raises:
            MachineDeadError: it does not run.
        """
        if self.receiver is not None and self.receiver.machine is not None:
            return self.receiver.machine
        try:
            return self._directory.open(self._directory.find(self.machine_id))
        except MachineNotFoundError as error:
            raise MachineDeadError(f"machine {self.machine_id} has no hypervisor on this host") from error

    async def recover(self) -> None:
        """After a restart of the service: journal first, then the hypervisor. The source asks by itself."""
        current = self.state.current
        attempt = None if isinstance(current, destination.Empty) else current.attempt
        with within_migration(attempt.migration_id.hex()) if attempt else contextlib.nullcontext():
            await self._recover()

    async def _recover(self) -> None:
        async with self.lock:
            match self.state.current:
                case destination.Receiving():
                    await self.lose_copy("the destination service was restarted", ServiceStoppingError.reason)
                case destination.Prepared():
                    if not await self.copy_waits():
                        await self.lose_copy("the prepared copy died", MachineDeadError.reason)
                case destination.Owned(ran=False):
                    await self._try_resume()
                case destination.Refused():
                    if not self._ledger.rights(self.machine_id).holds:
                        await self._discard()  # the service was killed between the record and its effect
                case destination.Superseded():
                    await halt_machine(self.machine_id, self._directory)
                case destination.Owned():
                    if self._has_just_come():  # an earlier service may have ended before it saw to the clock
                        self._see_to_clock(after=None)
                case destination.Empty():
                    pass

    def _has_just_come(self) -> bool:
        rights = self._ledger.rights(self.machine_id)
        try:
            process = self._directory.find(self.machine_id).process
        except MachineNotFoundError:
            return False
        return rights.permitted and process is not None and process.alive() and process.age_s() < _JUST_S

    async def settle(self, *, copy_gone: bool) -> str:
        """Do now what would be tried next; returns what came of it, or nothing if nothing was to be done.

        Args:
            copy_gone: the copy's process has ended; one that is only silent may be the last copy.
        """
        async with self.lock:
            match self.state.current:
                case destination.Prepared() if copy_gone and not await self.copy_waits():
                    await self.lose_copy("the prepared copy died", MachineDeadError.reason)
                    refused = isinstance(self.state.current, destination.Refused)
                    return "the prepared copy is gone: the attempt is refused" if refused else ""
                case destination.Owned(ran=False):
                    await self._try_resume()
                    now = self.state.current
                    ran = isinstance(now, destination.Owned) and now.ran
                    return "the guest is resumed here" if ran else f"it is not resumed: {self._hindered}"
        return ""

    async def lose_copy(self, why: str, reason: str) -> None:
        """The copy here is gone or unusable, for a reason of the catalogue of errors; the caller holds the lock."""
        await self.apply(destination.CopyLost(why, tail_certain=not self._journal.torn_tail), reason)

    async def go(self, attempt: Attempt, digest: bytes) -> None:
        """The source gave the right to run up; take it, if there is a copy to run."""
        intact = self._just_loaded() or await self.copy_waits()
        if not intact and isinstance(self.state.current, destination.Prepared):
            await self.lose_copy("the prepared copy died", MachineDeadError.reason)
        await self.apply(destination.GoAsked(attempt, digest, copy_intact=intact))

    async def force(self, event: destination.ForceAccept) -> None:
        """Take the right by an operator's word; the caller holds the lock.

        Without memory the machine's description stays here, so that it can be started anew.
        """
        try:
            spec = self._directory.find(self.machine_id).spec
        except MachineNotFoundError:
            spec = None
        await self.apply(event)
        if spec is not None and not event.with_memory:
            with contextlib.suppress(
                VmferryError, OSError
            ):  # the right is taken; it is started by its description
                self._directory.claim(spec)

    async def close_attempt(self, event: destination.CloseAsked) -> Answer | None:
        """The source closed the attempt, maybe by a later right than the one here; the caller holds the lock."""
        if not event.superseded_by:
            return await self.apply(event)
        async with self._ledger.locked(self.machine_id):  # nobody begins to send it on from here meanwhile
            rights = await asyncio.to_thread(self._ledger.rights, self.machine_id)
            epoch = rights.epochs.granted if rights.owner else 0
            return await self.apply(replace(event, epoch=epoch, leaving=rights.leaving))

    def _just_loaded(self) -> bool:
        """Whether the hypervisor said a moment ago that the copy is complete; asking it anew lengthens the pause."""
        machine = self.receiver.machine if self.receiver is not None else None
        return machine is not None and machine.just_loaded(_JUST_LOADED_S)

    async def copy_waits(self) -> bool:
        """Whether the hypervisor has a complete copy, waiting or running."""
        try:
            machine = self.machine()
        except VmferryError:
            return False
        try:
            return await machine.run_state() in {RunState.PAUSED, RunState.RUNNING}
        except VmferryError:
            return False
        finally:
            await self._let_go(machine)

    async def _let_go(self, machine: QmpMachine) -> None:
        """Close a hold of the machine, unless it is the one that the open attempt works with."""
        if self.receiver is None or machine is not self.receiver.machine:
            await machine.close()

    def settle_records(self) -> None:
        """Bring the record of a prepared copy to disk in the background, so that Go need not wait for it."""
        self._settling = asyncio.create_task(self._sync())

    async def _sync(self) -> None:
        try:
            await asyncio.to_thread(self._journal.sync)
        except JournalDamagedError as error:
            self._on_broken_journal(error)

    async def give_up(self, why: str) -> None:
        """Close an attempt that is still being received; a prepared copy stays as it is."""
        async with self.lock:
            if isinstance(self.state.current, destination.Receiving):
                await self.lose_copy(why, ServiceStoppingError.reason)

    async def close(self) -> None:
        """Let go of the journal."""
        if self._resuming is not None:
            self._resuming.cancel()
        clock = self._clock[1] if self._clock is not None else None
        last_steps = [task for task in (self._afterwards, self._settling, clock) if task is not None]
        await asyncio.gather(*last_steps, return_exceptions=True)
        self._journal.close()
