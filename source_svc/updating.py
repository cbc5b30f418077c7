"""The thin shell around an update in place: one machine, two hypervisor processes of this host, one of which goes on.

Promise: every step is decided by ``vmferry.handoff.updating.decide`` and done in its order; the old process is
resumed only with the permit of a host with no update open, the new one only with the permit that RAN allows. Whatever
fails, the guest goes on in one of the two, or this says that its hypervisor crashed; an update whose pause would
become longer than its caller allows is undone. Memory is never read or written.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from typing import Final, Protocol, assert_never

from source_svc.pause import Pause
from vmferry.errors import (
    JournalDamagedError,
    MachineDeadError,
    MachineFailedError,
    MachineNotFoundError,
    TimedOutError,
    VmferryError,
)
from vmferry.failpoints import reach
from vmferry.handoff import updating
from vmferry.handoff.ledger import HostLedger
from vmferry.handoff.states import Append, Resume, Update, Wait
from vmferry.handoff.updating import Adopt, EndNew, GiveUp, LetRun, New
from vmferry.machines import clock
from vmferry.machines.beside import adopt, end_beside, find_beside, start_beside
from vmferry.machines.directory import MachineDirectory, MachineRecord
from vmferry.machines.port import RunState
from vmferry.machines.qmp import QmpMachine
from vmferry.machines.spec import MachineSpec
from vmferry.telemetry.logs import get_logger
from vmferry.telemetry.tracing import phase, span_attributes
from vmferry.together import to_the_end

_LOG: Final = get_logger(__name__)
_WAITING: Final = frozenset({RunState.PAUSED, RunState.PRELAUNCH})
_BACK_S: Final = 1.0
"""What is kept of the longest pause for giving the guest back to the old process; no more than a fifth of it."""
START_TIMEOUT_S: Final = 20.0
_ASK_S: Final = 0.3
"""How long the new process may take to say how it stands while the guest waits; one that is late is asked again."""


class Watcher(Protocol):
    """Whoever follows an update."""

    retry_s: float
    """Pause before what cannot be done now is tried again."""
    pause: Pause
    """It ends when the service is being stopped: the next start goes on."""

    async def paused(self) -> None:
        """The guest is about to be paused."""

    async def resumed(self, pause_s: float) -> None:
        """The guest goes on, after so long."""


class Updating:
    """One machine's journal of updates, and the means to act on it."""

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
        self._directory = directory
        self._on_broken_journal = on_broken_journal
        self._journal = ledger.open_update(machine_id)
        self._new: QmpMachine | None = None
        self._told_to_run = False
        """``cont`` was sent to the new process, or may have been by an earlier service."""
        self._resume_due = False
        self._paused_at = 0.0
        self.completed = False
        """The new process is the machine."""
        self.lost = False
        """None of the two has the guest."""

    @property
    def state(self) -> updating.UpdateState:
        """What the journal says."""
        return self._journal.state

    async def close(self) -> None:
        """Let go of the journal and the new process."""
        if self._new is not None:
            await self._new.close()
        self._journal.close()

    def record(self) -> MachineRecord:
        """The machine as its own files tell it: with the old process, until the new one is adopted."""
        return self._directory.find(self.machine_id)

    async def run(
        self, update_id: bytes, spec: MachineSpec, max_pause_s: float, watcher: Watcher, checks: Checks
    ) -> None:
        """One update, from its first record to the moment when the guest runs in one process and it is settled which.

        Raises:
            VmferryError: it was undone, and why; nothing is open any more.
            ServiceStoppingError: what is open is left to the next start.
        """
        old: QmpMachine | None = None
        try:
            await self._begin(update_id)
            record = self.record()
            old = self._directory.open(record)
            async with phase("start beside"):
                self._new = await start_beside(record, spec, self._directory, start_timeout_s=START_TIMEOUT_S)
                reach("update.started")
                await checks.compare(old, self._new)
                await old.get_ready()
                if (preparing := await self._new.get_ready_to_load()) is not None:
                    await asyncio.wait([preparing])
            async with phase("pause", max_pause_s=max_pause_s):
                await self._switch(old, self._new, max_pause_s, watcher)
        except JournalDamagedError:
            raise  # this host's own: nothing may follow in this process
        except (VmferryError, OSError, asyncio.CancelledError) as error:
            _LOG.warning("update given up", machine=self.machine_id, detail=str(error))
            # Held by nobody: the old process serves one client at a time.
            if old is not None:
                await old.close()
            await to_the_end(self.settle(str(error) or type(error).__name__, watcher))
            if not self.completed:
                raise
        else:
            await to_the_end(self.settle("done", watcher))
        finally:
            if old is not None:
                await old.close()

    async def _begin(self, update_id: bytes) -> None:
        state = self.state
        assert isinstance(state, updating.Still)
        wanted = updating.UpdateWanted(Update(self.machine_id, update_id, state.last_number + 1))
        actions = updating.decide(state, wanted)
        await self._do_all([action for action in actions if not isinstance(action, Append)])

        def under_lock() -> None:
            with self._ledger.machine_lock(self.machine_id):
                self._ledger.permit(
                    self.machine_id
                )  # raises unless this host may run it, and nothing else is open
                for action in actions:
                    if isinstance(action, Append):
                        self._journal.append(action)

        await self._write(under_lock)
        self._told_to_run = False
        reach("update.recorded.begun")

    async def _switch(self, old: QmpMachine, new: QmpMachine, max_pause_s: float, watcher: Watcher) -> None:
        """From before the pause to the guest running in the new process, or an error by which it is given up."""
        await watcher.paused()
        self._paused_at = time.monotonic()
        margin_s = min(_BACK_S, max_pause_s / 5)
        patience_s = max_pause_s - margin_s
        deadline = asyncio.get_running_loop().time() + patience_s
        try:
            async with asyncio.timeout_at(deadline):
                await old.stop()
                reach("update.paused")
                async with phase("save device state"):
                    data = await old.save_device_state()
                    read_ns = await clock.told_ns(old)
                    span_attributes(bytes=len(data))
                reach("update.state-saved")
                async with phase("load device state"):
                    await new.load_device_state(data)
                    await clock.keep(new, read_ns)
                reach("update.loaded")
            in_time = time.monotonic() - self._paused_at <= patience_s
            alive = old.process.alive()
            await self._do_all(
                updating.decide(self.state, updating.Loaded(in_time=in_time, old_intact=alive))
            )
            if isinstance(self.state, updating.Switched):
                async with asyncio.timeout_at(deadline + margin_s / 2):
                    await self._let_run(new)
        except TimeoutError as error:
            raise TimedOutError(
                f"the pause would have become longer than {max_pause_s:g} s",
                remedy="Allow a longer pause, or find out what holds the new process up; the guest goes on.",
            ) from error
        if isinstance(self.state, updating.Still):
            raise TimedOutError(f"the pause would have become longer than {max_pause_s:g} s")
        await watcher.resumed(time.monotonic() - self._paused_at)

    async def _let_run(self, new: QmpMachine) -> None:
        """Ask the new process once more, and let it run; from the record on nothing else may."""
        if await new.run_state() not in _WAITING:
            raise MachineFailedError("the new process does not wait to be let run", machine=self.machine_id)
        reach("update.answered")
        # To the end: whoever is cancelled between the record and the command would not know what became of it.
        await to_the_end(self._do_all(updating.decide(self.state, updating.Answered())))

    # What is decided is done

    async def _do_all(self, actions: list[updating.UpdateAction]) -> None:
        for action in actions:
            await self._do(action)

    async def _do(self, action: updating.UpdateAction) -> None:
        match action:
            case Append():
                await self._append(action)
            case EndNew():
                await self._end_new()
            case LetRun():
                await self._run_new()
            case Adopt():
                await self._adopt()
            case Resume():
                self._resume_due = True
            case Wait(why=why):
                _LOG.warning("waiting", machine=self.machine_id, why=why)
            case _:
                assert_never(action)

    async def _append(self, action: Append) -> None:
        await self._write(lambda: self._journal.append(action), durable=action.durable)
        name = action.record.kind.name.removeprefix("UPDATE_").lower()
        _LOG.info(
            "recorded", machine=self.machine_id, record=action.record.kind.name, note=action.record.note
        )
        if name != "ran":  # between this record and the command nothing may come
            reach(f"update.recorded.{name}")

    async def _write(self, write: Callable[[], None], *, durable: bool = True) -> None:
        try:
            if durable:
                await to_the_end(asyncio.to_thread(write))
            else:
                write()  # 4 KiB into the page cache cost less than handing them to a thread
        except JournalDamagedError as error:
            self._on_broken_journal(error)
            raise

    async def _end_new(self) -> None:
        if self._new is not None:
            await self._new.close()
            self._new = None
        with contextlib.suppress(MachineNotFoundError):
            try:
                await end_beside(self.record().paths)
            except MachineFailedError as error:
                # It has no permit and never gets one; the next update, or start of the service, ends it.
                _LOG.error("the new process is still there", machine=self.machine_id, detail=error.message)
        reach("update.new-ended")

    async def _run_new(self) -> None:
        new = await self._held_new()
        if not new.process.alive():
            raise MachineDeadError("the new process has ended before it was let run", machine=self.machine_id)
        async with self._ledger.for_update(self.machine_id) as permit:
            told_before, self._told_to_run = self._told_to_run, True
            try:
                await new.cont(permit)
            except MachineFailedError as error:
                # It said no, and it says that its guest has not run: then it has not.
                if error.metadata.get("error_class") and await new.run_state() in _WAITING:
                    self._told_to_run = told_before
                raise
        reach("update.resumed")

    async def _adopt(self) -> None:
        if self._new is not None:
            await self._new.close()
            self._new = None
        async with phase("adopt"):
            await adopt(self.record().paths)
        reach("update.adopted")

    async def _held_new(self) -> QmpMachine:
        if self._new is None:
            found = find_beside(self.record().paths)
            if found is None:
                raise MachineDeadError("there is no new process", machine=self.machine_id)
            self._new = found.open(self._directory)
        return self._new

    # What goes on

    async def settle(self, reason: str, watcher: Watcher) -> None:
        """Bring the update to its end, whichever process goes on, for as long as it takes.

        Raises:
            ServiceStoppingError: the service stops meanwhile.
        """
        while not isinstance(self.state, updating.Still):
            try:
                if await self._step(reason):
                    continue
            except JournalDamagedError:
                raise
            except (VmferryError, OSError) as error:
                _LOG.warning("update not settled yet", machine=self.machine_id, detail=str(error))
            if isinstance(self.state, updating.Still):
                break
            await watcher.pause.wait(watcher.retry_s)
        await self._give_back(watcher)

    async def _step(self, reason: str) -> bool:
        """One decision from what is found; whether the next one may follow at once."""
        old_intact, new, runs = await self._facts()
        ran = isinstance(self.state, updating.Ran)
        if ran and runs:
            await self._do_all(updating.decide(self.state, updating.LetGo()))
            self.completed = True
            return True
        # Only this very process knows that it told nobody to run; whatever an earlier one did is not known.
        never_ran = ran and not self._told_to_run and self._mine
        event = GiveUp(reason, old_intact, new, never_ran)
        actions = updating.decide(self.state, event)
        if not actions and isinstance(self.state, updating.Switched):
            actions = updating.decide(self.state, updating.Answered())
        before = self.state
        await self._do_all(actions)
        if isinstance(self.state, updating.Still):
            self.completed = ran and isinstance(actions[0], Adopt)
            self.lost = self.completed or not old_intact
        return self.state != before or any(isinstance(action, LetRun) for action in actions)

    @property
    def _mine(self) -> bool:
        return self._paused_at > 0

    async def _facts(self) -> tuple[bool, New, bool]:
        """Whether the old process is there, how the new one stands, and whether it runs the guest."""
        record = self.record()
        found = find_beside(record.paths)
        adopted = found is None and isinstance(self.state, updating.Ran)
        if adopted:
            return False, New.GONE, record.alive
        if found is None or not found.process.alive():
            return record.alive, New.GONE, False
        try:
            async with asyncio.timeout(_ASK_S):
                state = await (await self._held_new()).run_state()
        except MachineDeadError:
            return record.alive, New.GONE, False
        except (MachineFailedError, TimeoutError):
            return record.alive, New.SILENT, False
        if state is RunState.INMIGRATE:
            return record.alive, New.EMPTY, False
        return record.alive, New.READY, state not in _WAITING and state is not RunState.POSTMIGRATE

    async def _give_back(self, watcher: Watcher) -> None:
        """Resume the old process, if that was decided, for as long as it takes."""
        while self._resume_due:
            try:
                machine = self._directory.open(self.record())
                try:
                    async with phase("resume"), self._ledger.permitted(self.machine_id) as permit:
                        await machine.cont(permit)
                finally:
                    await machine.close()
                reach("update.given-back")
            except JournalDamagedError as error:
                self._on_broken_journal(error)
                raise
            except MachineFailedError as error:
                _LOG.error("not resumed yet", machine=self.machine_id, detail=error.message)
                await watcher.pause.wait(watcher.retry_s)
                continue
            except VmferryError as error:
                # It ended, or its guest did: there is nothing to resume.
                _LOG.error("not resumed", machine=self.machine_id, reason=error.reason, detail=error.message)
                self.lost = isinstance(error, MachineDeadError)
            self._resume_due = False
            if self._paused_at:
                await watcher.resumed(time.monotonic() - self._paused_at)


class Checks(Protocol):
    """What is compared once the new process is there."""

    async def compare(self, old: QmpMachine, new: QmpMachine) -> None:
        """Refuse a new process that its guest could tell from the old one.

        Raises:
            IncompatibleError: with what differs.
        """
