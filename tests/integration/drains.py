"""What tests of a drain share: a scheduler's connection, what is watched for, and hosts left as they were found."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import pytest

from tests.integration.hosts import Guest, World
from tests.integration.services import Host
from vmferry.client import SourceClient, Target, Tries
from vmferry.v1 import drain_pb2 as dp

WATCH_S = 60.0


@contextlib.asynccontextmanager
async def left_clean(world: World) -> AsyncIterator[None]:
    """No test leaves a host draining, or a machine behind."""
    yield
    for host in world.hosts.values():
        async with client(world, host) as opened:
            await opened.undrain()
    left = await world.end_guests()
    assert not left, left
    assert all(service.running for service in world.services), "a service has ended"


def client(world: World, host: Host) -> contextlib.AbstractAsyncContextManager[SourceClient]:
    """The scheduler's connection to a host."""
    tls = world.tls_dir("controller")
    return SourceClient.open(host.source.address, host.identity.uri, tls, tries=Tries(pause_s=0.05))


def target(host: Host) -> Target:
    return Target(host.identity.uri, host.dest.address)


async def drained(
    world: World, host: Host, condition: Callable[[dp.Drain], object], what: str, seconds: float = WATCH_S
) -> dp.Drain:
    """Watch a host's drain until a condition holds."""
    seen = dp.Drain()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds), client(world, host) as opened:
            async for seen in opened.watch_drain():
                if condition(seen):
                    return seen
    pytest.fail(f"{what}: {seen}\n{host.source.log_text()[-3000:]}")


def is_in(state: dp.DrainState.ValueType) -> Callable[[dp.Drain], object]:
    return lambda seen: seen.state == state


def item_of(drain: dp.Drain, guest: Guest) -> dp.DrainedMachine:
    return next(item for item in drain.machines if item.machine_id == guest.id)


async def owners(world: World, guest: Guest) -> list[str]:
    """The hosts that may run a machine, by their journals."""
    return [name for name, host in world.hosts.items() if host.ledger.rights(guest.id).permitted]
