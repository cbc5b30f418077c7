"""Destinations that may not have heard that an attempt was closed.

Promise: whoever may still hold a copy for an attempt that this host closed is told so until it answers, also after a
restart. A prepared copy is dropped by no timer, so one whose source fell silent right after closing would lie there
for ever. It is also how two hosts meet that both run a machine since an operator's word was wrong: the destination is
told of the later right that is here and stops; if it took the right by one that is later still, this host stops.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Final

from source_svc.pause import Pause
from source_svc.peer import Destination
from vmferry.errors import (
    JournalDamagedError,
    MachineBusyError,
    MachineFailedError,
    PeerUnreachableError,
    ServiceStoppingError,
    TimedOutError,
    VmferryError,
)
from vmferry.handoff import source
from vmferry.handoff.states import Append, Attempt, AttemptState
from vmferry.machines.launcher import halt_machine
from vmferry.rpc.daemon import Host
from vmferry.security.identity import Identity
from vmferry.telemetry.logs import bind_migration, get_logger

_LOG: Final = get_logger(__name__)
_LONGEST_WAIT_S: Final = 60.0
_PASSING: Final = (
    PeerUnreachableError,
    ServiceStoppingError,
    TimedOutError,
    JournalDamagedError,
    MachineBusyError,
    MachineFailedError,
)
_TAKEN: Final = (AttemptState.OWNED, AttemptState.RUNNING)


@dataclass
class _Farewell:
    """One that is being said."""

    attempt: Attempt
    task: asyncio.Task[None]
    pause: Pause = field(default_factory=Pause)
    why_not: str = ""
    """Why it could not be said the last time."""


class Farewells:
    """All that are still to be said by one source service."""

    def __init__(
        self, host: Host, open_peer: Callable[[str, Identity], Destination], *, is_busy: Callable[[str], bool]
    ) -> None:
        self._ledger = host.ledger
        self._directory = host.directory
        self._journal_broken = host.journal_broken
        self._open_peer = open_peer
        self._is_busy = is_busy
        self._retry_s = host.config.handoff_retry_s
        self._tasks: set[asyncio.Task[None]] = set()
        self._known: set[bytes] = set()
        """Migrations whose destinations are being told, or have answered."""
        self._saying: dict[bytes, _Farewell] = {}

    def say(self, machine_id: str) -> None:
        """Tell the destinations of the machine's attempts that this host closed.

        It goes on if another attempt begins, maybe to another destination.
        """
        self._start(self._say_all(machine_id), f"farewells-{machine_id}")

    async def hurry(self, machine_id: str) -> list[str]:
        """Say what is still to be said about a machine now; returns what came of it, in sentences."""
        said = []
        for one in [one for one in self._saying.values() if one.attempt.machine_id == machine_id]:
            await one.pause.hurry(one.task)
            came = f"could not be told: {one.why_not}" if one.why_not else "knows it now"
            said.append(f"an attempt was closed here and {one.attempt.destination} {came}")
        return said

    async def stop(self) -> None:
        """Leave the rest to the next start."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _start(self, work: Coroutine[object, object, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _say_all(self, machine_id: str) -> None:
        for attempt in await asyncio.to_thread(self._ledger.goodbyes, machine_id):
            if attempt.migration_id not in self._known:
                self._known.add(attempt.migration_id)
                self._start(self._say(attempt), f"farewell-{attempt.migration_id.hex()}")

    async def _say(self, attempt: Attempt) -> None:
        bind_migration(attempt.migration_id.hex())
        task = asyncio.current_task()
        assert task is not None
        farewell = self._saying[attempt.migration_id] = _Farewell(attempt, task)
        wait_s = self._retry_s
        try:
            while not await self._told(farewell):
                await farewell.pause.wait(wait_s)
                wait_s = min(wait_s * 2, _LONGEST_WAIT_S)
        finally:
            del self._saying[attempt.migration_id]

    async def _told(self, farewell: _Farewell) -> bool:
        """Whether the destination knows now, or cannot be told anything."""
        attempt = farewell.attempt
        granted = (await asyncio.to_thread(self._ledger.rights, attempt.machine_id)).epochs.granted
        later = granted if granted > attempt.epoch_to else 0
        destination = self._open_peer(attempt.destination_address, Identity.parse(attempt.destination))
        try:
            heard = await destination.tell(
                "Abort", attempt, digest=b"", reason="closed by its source", superseded_by=later
            )
            if heard.state in _TAKEN:
                return await self._give_way(attempt, granted)
        except VmferryError as error:
            farewell.why_not = error.message
            _LOG.info("the destination could not be told", machine=attempt.machine_id, detail=error.message)
            return not isinstance(error, _PASSING)
        finally:
            await destination.close()
        farewell.why_not = ""
        if heard.state is AttemptState.SUPERSEDED:
            _LOG.critical(
                "the destination had taken the right, too, and has stopped its copy",
                machine=attempt.machine_id,
                destination=attempt.destination,
                epoch=granted,
            )
        return True

    async def _give_way(self, attempt: Attempt, granted: int) -> bool:
        """The destination owns what this host had closed, or has sent it on: stop what runs here.

        False if this host's right is another one by now than the destination was told of, or may be soon: it must be
        told again.
        """
        machine_id = attempt.machine_id
        if self._is_busy(machine_id):
            return False
        # Without a pause up to the end, so that no migration begins in between: its journal has one writer.
        with self._ledger.machine_lock(machine_id):
            rights = self._ledger.rights(machine_id, settled=True)
            if rights.epochs.granted != granted or rights.arriving:
                return False
            if rights.came_back_after(attempt):
                return True  # what was taken there was given back lawfully since
            epoch = granted if rights.permitted else 0
            stopped = self._record(source.TakenThere(attempt, epoch))
        _LOG.critical(
            "superseded by a later right: the guest is stopped"
            if stopped
            else "the destination took the right to run by an attempt that was closed here",
            machine=machine_id,
            destination=attempt.destination,
            epoch=epoch,
        )
        while rights.permitted or rights.superseded:
            try:
                await halt_machine(machine_id, self._directory)
                break
            except MachineFailedError as error:
                _LOG.critical("not stopped yet", machine=machine_id, detail=error.message)
                await asyncio.sleep(self._retry_s)
        return True

    def _record(self, event: source.TakenThere) -> bool:
        """Write what follows; whether anything does."""
        journal = self._ledger.open_source(event.attempt.machine_id)
        try:
            records = [one for one in source.decide(journal.state, event) if isinstance(one, Append)]
            for record in records:
                journal.append(record)
        except JournalDamagedError as error:
            self._journal_broken(error)
            raise
        finally:
            journal.close()
        return bool(records)
