"""The source's part of recovery: what it heard from a destination, and trying again at once.

Promise: what is done is what this service would do next by itself, by its own tasks and decisions; a machine that is
the destination service's to settle, or whose migration goes its way, is left alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from source_svc.farewells import Farewells
from source_svc.figures import begin_at_zero
from source_svc.history import Filter, History, key_of
from source_svc.listing import newest
from source_svc.migrations import Migrations
from source_svc.recovery import Returned
from source_svc.underway import Underway
from vmferry.handoff import destination
from vmferry.handoff.blocked import Guest
from vmferry.handoff.rights import Rights, Standing
from vmferry.recovery.contact import Contact
from vmferry.recovery.examination import Known
from vmferry.v1 import migration_pb2 as pb
from vmferry.web.view import Arriving


class SourcePart:
    """What the source service adds to ``RecoveryService``."""

    def __init__(
        self,
        migrations: Migrations,
        underway: Underway,
        returned: Returned,
        farewells: Farewells,
        history: History,
    ) -> None:
        self._migrations = migrations
        self._underway = underway
        self._returned = returned
        self._farewells = farewells
        self._history = history
        begin_at_zero()

    def contact(self, machine_id: str) -> Contact:
        """The newest word from the destination of the machine's open migration."""
        one = self._underway.of_machine(machine_id)
        return one.contact if one is not None else Contact()

    def migration_of(self, machine_id: str) -> str:
        """The machine's open migration; empty if there is none."""
        migration = self._migrations.open_of(machine_id)
        return migration.id if migration is not None else ""

    def migrations(self, *, open_only: bool, limit: int) -> list[pb.Migration]:
        """The newest migrations away from this host."""
        found = self._migrations.select(Filter(open_only=open_only))
        return sorted(found, key=key_of, reverse=True)[:limit]

    async def history(self, *, limit: int) -> list[pb.Migration]:
        """The newest migrations away from this host, ended ones that are only remembered included."""
        return await newest(self._migrations, self._history, limit=limit)

    def arrivals(self) -> list[Arriving]:
        """None arrive by this service."""
        return []

    async def settle(self, known: Known) -> Sequence[str]:
        """Ask the destination again, or resume what is to be resumed, or free what is to be freed."""
        done = list(await self._farewells.hurry(known.machine_id))
        one = self._underway.of_machine(known.machine_id)
        if one is not None:
            if one.settling:
                await one.hurry()
                done.append(_told(one.migration.message))
            return done
        if known.machine_id in self._returned or _to_be_resumed(known):
            why_not = await self._returned.hurry(known.machine_id)
            done.append(
                f"its hypervisor does not resume it: {why_not}" if why_not else "the guest is resumed here"
            )
        elif known.rights.standing is Standing.GONE and known.record is not None:
            why_not = await self._returned.hurry(known.machine_id)
            done.append(why_not or "freed what was left here of a machine that belongs to another host")
        return done


def _to_be_resumed(known: Known) -> bool:
    return known.rights.permitted and known.answer.guest is Guest.PAUSED and not _arrived(known.rights)


def _arrived(rights: Rights) -> bool:
    """Whether the guest has yet to be resumed by the destination service of this host, which took the right."""
    now = rights.incoming.current
    return (
        isinstance(now, destination.Owned) and not now.ran and now.attempt.epoch_to == rights.epochs.granted
    )


def _told(message: pb.Migration) -> str:
    tried = f"tried again with {message.destination.host}"
    if message.phase == pb.MIGRATION_PHASE_ENDED:
        outcome = pb.MigrationOutcome.Name(message.outcome).removeprefix("MIGRATION_OUTCOME_").lower()
        return f"{tried}: the migration is {outcome}, the machine belongs to {message.owner}"
    return f"{tried}: {message.reason.message or 'no answer yet'}"
