"""The release before this one against this one: its services really run, from the commit before the journals changed.

Its source is taken from the repository's own history and run by the same interpreter. Machines run on while the
services under them are replaced, unfinished migrations are settled, and each release moves machines to the other.
"""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import grpc.aio
import pytest

from tests.integration.hosts import World
from tests.integration.releases import as_before, as_now, before
from tests.integration.services import eventually
from tests.integration.updates import ask, ended
from vmferry.failpoints import VARIABLE
from vmferry.v1 import migration_pb2 as pb
from vmferry.v1 import update_pb2

pytestmark = [pytest.mark.usefixtures("tidy"), pytest.mark.timeout(240)]
__all__ = ["before"]


async def test_machines_move_between_the_two_releases(world: World, before: Path) -> None:
    """There and back, with the older one at each end in turn, and between two that are updated on the way."""
    a, b = world.a, world.b
    await as_before(before, b.source, b.dest)
    guest = await world.run()
    for here, there in ((a, b), (b, a)):
        found = await world.ended(here, await world.start(guest, here, there))
        assert found.outcome == pb.MIGRATION_OUTCOME_COMPLETED, found
        await guest.assert_clean(there)
    await as_now(b.source, b.dest)
    found = await world.ended(a, await world.start(guest, a, b))
    assert found.outcome == pb.MIGRATION_OUTCOME_COMPLETED, found
    await guest.assert_clean(b)


async def test_what_the_older_one_left_unfinished_is_settled(world: World, before: Path) -> None:
    """Killed behind its hand-off, the older source is replaced by this one, which finds out what became of it."""
    a, b = world.a, world.b
    a.source.environment[VARIABLE] = "source.recorded.handed-off=kill"
    await as_before(before, a.source)
    guest = await world.run()
    with contextlib.suppress(grpc.aio.AioRpcError):
        await world.start(guest, a, b)
    await eventually(lambda: not a.source.running, "the older source is killed")
    await as_now(a.source)
    await eventually(lambda: not a.holdings(guest.spec), "the machine has left")
    await guest.assert_clean(b)


async def test_the_older_one_reads_what_an_update_left(world: World, before: Path) -> None:
    """Back to the older release: a machine that was updated runs on, and leaves with it."""
    guest = await world.run()
    done = await ended(world, await ask(world, guest))
    assert done.outcome == update_pb2.UPDATE_OUTCOME_COMPLETED, done
    pid = world.a.machine_pid(guest.id)
    await as_before(before, world.a.source, world.a.dest)
    assert world.a.machine_pid(guest.id) == pid
    found = await asyncio.wait_for(
        world.ended(world.a, await world.start(guest, world.a, world.b)), timeout=60
    )
    assert found.outcome == pb.MIGRATION_OUTCOME_COMPLETED, found
    await guest.assert_clean(world.b)
