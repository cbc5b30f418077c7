"""The destination's part of recovery: what it heard from a source, and trying again at once.

Promise: what is done is what this service would do next by itself, by the arrival's own decisions.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Final

from dest_svc.arrival import Arrival
from dest_svc.outcomes import begin_at_zero
from vmferry.handoff import destination
from vmferry.handoff.blocked import Guest
from vmferry.handoff.states import Attempt
from vmferry.recovery.contact import Contact
from vmferry.recovery.examination import Known
from vmferry.telemetry.logs import bind_migration
from vmferry.telemetry.metrics import add_received
from vmferry.together import to_the_end
from vmferry.v1.migration_pb2 import Migration
from vmferry.web.view import Arriving

_MOST_KEPT: Final = 1000
"""Machines of which the newest word is kept."""


class DestinationPart:
    """What the destination service adds to ``RecoveryService``."""

    def __init__(self, arrivals: Mapping[str, Arrival]) -> None:
        self._arrivals = arrivals
        self._contacts: dict[str, Contact] = {}
        begin_at_zero()
        add_received(0)

    def hear(self, attempt: Attempt, what: str) -> None:
        """The attempt's source has asked for something, by a call that this is part of."""
        bind_migration(attempt.migration_id.hex())
        contact = self._contacts.pop(attempt.machine_id, None) or Contact()
        contact.hear(what)
        self._contacts[attempt.machine_id] = contact
        if len(self._contacts) > _MOST_KEPT:
            del self._contacts[next(iter(self._contacts))]

    def contact(self, machine_id: str) -> Contact:
        """The newest word from the source of the machine's attempt."""
        return self._contacts.get(machine_id, Contact())

    def migration_of(self, machine_id: str) -> str:  # noqa: ARG002 - migrations belong to the source
        """None leaves by this service."""
        return ""

    def migrations(self, *, open_only: bool, limit: int) -> list[Migration]:  # noqa: ARG002 - the source's
        """None leave by this service."""
        return []

    async def history(self, *, limit: int) -> list[Migration]:  # noqa: ARG002 - the source's
        """None have left by this service."""
        return []

    def arrivals(self) -> list[Arriving]:
        """What this host is receiving."""
        return [
            Arriving(
                machine=receiver.spec.name,
                machine_id=receiver.spec.uuid,
                migration_id=receiver.attempt.migration_id.hex(),
                source=receiver.attempt.source,
                memory_bytes=receiver.memory_bytes,
                reserved_bytes=receiver.reserved_bytes,
                prepared=isinstance(arrival.state.current, destination.Prepared),
                silent_s=time.monotonic() - receiver.progressed_at,
            )
            for arrival in list(self._arrivals.values())
            if (receiver := arrival.receiver) is not None
        ]

    async def settle(self, known: Known) -> Sequence[str]:
        """Resume what is to be resumed here, and refuse what cannot be any more."""
        arrival = self._arrivals.get(known.machine_id)
        if arrival is None:
            return []
        # A caller that goes away must not leave a machine half resumed.
        came = await to_the_end(arrival.settle(copy_gone=known.answer.guest is Guest.ABSENT))
        return [came] if came else []
