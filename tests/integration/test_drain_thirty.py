"""Thirty machines leave a host for two others, one of which dies in the middle, as in a power cut."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal

import pytest

from tests.integration.hosts import World, open_world
from tests.integration.services import Host, processes_with
from vmferry.client import SourceClient, Target
from vmferry.v1 import drain_pb2 as dp
from vmferry.v1 import machine_pb2

COUNT = 30
MOVED = dp.DRAINED_MACHINE_STATE_MOVED
BLOCKED = dp.DRAINED_MACHINE_STATE_BLOCKED


async def cut_power(host: Host) -> None:
    """Everything of a host ends at once: both services, and every machine."""
    await asyncio.gather(host.source.kill(), host.dest.kill())
    for pid in processes_with(str(host.config.machines_dir)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


async def watch_until_over(client: SourceClient, dying: Host) -> dp.Drain:
    """Watch the drain; cut the power of a host when it has taken in its third machine."""
    dead = False
    drain = dp.Drain()
    async with asyncio.timeout(200):
        async for drain in client.watch_drain():
            arrived = [item for item in drain.machines if item.state == MOVED]
            if not dead and sum(item.destination.host == dying.identity.uri for item in arrived) >= 3:
                await cut_power(dying)
                dead = True
            left = {item.state for item in drain.machines} - {MOVED}
            if dead and drain.state == dp.DRAIN_STATE_STUCK and left <= {BLOCKED}:
                break
    assert dead, "it was over before the host died"
    return drain


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_thirty_machines_leave_while_one_of_two_destinations_dies() -> None:
    """All that had not arrived at the dead host get away to the other, or are said to be unknown; none runs twice."""
    settings = {"drain_look_s": 2.0, "drain_retry_s": 2.0, "drain_measure_s": 2.0, "reconnect_timeout_s": 1.0}
    async with open_world("abc", **settings) as world:
        a, b, c = world.hosts.values()
        idle = {"resident-mib": "1", "tick-us": "500000"}
        for _ in range(COUNT // 3):
            await asyncio.gather(*(world.run(a, params=idle) for _ in range(3)))

        tls = world.tls_dir("controller")
        async with SourceClient.open(a.source.address, a.identity.uri, tls) as client:
            to = [Target(host.identity.uri, host.dest.address) for host in (b, c)]
            await client.drain(to)
            drain = await watch_until_over(client, c)

            await assert_nobody_is_lost(world, drain)
            assert not drain.takes_newcomers
            undone = await client.undrain()
            assert undone.takes_newcomers


async def assert_nobody_is_lost(world: World, drain: dp.Drain) -> None:
    """Each machine runs on b, or had arrived on c before it died, or is paused on a with its outcome unknown."""
    a, b, c = world.hosts.values()
    assert len(drain.machines) == COUNT
    on_b = 0
    for item in drain.machines:
        guest = next(one for one in world.guests if one.id == item.machine_id)
        permitted = [host.name for host in (a, b, c) if host.ledger.rights(guest.id).permitted]
        assert len(permitted) <= 1
        if item.state == BLOCKED:
            # It was handed off to the dead host, which may have taken it: only that host's journal can say.
            assert permitted in ([], ["c"])
            assert {one.reason for one in item.obstacles} >= {"OUTCOME_UNKNOWN"}
            assert all(one.remedy for one in item.obstacles)
        elif item.destination.host == c.identity.uri:
            assert permitted == ["c"]
        else:
            assert permitted == ["b"]
            machine = await world.machine(b, guest)
            assert machine.state == machine_pb2.MACHINE_STATE_RUNNING
            on_b += 1
            assert b.holdings(guest.spec)
    assert on_b >= COUNT // 2
    assert not [path for path in a.holdings() if path.endswith(".ram")] or drain.state == dp.DRAIN_STATE_STUCK
    for guest in [one for one in world.guests if b.ledger.rights(one.id).permitted][:3]:
        await guest.assert_clean(b)
