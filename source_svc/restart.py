"""What a source service finds when it starts: attempts that are open, machines to look after, and its own memory.

Promise: what became of an attempt is said by the journals alone; memory gives it back its name, its request and its
trace. A migration that no journal knows was never begun and waits again, if it still may; nothing that was begun is
begun a second time, and what had left the queue counts as begun. A memory that is lost changes none of that.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

from source_svc.acceptance import Acceptance
from source_svc.dispatcher import Dispatcher
from source_svc.farewells import Farewells
from source_svc.history import History, Remembered
from source_svc.means import Means
from source_svc.migrations import Migration, Migrations
from source_svc.recovery import Recovered, Returned, settle_quiet
from source_svc.underway import Underway
from source_svc.update_service import UpdateService
from vmferry.errors import (
    JournalDamagedError,
    MachineFailedError,
    VmferryError,
    WrongPhaseError,
)
from vmferry.handoff import source
from vmferry.handoff.ledger import Role
from vmferry.handoff.reading import Reading, read_machine
from vmferry.handoff.states import RecordKind
from vmferry.machines import cpulimit
from vmferry.rpc.daemon import Host
from vmferry.security.identity import Identity
from vmferry.telemetry.logs import get_logger
from vmferry.v1 import migration_pb2 as pb

_LOG: Final = get_logger(__name__)
_OPEN: Final = {RecordKind.BEGUN, RecordKind.SEALED, RecordKind.HANDED_OFF}
_RESTARTED: Final = "the source service was restarted"


class Restart:
    """The start of one source service."""

    def __init__(
        self,
        host: Host,
        means: Means,
        migrations: Migrations,
        underway: Underway,
        returned: Returned,
        farewells: Farewells,
        *,
        history: History,
        acceptance: Acceptance,
        dispatcher: Dispatcher,
        updates: UpdateService,
    ) -> None:
        self._host = host
        self._means = means
        self._migrations = migrations
        self._underway = underway
        self._returned = returned
        self._farewells = farewells
        self._history = history
        self._acceptance = acceptance
        self._dispatcher = dispatcher
        self._updates = updates

    async def recover(self) -> None:
        """Settle every attempt that was open when the service ended; called once, before serving."""
        await asyncio.to_thread(cpulimit.restore_all, self._host.config.machines_dir)
        self._migrations.started(await self._history.count_start())
        remembered = {one.message.id: one for one in await self._history.unfinished()}
        leaving = set(self._host.ledger.machines(Role.SOURCE))
        for machine_id in self._host.ledger.machines():
            await self._recover_machine(machine_id, remembered, leaving=machine_id in leaving)
        for one in remembered.values():
            await self._take_up(one)
        await self._history.prune()

    async def _recover_machine(
        self, machine_id: str, remembered: dict[str, Remembered], *, leaving: bool
    ) -> None:
        ledger, directory = self._host.ledger, self._host.directory
        try:
            updated = await self._updates.recover(machine_id)
            if updated or not leaving or not self._follow_open(machine_id, remembered):
                self._farewells.say(machine_id)
                if await settle_quiet(machine_id, ledger, directory):
                    self._returned.see_to_clock(machine_id)
        except MachineFailedError:
            self._returned.add(machine_id)
        except VmferryError as error:
            _LOG.critical(
                "a machine needs an operator", machine=machine_id, reason=error.reason, detail=str(error)
            )
            await self._keep_unknown(machine_id, error, remembered)
            if isinstance(error, JournalDamagedError) and isinstance(error.__cause__, OSError):
                # Not the journal but its disk: nobody would look after the machine until the next start.
                self._host.journal_broken(error)

    def _follow_open(self, machine_id: str, remembered: dict[str, Remembered]) -> bool:
        """Go on with the machine's open attempt; false if there is none."""
        departure = self._means.departure(machine_id)
        state = departure.state
        if isinstance(state, source.Quiet):
            departure.close()
            return False
        attempt = state.attempt
        message = pb.Migration(
            id=attempt.migration_id.hex(),
            machine=self._means.name_of(machine_id),
            machine_id=machine_id,
            source=self._host.own.uri,
            destination=pb.Destination(host=attempt.destination, address=attempt.destination_address),
            phase=pb.MIGRATION_PHASE_SWITCHING,
        )
        known = remembered.pop(message.id, None)
        peer = self._means.peer(attempt.destination_address, Identity.parse(attempt.destination))
        recovered = Recovered(
            _named(message, known),
            departure,
            peer,
            self._host.own.uri,
            self._host.config,
            traceparent=known.traceparent if known is not None else "",
        )
        self._migrations.add(recovered.migration)
        self._underway.follow(recovered, departure)
        return True

    async def _keep_unknown(
        self, machine_id: str, error: VmferryError, remembered: dict[str, Remembered]
    ) -> None:
        """Tell whoever asks for the machine's migration that nothing is known of it."""
        readings = read_machine(self._host.config.journal_dir, machine_id, error.message)
        message = unknown_migration(machine_id, readings, self._host.own.uri)
        if message is not None:
            message.machine = self._means.name_of(machine_id)
            migration = _named(message, remembered.pop(message.id, None))
            self._migrations.add(migration)
            await migration.report(pb.MIGRATION_OUTCOME_UNKNOWN, error)

    async def _take_up(self, one: Remembered) -> None:
        """Go on with what memory holds as not ended, and no journal as open."""
        message = one.message
        migration = Migration(message)
        last = await asyncio.to_thread(self._last_record, message)
        if last is None and one.ticket:
            try:
                accepted = self._acceptance.resume(migration, one.ticket, one.traceparent)
            except VmferryError as error:
                self._migrations.add(migration)
                await migration.end(pb.MIGRATION_OUTCOME_FAILED, error)
            else:
                await self._dispatcher.restore(accepted)
            return
        # It had begun, and the service ended before the end of it could be remembered.
        self._migrations.add(migration)
        if last is RecordKind.DONE:
            message.owner = message.destination.host
            await migration.end(pb.MIGRATION_OUTCOME_COMPLETED)
            return
        await migration.end(pb.MIGRATION_OUTCOME_FAILED, WrongPhaseError(_RESTARTED))

    def _last_record(self, message: pb.Migration) -> RecordKind | None:
        """What this host's journal says last of a migration; None if it was never begun."""
        config = self._host.config
        readings = read_machine(config.journal_dir, message.machine_id, self._host.ledger)
        migration_id = bytes.fromhex(message.id)
        kinds = [
            entry.record.kind
            for reading in readings
            if reading.role is Role.SOURCE
            for entry in reading.entries
            if entry.record.attempt is not None and entry.record.attempt.migration_id == migration_id
        ]
        return kinds[-1] if kinds else None


def unknown_migration(machine_id: str, readings: Sequence[Reading], own: str) -> pb.Migration | None:
    """The migration that was open when its journal was last readable: what became of it cannot be known."""
    entries = next(one.entries for one in readings if one.role is Role.SOURCE)
    if not entries or entries[-1].record.kind not in _OPEN or entries[-1].record.attempt is None:
        return None
    attempt = entries[-1].record.attempt
    return pb.Migration(
        id=attempt.migration_id.hex(),
        machine_id=machine_id,
        source=own,
        destination=pb.Destination(host=attempt.destination, address=attempt.destination_address),
        phase=pb.MIGRATION_PHASE_HANDING_OFF,
    )


def _named(message: pb.Migration, known: Remembered | None) -> Migration:
    """A migration by its journal, with what memory adds to that and the journal does not say."""
    if known is None:
        return Migration(message)
    whole = pb.Migration()
    whole.CopyFrom(known.message)
    for name in ("owner", "outcome", "reason", "progress", "queue"):
        whole.ClearField(name)
    whole.MergeFrom(message)
    return Migration(whole)
