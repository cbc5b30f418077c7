"""What became of a guest's clock after a migration paused it: asked of the host where it goes on, or seen to here.

Promise: nothing here is part of a pause or changes how a migration comes out; what cannot be found out is said.
"""

from __future__ import annotations

import asyncio
from typing import Final

from source_svc.departure import Departure
from source_svc.migrations import Migration
from source_svc.peer import Destination
from vmferry.config import HostConfig
from vmferry.errors import PeerUnreachableError, VmferryError
from vmferry.handoff.states import Attempt
from vmferry.machines.clock import NONE, ClockFinding, count, finding_of, put_right, tell
from vmferry.machines.directory import MachineDirectory
from vmferry.telemetry.logs import get_logger
from vmferry.telemetry.tracing import phase, span_attributes

_LOG: Final = get_logger(__name__)
_ANSWER_S: Final = 1.0
"""What the other host may take beyond the time that it gives to an agent."""


async def ask_arrived(
    destination: Destination, attempt: Attempt | None, migration: Migration, config: HostConfig
) -> None:
    """Find out how the clock of a guest is that runs at its destination."""
    if attempt is None:
        return
    downtime = migration.message.downtime
    pause_s = downtime.ToNanoseconds() / 1e9 if migration.message.HasField("downtime") else None
    async with phase("clock"):
        found = await _asked(destination, attempt, pause_s, config)
        span_attributes(clock_method=found.method, clock_measured=found.measured)
    if not found.measured and pause_s is not None:  # what was measured, the other host has counted
        count(found)
    tell(found, migration.message.clock)


async def _asked(
    destination: Destination, attempt: Attempt, pause_s: float | None, config: HostConfig
) -> ClockFinding:
    """What the destination says; a service that has just ended there is waited for, as its next start sees to it."""
    loop = asyncio.get_running_loop()
    until = loop.time() + config.agent_timeout_s + _ANSWER_S
    while True:
        try:
            told = await destination.clock(attempt, timeout_s=max(until - loop.time(), _ANSWER_S))
        except PeerUnreachableError as error:
            if loop.time() + config.handoff_retry_s >= until:
                return _unknown(pause_s, f"The destination does not say: {error.message}")
        except VmferryError as error:  # an older one does not know the question
            return _unknown(pause_s, f"The destination does not say: {error.message}")
        else:
            if told is None:
                return _unknown(pause_s, "The destination does not know.")
            return finding_of(told, pause_s)
        await asyncio.sleep(config.handoff_retry_s)


async def see_to_returned(
    departure: Departure, migration: Migration, paused_at: float, config: HostConfig
) -> None:
    """Put the clock of a guest right that was resumed here, if it was; ``paused_at`` is 0 if that is not known."""
    if not departure.resumed_at:
        return
    pause_s = departure.resumed_at - paused_at if paused_at else None
    found = await see_to(departure.directory, departure.machine_id, pause_s, config.agent_timeout_s)
    if found is not None:
        tell(found, migration.message.clock)


async def see_to(
    directory: MachineDirectory, machine_id: str, pause_s: float | None, agent_timeout_s: float
) -> ClockFinding | None:
    """Put the clock of a guest right that was resumed here; None if it has ended since."""
    try:
        machine = directory.open(directory.find(machine_id))
    except VmferryError as error:
        _LOG.warning("no clock was put right", machine=machine_id, detail=error.message)
        return None
    try:
        return await put_right(machine, pause_s, agent_timeout_s=agent_timeout_s)
    finally:
        await machine.close()


def _unknown(pause_s: float | None, note: str) -> ClockFinding:
    behind_us = -round((pause_s or 0) * 1e6)
    return ClockFinding(behind_us, behind_us, NONE, measured=False, note=note)
