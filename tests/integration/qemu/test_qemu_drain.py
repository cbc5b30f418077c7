"""A host with machines of both kinds is emptied: each goes its way, and the order knows only what they cost."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.integration.hosts import World
from tests.integration.qemu.conftest import boot, ticker_spec
from vmferry.client import SourceClient, Target
from vmferry.v1 import drain_pb2 as dp

pytestmark = [pytest.mark.usefixtures("tidy"), pytest.mark.timeout(180)]


async def test_a_qemu_machine_and_a_micro_vm_leave_together(world: World, images: Path) -> None:
    """Both arrive unharmed, the host is empty, and afterwards it takes one back."""
    qemu = await boot(world, ticker_spec(images))
    micro = await world.run(world.a)
    there = Target(world.b.identity.uri, world.b.dest.address)
    tls = world.tls_dir("controller")
    async with SourceClient.open(world.a.source.address, world.a.identity.uri, tls) as client:
        try:
            drain = await client.drain([there])
            async with asyncio.timeout(60):
                async for seen in client.watch_drain():
                    drain = seen
            assert drain.state == dp.DRAIN_STATE_DRAINED
            assert {item.machine_id for item in drain.machines} == {qemu.id, micro.id}
            for item in drain.machines:
                assert item.state == dp.DRAINED_MACHINE_STATE_MOVED
                assert item.attempts == 1
            # The other one has written too little memory to measure anything with.
            assert [item.cost_measured for item in drain.machines if item.machine_id == micro.id] == [True]
        finally:
            await client.undrain()
    assert world.a.holdings() == []
    await qemu.assert_clean(world.b)
    await micro.assert_clean(world.b)
    await world.assert_crosses(qemu, world.b, world.a)
