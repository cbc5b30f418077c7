"""Lanes carry everything exactly once over connections that break, and fail with the other side's own reason."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest

from dest_svc.intake import DeviceStateBuffer, Lane, take_frame
from vmferry.errors import HashMismatchError, TimedOutError
from vmferry.memory.digest import PageTable
from vmferry.memory.regions import RamFile
from vmferry.memory.runs import PAGE_SIZE, PageRuns
from vmferry.rpc.handlers import read_requests_with
from vmferry.rpc.status import to_grpc_status
from vmferry.transfer.frames import ChunkBuilder, Intake
from vmferry.transfer.lanes import Lanes, LaneSettings
from vmferry.transfer.wire import Received, decode_request
from vmferry.v1 import handoff_pb2, handoff_pb2_grpc, transfer_pb2

PAGES = 512
LANES = 3


class Receiver(handoff_pb2_grpc.DestinationServiceServicer):
    """The real receiving lanes behind a method that breaks off when told to."""

    def __init__(self, intake: Intake) -> None:
        self.device_state = DeviceStateBuffer()
        self.lanes = [Lane(1 << 20) for _ in range(LANES)]
        self.connections = 0
        self.break_after: list[int] = []
        self.reject: Exception | None = None
        self.hang = False
        self._intake = intake

    async def Transfer(  # noqa: N802 - named by the contract
        self, request_iterator: AsyncIterator[Received], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[transfer_pb2.TransferResponse]:
        opening = await anext(aiter(request_iterator))
        self.connections += 1
        left = self.break_after.pop() if self.break_after else -1
        serve = self.lanes[opening.open.lane].serve(request_iterator, self._take)
        async for response in serve:
            yield response
            if self.hang:
                await asyncio.Event().wait()
            left -= 1
            if left == 0:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "the link was cut")

    async def _take(self, request: Received) -> int:
        if self.reject is not None:
            raise self.reject
        return await asyncio.to_thread(take_frame, self._intake, self.device_state, request)


class Rejecting(grpc.aio.ServerInterceptor):
    """Ends a call with the status of the error its handler raised, as the real server does."""

    async def intercept_service(self, continuation: object, details: object) -> grpc.RpcMethodHandler:
        handler = await continuation(details)

        async def call(requests: object, context: grpc.aio.ServicerContext) -> AsyncIterator[object]:
            try:
                async for response in handler.stream_stream(requests, context):
                    yield response
            except HashMismatchError as error:
                await context.abort_with_status(to_grpc_status(error))

        return grpc.stream_stream_rpc_method_handler(
            call, handler.request_deserializer, handler.response_serializer
        )


@asynccontextmanager
async def two_ends(
    folder: Path, *, stall_timeout_s: float = 20.0
) -> AsyncIterator[tuple[RamFile, Intake, Receiver, Lanes, list[str]]]:
    """Source memory, destination memory, the receiver between them, lanes, and the events they told."""
    events: list[str] = []
    with (
        RamFile.create(folder / "a.ram", PAGES * PAGE_SIZE) as ram,
        RamFile.create(folder / "b.ram", PAGES * PAGE_SIZE) as other,
    ):
        intake = Intake(other, PageTable(PAGES))
        receiver = Receiver(intake)
        server = grpc.aio.server(interceptors=[Rejecting()])
        handoff_pb2_grpc.add_DestinationServiceServicer_to_server(receiver, server)
        name = handoff_pb2.DESCRIPTOR.services_by_name["DestinationService"].full_name
        read_requests_with(server, name, receiver.Transfer, decode_request)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        options = [("grpc.use_local_subchannel_pool", 1)]
        lanes = Lanes(
            LaneSettings(
                migration_id=b"m" * 16,
                transfer_token=b"t" * 32,
                open_channel=lambda: grpc.aio.insecure_channel(f"127.0.0.1:{port}", options),
                count=LANES,
                window_bytes=LANES * 64 * 1024,
                frame_bytes=16 * PAGE_SIZE,
                stall_timeout_s=stall_timeout_s,
                on_event=lambda name, _facts: events.append(name),
            )
        )
        try:
            yield ram, intake, receiver, lanes, events
        finally:
            await lanes.close()
            await server.stop(None)


async def send_all(ram: RamFile, lanes: Lanes, table: PageTable) -> None:
    builder = ChunkBuilder(ram, table)
    for runs in PageRuns.whole(PAGES).batches(16):
        await lanes.send(builder.build(runs, round_number=1))
    await lanes.drain()


def scribble(ram: RamFile, seed: int) -> None:
    print(f"seed {seed}")
    data = random.Random(seed).randbytes(PAGES * PAGE_SIZE)
    ram.write_pages([(0, PAGES)], memoryview(data))


async def test_memory_and_device_state_arrive_whole(tmp_path: Path) -> None:
    """Over quiet lanes everything arrives, and each lane is on a connection of its own."""
    async with two_ends(tmp_path) as (ram, intake, receiver, lanes, events):
        scribble(ram, random.randrange(1 << 30))
        table = PageTable(PAGES)
        await lanes.open()
        await send_all(ram, lanes, table)
        state = random.Random(1).randbytes(3_000_000)
        await lanes.send_device_state(state)
        await lanes.finish()
        assert intake.ram.path.read_bytes() == ram.path.read_bytes()
        assert intake.table.root() == table.root()
        assert receiver.device_state.whole() == state
        assert all(lane.ended.is_set() for lane in receiver.lanes)
        assert (receiver.connections, events) == (LANES, [])
        assert lanes.traffic.data_bytes == PAGES * PAGE_SIZE + len(state)


async def test_broken_connections_are_not_noticed_by_the_sender(tmp_path: Path) -> None:
    """Connections that break at any moment are reopened; every frame still arrives exactly once."""
    seed = random.randrange(1 << 30)
    async with two_ends(tmp_path) as (ram, intake, receiver, lanes, events):
        scribble(ram, seed)
        receiver.break_after = [1, *(random.Random(seed).randint(1, 6) for _ in range(9))]
        table = PageTable(PAGES)
        await lanes.open()
        await send_all(ram, lanes, table)
        await lanes.finish()
        assert intake.ram.path.read_bytes() == ram.path.read_bytes()
        assert sum(lane.frames for lane in receiver.lanes) == PAGES // 16
        assert 1 <= lanes.traffic.reconnects == len(events) == receiver.connections - LANES


async def test_a_rejection_ends_the_transfer_with_its_reason(tmp_path: Path) -> None:
    """What the destination rejects is not tried again."""
    async with two_ends(tmp_path) as (ram, _intake, receiver, lanes, _events):
        receiver.reject = HashMismatchError("not what was sent")
        await lanes.open()
        with pytest.raises(HashMismatchError, match="not what was sent"):
            await send_all(ram, lanes, PageTable(PAGES))


async def test_a_stall_is_noticed_and_named(tmp_path: Path) -> None:
    """A destination that stays connected and acknowledges nothing does not hang the source for ever."""
    async with two_ends(tmp_path, stall_timeout_s=0.4) as (ram, _intake, receiver, lanes, _events):
        scribble(ram, 1)
        await lanes.open()
        receiver.hang = True
        with pytest.raises(TimedOutError) as stalled:
            await send_all(ram, lanes, PageTable(PAGES))
        assert stalled.value.metadata["limit"] == "stall_timeout"
