"""Updates in place as tests ask for them, held at named places where that is wanted."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from tests.integration.hosts import Guest, World
from tests.integration.services import DEADLINE_S, Host, eventually
from vmferry import failpoints
from vmferry.handoff import updating
from vmferry.machines.beside import FOLDER
from vmferry.security.tls import open_channel
from vmferry.v1 import update_pb2 as pb
from vmferry.v1.update_pb2_grpc import UpdateServiceStub

if TYPE_CHECKING:  # the stub's type exists for checkers only
    from vmferry.v1.update_pb2_grpc import UpdateServiceAsyncStub


@contextlib.asynccontextmanager
async def updates(world: World, host: Host | None = None) -> AsyncIterator[UpdateServiceAsyncStub]:
    """Calls to the update service of a host: a, unless another one is named."""
    host = host or world.a
    async with open_channel(host.source.address, host.identity, world.material("controller")) as channel:
        yield UpdateServiceStub(channel)


async def ask(
    world: World,
    guest: Guest,
    *,
    max_pause_s: float = 30.0,
    request_id: str = "",
    qemu_binary: str = "",
    notice_s: float | None = None,
    host: Host | None = None,
) -> pb.Update:
    """Start an update."""
    request = pb.UpdateInPlaceRequest(machine=guest.id, request_id=request_id or str(uuid.uuid4()))
    request.target.qemu_binary = qemu_binary
    request.max_pause.FromNanoseconds(int(max_pause_s * 1e9))
    if notice_s is not None:
        request.notice.FromNanoseconds(int(notice_s * 1e9))
    async with updates(world, host) as stub:
        return (await stub.UpdateInPlace(request, timeout=DEADLINE_S)).update


async def ended(world: World, update: pb.Update, host: Host | None = None) -> pb.Update:
    """Wait for its end."""
    async with asyncio.timeout(2 * DEADLINE_S), updates(world, host) as stub:
        async for answer in stub.WatchUpdate(pb.WatchUpdateRequest(id=update.id)):
            update = answer.update
    assert update.phase == pb.UPDATE_PHASE_ENDED
    return update


def nothing_open(host: Host, guest: Guest) -> bool:
    """Whether the journal says that no update is open, and nothing is left of one."""
    still = isinstance(host.ledger.rights(guest.id).update, updating.Still)
    return still and not (host.record(guest.id).paths.home / FOLDER).exists()


async def armed(world: World, what: str) -> None:
    """Start the source service of host a anew, with a failpoint."""
    world.a.source.environment[failpoints.VARIABLE] = what
    await world.a.source.restart()


async def held(world: World, guest: Guest, place: str, **how: float) -> asyncio.Task[pb.Update]:
    """Begin an update whose service is held at a place."""
    await armed(world, f"update.{place}=stop")
    asked = asyncio.create_task(ask(world, guest, **how))  # type: ignore[arg-type] # the longest pause
    await eventually(lambda: world.a.source.status("State").startswith("T"), "the service stands there")
    return asked
