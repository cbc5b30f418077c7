"""Destinations that take in as many migrations as they may, and will have room later.

Promise: that a destination is full never fails a migration. Where nothing was begun it goes back to the queue; if the
last place was taken between the question and the beginning, it keeps its attempt and asks again, with patience: the
destination has recorded nothing, and an attempt that was closed there could not be begun a second time.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from source_svc.migrations import Migration
from source_svc.queue_policy import Full, Patience
from vmferry.config import HostConfig
from vmferry.errors import TooManyMigrationsError
from vmferry.v1 import migration_pb2 as pb

Answer = TypeVar("Answer")


def has_no_room(error: BaseException) -> bool:
    """Whether a destination takes in as many migrations as it may."""
    return isinstance(error, TooManyMigrationsError) and error.metadata.get("limit") == "max_incoming"


async def until_room(
    begin: Callable[[], Awaitable[Answer]], migration: Migration, config: HostConfig
) -> Answer:
    """Begin, as soon as there is room; the resource says that it waits for that."""
    patience = Patience(config.queue_retry_s, config.max_queue_retry_s)
    full: Full | None = None
    while True:
        try:
            answer = await begin()
        except TooManyMigrationsError as error:
            if not has_no_room(error):
                raise
            now_s = asyncio.get_running_loop().time()
            full = patience.after(full, now_s)
            await _show(migration, full, full.until_s - now_s)
            await asyncio.sleep(full.until_s - now_s)
        else:
            migration.message.ClearField("queue")
            return answer


async def _show(migration: Migration, full: Full, wait_s: float) -> None:
    host = migration.message.destination.host
    state = pb.QueueState(waits_for=f"{host} has no room any more, and is asked again", tries=full.tries)
    state.next_try_time.FromNanoseconds(time.time_ns() + int(wait_s * 1e9))
    migration.message.queue.CopyFrom(state)
    await migration.touch()
