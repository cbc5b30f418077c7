"""Hand-offs that are settled without the destination's answer: by the machine's return, or by a wait that ends.

While the source cannot reach the destination at all, the machine may come back from there, as only its owner could
send it; and a source that has lost the guest's memory before the hand-off does not wait for ever.
"""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator

import pytest

from tests.integration.hosts import Guest, World
from tests.integration.hypervisors import run_state
from tests.integration.lost_handoffs import assert_paused_and_unknown, start_and_hold_seal, start_and_lose_go
from tests.integration.proxy import Proxy
from tests.integration.services import eventually
from vmferry.handoff import destination, source
from vmferry.handoff.rights import Standing
from vmferry.machines.port import RunState
from vmferry.v1 import migration_pb2 as pb

pytestmark = pytest.mark.usefixtures("tidy")


@pytest.fixture
async def guest(world: World) -> AsyncIterator[Guest]:
    """A canary on host a; afterwards all services run with their own settings, so that the next test finds them."""
    guest = await world.run()
    try:
        yield guest
    finally:
        world.a.write_config()
        for service in world.services:
            if not service.running:
                await service.start()


@pytest.mark.parametrize("killed", [False, True], ids=["lost", "lost and killed"])
async def test_a_machine_comes_back_while_its_old_hand_off_is_still_unknown(
    world: World, guest: Guest, link: Proxy, killed: bool
) -> None:
    """Rule 4: the answer to Go is lost and stays so; the way back completes, and settles the way there."""
    migration_id = await start_and_lose_go(world, guest, link, answer_only=True)
    await eventually(lambda: world.b.ledger.rights(guest.id).permitted, "the destination owns it")
    await assert_paused_and_unknown(world, guest, migration_id)
    if killed:
        await world.a.source.kill()
    await guest.assert_clean(world.b)
    back = await world.migrate(guest, world.b, world.a)
    assert back.outcome == pb.MIGRATION_OUTCOME_COMPLETED, back
    assert back.owner == world.a.identity.uri
    assert await run_state(world.a, guest) is RunState.RUNNING
    if killed:
        await world.a.source.start()
    settled = await world.ended(world.a, migration_id)
    assert settled.outcome == pb.MIGRATION_OUTCOME_COMPLETED, settled
    assert settled.owner == world.b.identity.uri
    assert isinstance(world.a.ledger.rights(guest.id).outgoing, source.Quiet)
    await world.assert_stays(guest, world.a, world.b)
    link.heal()
    await world.assert_crosses(guest, world.a, world.b)


async def test_a_source_without_memory_waits_no_longer_than_it_is_told_to(
    world: World, guest: Guest, link: Proxy
) -> None:
    """Sealed, its hypervisor dead, the destination out of reach: the attempt is closed, to start the guest anew."""
    migration_id, waiting = await start_and_hold_seal(world, guest, link)
    link.silence()
    await world.a.source.kill()
    machine = world.a.record(guest.id).process
    assert machine is not None
    machine.send_signal(signal.SIGKILL)
    await eventually(lambda: not world.a.record(guest.id).alive, "the hypervisor is dead")
    world.a.write_config(cold_boot_wait_s=0.5)
    await world.a.source.start()
    ended = await world.ended(world.a, migration_id)
    assert ended.outcome == pb.MIGRATION_OUTCOME_FAILED
    assert ended.owner == world.a.identity.uri
    assert world.a.ledger.rights(guest.id).standing is Standing.OWNED
    waiting.send_signal(signal.SIGKILL)
    await eventually(
        lambda: isinstance(world.b.ledger.rights(guest.id).incoming.current, destination.Refused),
        "the destination lets go",
    )
