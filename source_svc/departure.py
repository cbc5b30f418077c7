"""The thin shell around the source's half of the hand-off: one machine leaving this host.

Promise: every step is decided by ``vmferry.handoff.source.decide`` and done in its order: a record is on disk before
the effect that needs it; the guest is resumed only with a permit minted from the journals; once the right to run
was given up, nothing but the destination's answer moves anything here. A resume that the hypervisor refuses is tried
again until it works.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from typing import Final, Protocol, assert_never

from source_svc.pause import Pause
from source_svc.peer import Destination
from vmferry.errors import (
    ForcedByOperatorError,
    JournalDamagedError,
    MachineBusyError,
    MachineDeadError,
    MachineFailedError,
    MachineNotFoundError,
    MachineNotOwnedError,
    VmferryError,
    WrongPhaseError,
)
from vmferry.failpoints import reach
from vmferry.handoff import source
from vmferry.handoff.destination import Empty
from vmferry.handoff.gate import ResumePermit
from vmferry.handoff.ledger import HostLedger, MachineJournal
from vmferry.handoff.rights import Standing
from vmferry.handoff.states import (
    Action,
    Answer,
    Append,
    Attempt,
    AttemptState,
    Halt,
    Release,
    Resume,
    Tell,
    Wait,
)
from vmferry.machines.directory import MachineDirectory
from vmferry.machines.launcher import discard_leftover, end_process
from vmferry.machines.port import RunState
from vmferry.machines.qmp import QmpMachine
from vmferry.telemetry.logs import get_logger
from vmferry.telemetry.metrics import count_retry
from vmferry.telemetry.tracing import phase
from vmferry.together import to_the_end

_LOG: Final = get_logger(__name__)


class Story(Protocol):
    """Whoever follows how an open attempt settles."""

    retry_s: float
    """Pause before the destination is asked again."""
    cold_boot_wait_s: float
    """How long a destination that cannot be asked is waited for without the guest's memory."""
    reason: str
    """Why the attempt is being closed, if it is."""

    async def hears(self, heard: source.Heard) -> None:
        """The destination answered; nothing was done about it yet."""

    async def waits(self, why: str) -> None:
        """Nothing can be done now; the destination will be asked again."""

    async def stays_paused(self, why: MachineFailedError) -> None:
        """The machine belongs here and its guest cannot go on yet; that will be tried again."""


