"""Migrations that are kept in pre-copy or whose Go is lost, and a source that does not know what became of them."""

from __future__ import annotations

import asyncio
import signal
from typing import Any

from tests.integration.hosts import Guest, World
from tests.integration.hypervisors import run_state
from tests.integration.proxy import Proxy
from tests.integration.services import eventually, refusal
from vmferry.handoff import source
from vmferry.handoff.rights import Standing
from vmferry.machines.port import RunState
from vmferry.machines.process import ProcessIdentity
from vmferry.v1 import machine_pb2
from vmferry.v1 import migration_pb2 as pb

SLOW = 3e6


async def start_slowly(world: World, guest: Guest, link: Proxy, **options: Any) -> str:
    """A migration that is in pre-copy when this returns, and will be for a while."""
    link.up_bytes_per_s = SLOW
    link.begin_migration()
    migration_id = await world.start(guest, world.a, world.b, address=link.address, **options)
    await world.enters(world.a, migration_id, pb.MIGRATION_PHASE_PRECOPYING)
    await eventually(lambda: sum(lane.up_bytes for lane in link.lanes) > 0, "memory is on its way")
    return migration_id


async def start_and_hold_seal(world: World, guest: Guest, link: Proxy) -> tuple[str, ProcessIdentity]:
    """A migration whose Seal is under way, and the destination's hypervisor, which is stopped and so holds it up."""
    migration_id = await start_slowly(world, guest, link)
    waiting = world.b.record(guest.id).process
    assert waiting is not None
    waiting.send_signal(signal.SIGSTOP)
    link.up_bytes_per_s = None
    await eventually(
        lambda: isinstance(world.a.ledger.rights(guest.id).outgoing, source.Sealed), "the state is sealed"
    )
    return migration_id, waiting


async def start_and_lose_go(world: World, guest: Guest, link: Proxy, *, answer_only: bool) -> str:
    """A migration whose Go, or only the answer to it, is swallowed: nobody at the source can know what became of it.

    The destination's hypervisor is held while Seal is under way, so that the network can be told which call is next.
    """
    migration_id, waiting = await start_and_hold_seal(world, guest, link)
    lost = asyncio.Event()

    def lose() -> None:
        link.silence(up=not answer_only)
        lost.set()

    link.at_call_after_next_answer(lose)
    waiting.send_signal(signal.SIGCONT)
    await eventually(lost.is_set, "the source makes the call that follows Seal")
    await eventually(
        lambda: world.a.ledger.rights(guest.id).standing is Standing.HANDED_OFF, "the right is given up"
    )
    return migration_id


async def assert_paused_and_unknown(world: World, guest: Guest, migration_id: str) -> None:
    """The source says that it does not know, and does not run the guest."""
    unknown = await world.reaches(
        world.a, migration_id, lambda now: now.outcome == pb.MIGRATION_OUTCOME_UNKNOWN, "UNKNOWN"
    )
    assert unknown.phase == pb.MIGRATION_PHASE_HANDING_OFF
    assert unknown.reason.reason == "OUTCOME_UNKNOWN"
    assert unknown.owner == ""
    machine = await world.machine(world.a, guest)
    assert machine.right == machine_pb2.MACHINE_RIGHT_HANDED_OFF
    assert machine.state == machine_pb2.MACHINE_STATE_PAUSED
    async with world.source(world.a) as stub:
        error = await refusal(stub.CancelMigration(pb.CancelMigrationRequest(id=migration_id)))
    assert error.reason == "POINT_OF_NO_RETURN"
    assert await run_state(world.a, guest) is not RunState.RUNNING
