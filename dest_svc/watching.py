"""Attempts whose source fell silent, or whose waiting copy died.

Promise: they are closed while memory is being received, so that the source may go on; a prepared copy stays, whatever
its source does.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Final, NoReturn

from dest_svc.arrival import Arrival
from dest_svc.receiver import Receiver
from vmferry.config import HostConfig
from vmferry.errors import MachineDeadError, VmferryError
from vmferry.handoff import destination
from vmferry.telemetry.logs import get_logger, within_migration

_LOG: Final = get_logger(__name__)
_LOOK_S: Final = 1.0


async def watch(arrivals: Mapping[str, Arrival], config: HostConfig) -> NoReturn:
    """Look after all arrivals until cancelled."""
    while True:
        await asyncio.sleep(_LOOK_S)
        for arrival in list(arrivals.values()):
            receiver = arrival.receiver
            if receiver is None:
                continue
            silent_s = time.monotonic() - receiver.progressed_at
            died = receiver.machine is not None and not await receiver.machine.alive()
            if died or silent_s > config.receive_timeout_s + receiver.reconnect_timeout_s:
                await _give_up(arrival, receiver, died=died)


async def _give_up(arrival: Arrival, receiver: Receiver, *, died: bool) -> None:
    async with arrival.lock:
        with within_migration(receiver.attempt.migration_id.hex(), receiver.trace_id):
            await _close(arrival, receiver, died=died)


async def _close(arrival: Arrival, receiver: Receiver, *, died: bool) -> None:
    if arrival.receiver is not receiver:
        return
    try:
        if died:
            await arrival.lose_copy("the waiting copy's process died", MachineDeadError.reason)
        else:
            await arrival.apply(destination.Stalled())
    except VmferryError as error:
        _LOG.error("closing failed", machine=arrival.machine_id, detail=error.message)
