"""Whether both hosts could finish a migration now; asked before the guest is paused, as often as it takes.

Promise: a yes means that this host's certificate outlives the hand-off, both journals can be written, the destination
has the memory and its waiting copy, and every lane has a connection. A destination that cannot be reached is no
answer yet, for as long as a broken connection is tried again.
"""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Final

from source_svc.copying import Copy
from source_svc.departure import Departure
from source_svc.link import unreachable
from source_svc.peer import Destination
from source_svc.streaming import StreamedCopy
from vmferry.errors import PeerUnreachableError, TimedOutError, WrongPhaseError
from vmferry.handoff.states import Attempt
from vmferry.security.renewal import CurrentMaterial
from vmferry.telemetry.tracing import span_event

_CERTIFICATE_MARGIN: Final = timedelta(seconds=60)
_PREFLIGHT_S: Final = 1.0
_RETRY_S: Final = 0.2
UNEXPECTED: Final = 2.0
"""How much longer than predicted the last round may take before the switch is given up."""


class Readiness:
    """The question, for one attempt; the time it may take begins when this is made."""

    def __init__(
        self,
        attempt: Attempt,
        copy: Copy | StreamedCopy,
        departure: Departure,
        destination: Destination,
        material: CurrentMaterial,
        *,
        switch_timeout_s: float,
        reserve_timeout_s: float,
        reconnect_timeout_s: float,
    ) -> None:
        self._attempt = attempt
        self._copy = copy
        self._departure = departure
        self._destination = destination
        self._material = material
        self._switch_timeout_s = switch_timeout_s
        self._reserve_timeout_s = reserve_timeout_s
        self._reconnect_timeout_s = reconnect_timeout_s
        self._began_at = asyncio.get_running_loop().time()
        self._unreachable_since: float | None = None

    async def both(self) -> bool:
        """Whether both sides could finish now."""
        switch_s = self._switch_timeout_s + self._copy.last_round_s * UNEXPECTED
        until = datetime.now(UTC) + timedelta(seconds=switch_s) + _CERTIFICATE_MARGIN
        if self._material.get().not_after < until:
            raise WrongPhaseError(
                "this host's certificate expires too soon to finish a hand-off",
                remedy="Renew it, then migrate again.",
            )
        await asyncio.to_thread(self._departure.probe_journal)
        problems = await self._ask()
        if problems is None:
            await asyncio.sleep(_RETRY_S)
            return False
        if not problems:
            if not self._copy.connections.whole:
                span_event("not yet", problems="a lane is being reopened")
            return self._copy.connections.whole
        span_event("not yet", problems="; ".join(problems))
        waited_s = asyncio.get_running_loop().time() - self._began_at - self._copy.connections.broken_s
        if waited_s > self._reserve_timeout_s:
            raise TimedOutError(
                f"the destination is not ready: {'; '.join(problems)}", limit="reserve_timeout"
            )
        return False

    async def _ask(self) -> list[str] | None:
        """What stands in the destination's way; ``None`` if it cannot be asked now."""
        try:
            problems = await self._destination.preflight(self._attempt, timeout_s=_PREFLIGHT_S)
        except (PeerUnreachableError, TimedOutError) as error:
            now = asyncio.get_running_loop().time()
            self._unreachable_since = now if self._unreachable_since is None else self._unreachable_since
            if now - self._unreachable_since > self._reconnect_timeout_s:
                raise unreachable(self._reconnect_timeout_s, error) from error
            span_event("not yet", problems=error.message)
            return None
        self._unreachable_since = None
        return problems
