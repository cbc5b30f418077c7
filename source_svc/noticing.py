"""What the guest of one migration is told about it.

Promise: the guest is told once it is known that it could move, and nothing else is done before it approves or its
notice is over; the event says Started while the guest is paused, and is gone when it goes on, here or there.
"""

from __future__ import annotations

import time

from source_svc.announcing import Announced, Announcements
from source_svc.migrations import Migration
from source_svc.orders import Order
from vmferry.events import policy
from vmferry.machines.spec import MachineSpec
from vmferry.negotiation.path import STREAM
from vmferry.telemetry.tracing import phase, span_attributes
from vmferry.v1 import migration_pb2 as pb


class Notice:
    """Of one migration."""

    def __init__(
        self, announcements: Announcements, migration: Migration, spec: MachineSpec, order: Order
    ) -> None:
        self._announcements = announcements
        self._migration = migration
        self._spec = spec
        self._order = order
        self._event: Announced | None = None
        self._started_at = 0.0

    async def give(self) -> None:
        """Tell the guest, and wait until it may be paused."""
        order, message = self._order, self._migration.message
        stands_still = message.path == STREAM and not self._spec.streams_live
        self._event = self._announcements.announce(
            self._spec,
            pause_s=order.standstill_limit_s if stands_still else order.max_downtime_s,
            description=policy.MIGRATION,
            notice_s=order.notice_s,
        )
        message.event_id = self._event.id
        if self._event.notice_s > 0:
            await self._migration.enter(pb.MIGRATION_PHASE_ANNOUNCED)
            async with phase("announce", notice_s=self._event.notice_s, event_id=self._event.id):
                await self._event.allowed()

    def started(self) -> None:
        """The guest is about to be paused."""
        if self._event is not None:
            self._started_at = time.monotonic()
            self._event.started()

    def hand_on(self) -> bytes:
        """What the machine takes along."""
        return self._event.hand_on() if self._event is not None else b""

    def resumed(self) -> None:
        """The guest goes on, wherever that is."""
        if self._event is not None:
            lasted_s = time.monotonic() - self._started_at if self._started_at else None
            if lasted_s is not None:
                span_attributes(interruption_ms=round(lasted_s * 1e3, 3))
            self._event.over(lasted_s=lasted_s)

    def close(self, *, unsettled: bool) -> None:
        """Nothing more is done for it by this process; ``unsettled`` if the next one goes on."""
        if self._event is None:
            return
        if unsettled:
            self._event.leave_open()
        else:
            self._event.over(why=self._migration.message.reason.message[:200])