class Departure:
    """One machine's journal at this source, and the means to act on it."""

    def __init__(
        self,
        machine_id: str,
        ledger: HostLedger,
        directory: MachineDirectory,
        *,
        on_broken_journal: Callable[[VmferryError], None],
    ) -> None:
        self.machine_id = machine_id
        self._ledger = ledger
        self.directory = directory
        self._on_broken_journal = on_broken_journal
        self._journal: MachineJournal[source.SourceState] = ledger.open_source(machine_id)
        self.waiting = ""
        """Why nothing can be done without the destination; empty if nothing is open or all goes well."""
        self.pause = Pause()
        """Between two questions to the destination, or two tries to resume."""
        self.settling = False
        """The destination is being asked, or the guest resumed, again and again."""
        self._release_due = False
        self._not_resumed: MachineFailedError | None = None
        self._asked: Destination | None = None
        self._deciding = asyncio.Lock()
        """Held from a fact to what follows from it, where an operator may come between."""
        self.resumed_at = 0.0
        """When the guest was resumed here, by the clock of ``time.monotonic``; 0 if it was not."""
        self.overridden: ForcedByOperatorError | None = None
        """Set once an operator's word closed the attempt."""

    @property
    def state(self) -> source.SourceState:
        """What the journal says."""
        return self._journal.state

    @property
    def tail_certain(self) -> bool:
        """Whether the journal's end is whole."""
        return not self._journal.torn_tail

    @property
    def waits_for(self) -> Destination | None:
        """The destination whose word alone can settle the open attempt; None if this host goes on by itself."""
        return None if isinstance(self.state, source.Quiet) else self._asked

    def close(self) -> None:
        """Let go of the journal."""
        self._journal.close()

    def probe_journal(self) -> None:
        """Check that the records to come could be written."""
        self._journal.probe()

    async def begin(self, attempt: Attempt) -> None:
        """Open an attempt, if this host owns the machine and has none open."""

        def under_lock() -> None:
            with self._ledger.machine_lock(self.machine_id):
                self._ledger.permit(
                    self.machine_id
                )  # raises unless this host may run it, so may send it away
                for action in source.decide(self.state, source.BeginWanted(attempt)):
                    assert isinstance(action, Append)
                    self._journal.append(action)

        if not isinstance(self.state, source.Quiet):
            raise MachineBusyError("the machine already has an open migration", machine=self.machine_id)
        await self._write(under_lock, durable=True)
        reach("source.recorded.begun")

    def next_attempt_number(self) -> int:
        """A number no attempt of this machine has had at this host."""
        assert isinstance(self.state, source.Quiet)
        return self.state.last_number + 1

    async def apply(self, event: source.SourceEvent) -> list[Tell]:
        """Decide about one event and do it; what is to be told to the destination is returned, not done."""
        told: list[Tell] = []
        self.waiting = ""
        for action in source.decide(self.state, event):
            if isinstance(action, Tell):
                told.append(action)
            else:
                await self._do(action)
        return told

    async def _do(self, action: Action) -> None:
        match action:
            case Append():
                place = action.record.kind.name.lower().replace("_", "-")
                reach(f"source.recording.{place}")
                await self._write(lambda: self._journal.append(action), durable=action.durable)
                reach(f"source.recorded.{place}")
                record = action.record
                whose = {"migration": record.attempt.migration_id.hex()} if record.attempt is not None else {}
                _LOG.info(
                    "recorded", machine=self.machine_id, record=record.kind.name, note=record.note, **whose
                )
            case Resume():
                await self._try_resume()
            case Release():
                self._release_due = True
            case Wait(why=why):
                self.waiting = why
                _LOG.warning("waiting", machine=self.machine_id, why=why)
            case Answer() | Tell() | Halt():  # nothing is stopped while an attempt is open
                pass
            case _:
                assert_never(action)

    async def _write(self, write: Callable[[], None], *, durable: bool) -> None:
        try:
            if durable:
                # A write that is on its way cannot be called back: the state must follow it.
                await to_the_end(asyncio.to_thread(write))
            else:
                write()  # 4 KiB into the page cache cost less than handing them to a thread
        except JournalDamagedError as error:
            # What is on disk is unknown now; a fresh process must find out. Nothing may follow in this one.
            self._on_broken_journal(error)
            raise

    async def _try_resume(self) -> None:
        """Resume; the rest of a decision follows even if that fails, for it may be what stands in the way."""
        self._not_resumed = None
        try:
            await self._resume()
        except MachineFailedError as error:
            self._not_resumed = error
            _LOG.error("owned, and not resumed yet", machine=self.machine_id, detail=error.message)
        except (MachineDeadError, MachineNotFoundError, MachineNotOwnedError, WrongPhaseError) as error:
            # It ended, was ended by an operator, or its guest shut down or crashed: there is nothing to resume.
            _LOG.error("not resumed", machine=self.machine_id, reason=error.reason, detail=error.message)

    async def _resume(self) -> None:
        async with phase("resume"):
            machine = self.machine()
            try:
                async with self._ledger.permitted(self.machine_id) as permit:
                    await machine.cont(permit)
                self.resumed_at = time.monotonic()
                reach("source.resumed")
            except JournalDamagedError as error:
                self._on_broken_journal(error)
                raise
            finally:
                await machine.close()

    def held_back(self) -> AbstractAsyncContextManager[ResumePermit]:
        """A permit to let the guest go on while it is copied; there is none from the moment of the seal."""
        return self._ledger.held_back(self.machine_id)

    async def keep_resuming(self, story: Story) -> None:
        """Resume for as long as it takes, if it was due and failed.

        A disk's lock may be held elsewhere for a while, and so may the hypervisor itself.
        """
        while self._not_resumed is not None:
            self.settling = True
            await story.stays_paused(self._not_resumed)
            await self.pause.wait(story.retry_s)
            await self._try_resume()
        self.settling = False

    async def settle_records(self) -> None:
        """Bring a lazy record to disk beside other work, so that the hand-off need not wait for it."""
        await self._write(self._journal.sync, durable=True)

    async def release(self) -> None:
        """Free what is left of a machine that now runs elsewhere; nothing, if it does not."""
        if not self._release_due:
            return
        self._release_due = False
        self._not_resumed = None
        async with phase("release"):
            await discard_if_gone(self.machine_id, self._ledger, self.directory)
            reach("source.released")

    def machine(self) -> QmpMachine:
        """A hold of the machine's hypervisor; raises MachineDeadError or MachineNotFoundError."""
        return self.directory.open(self.directory.find(self.machine_id))

    async def memory_intact(self) -> bool:
        """Whether the hypervisor has the guest's memory for certain; one that is silent now may resume it later."""
        try:
            machine = self.directory.open(self.directory.find(self.machine_id), observe=True)
            try:
                return await machine.run_state() in {RunState.RUNNING, RunState.PAUSED, RunState.POSTMIGRATE}
            finally:
                await machine.close()
        except MachineFailedError as error:
            self._not_resumed = error
            return False
        except VmferryError:
            return False

    async def _ask(self, destination: Destination, tell: Tell, reason: str) -> source.Heard | None:
        """Tell the destination something; nothing is heard from one that cannot answer, whatever the cause."""
        state = self.state
        if isinstance(state, source.Quiet):
            return None
        digest = b"" if isinstance(state, source.Begun) else state.digest
        try:
            return await destination.tell(tell.method, state.attempt, digest=digest, reason=reason)
        except VmferryError as error:
            self._cannot(tell, "the destination cannot be asked", error)
            return None

    async def _act_on(self, heard: source.Heard, tell: Tell, story: Story) -> list[Tell]:
        """Do what follows from an answer; what fails is tried again with the next one."""
        reach("source.outcome-heard")
        try:
            async with self._deciding:
                if isinstance(self.state, source.Quiet):
                    return []
                await story.hears(heard)
                # Once the guest runs there, nothing hangs on its memory here, and that guest needs the processor.
                arrived = heard.state is AttemptState.RUNNING and isinstance(self.state, source.HandedOff)
                intact = not arrived and await self.memory_intact()
                return await self.apply(replace(heard, memory_intact=intact, tail_certain=self.tail_certain))
        except JournalDamagedError:
            raise  # this host's own: nothing may follow in this process
        except VmferryError as error:
            self._cannot(tell, "what was decided cannot be done", error)
            return []

    def _cannot(self, tell: Tell, what: str, error: VmferryError) -> None:
        self.waiting = f"{what}: {error.message}"
        _LOG.warning("asking again", machine=self.machine_id, method=tell.method, detail=error.message)
        count_retry(tell.method)

    async def settle(self, destination: Destination, first: list[Tell], story: Story) -> None:
        """Talk to the destination, for as long as it takes, until no attempt is open."""
        self.settling = True
        todo, heard_at = first, time.monotonic()
        self._asked = destination
        while not isinstance(self.state, source.Quiet):
            if not todo and await self._settled_by_its_new_owner(self.state, story):
                return
            tell = todo[0] if todo else Tell(self._question())
            heard = await self._ask(destination, tell, story.reason)
            if heard is not None:
                heard_at = time.monotonic()
                todo = await self._act_on(heard, tell, story)
            else:
                todo = await self._waited(enough=time.monotonic() - heard_at > story.cold_boot_wait_s)
            if not isinstance(self.state, source.Quiet) and not todo:
                await story.waits(self.waiting)
                if await self.pause.wait(story.retry_s):
                    await destination.renew()

    async def _settled_by_its_new_owner(self, state: source.SourceState, story: Story) -> bool:
        """Close a hand-off whose outcome came by another way: the machine is on its way back, or has arrived."""
        rights = await asyncio.to_thread(self._ledger.rights, self.machine_id)
        now = rights.incoming.current
        if not rights.moved_on or not isinstance(state, source.HandedOff) or isinstance(now, Empty):
            return False
        heard = source.Heard(
            state.attempt,
            AttemptState.RUNNING,
            state.attempt.destination_incarnation,
            memory_intact=False,
            tail_certain=True,
        )
        async with self._deciding:
            if not isinstance(self.state, source.Quiet):
                await story.hears(heard)
                await self.apply(source.OwnerBegan(now.attempt))
        return isinstance(self.state, source.Quiet)

    async def _waited(self, *, enough: bool) -> list[Tell]:
        """What follows from silence alone: nothing, unless the guest's memory is gone and the wait has been long."""
        if not enough:
            return []
        async with self._deciding:
            intact = await self.memory_intact()
            await self.apply(source.WaitedEnough(memory_intact=intact, tail_certain=self.tail_certain))
        return []

    async def force(self, event: source.ForceReclaim) -> None:
        """Take the machine back by an operator's word; the guest goes on here, or is ended before that is recorded.

        Raises:
            WrongPhaseError: nothing is open that could be taken back, or the guest has run elsewhere since.
        """
        async with self._deciding:
            source.decide(
                self.state, replace(event, memory_intact=event.with_memory)
            )  # refused before anything is done
            if not event.with_memory:
                await self._end_copy()
            intact, rest = await self.memory_intact(), list[Action]()

            def under_lock() -> None:
                # Nobody can begin to send the machine here in between.
                with self._ledger.machine_lock(self.machine_id):
                    moved_on = self._ledger.rights(self.machine_id).moved_on
                    decided = source.decide(
                        self.state, replace(event, memory_intact=intact, moved_on=moved_on)
                    )
                    for action in decided:
                        if isinstance(action, Append):
                            self._journal.append(action)
                        elif isinstance(
                            action, Resume
                        ):  # what is to be told, ``farewells`` says until it is heard
                            rest.append(action)

            reach("source.recording.forced")
            await self._write(under_lock, durable=True)
            reach("source.recorded.forced")
            self.overridden = ForcedByOperatorError(
                f"{event.operator} took the machine back here: {event.evidence}"
            )
            for action in rest:
                await self._do(action)

    async def _end_copy(self) -> None:
        """End the guest's hypervisor, if it runs; the machine can be started anew from what lies on disk."""
        with contextlib.suppress(MachineNotFoundError, MachineDeadError):
            await end_process(self.machine())

    def _question(self) -> str:
        """What to ask when nothing else is to be told."""
        return "Go" if isinstance(self.state, source.HandedOff) else "GetAttempt"


async def discard_if_gone(machine_id: str, ledger: HostLedger, directory: MachineDirectory) -> None:
    """Remove what is left of a machine that belongs to another host; never a copy that is arriving, or has arrived.

    The destination service of this host accepts a machine under the same lock, so it cannot begin in between.
    """
    async with ledger.locked(machine_id):
        rights = await asyncio.to_thread(ledger.rights, machine_id)
        if rights.standing is Standing.GONE:
            await discard_leftover(machine_id, directory)
