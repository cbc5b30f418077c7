"""Lanes carry everything exactly once over connections that break, and fail with the other side's own reason."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import grpc
import pytest

from dest_svc.intake import DeviceStateBuffer, take_frame
from vmferry.errors import HashMismatchError, PeerUnreachableError, StaleAttemptError, TimedOutError
from vmferry.memory.digest import PageTable
from vmferry.memory.regions import RamFile
from vmferry.memory.runs import PAGE_SIZE, PageRuns
from vmferry.rpc.handlers import read_requests_with
from vmferry.rpc.status import to_grpc_status
from vmferry.transfer.frames import ChunkBuilder, Intake
from vmferry.transfer.lanes import Lanes, LaneSettings
from vmferry.transfer.receiving import Lane
from vmferry.transfer.window import Window
from vmferry.transfer.wire import Received, chunk_frame, decode_request
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
        self.away: set[int] = set()
        """Lanes that nobody answers; the others are answered once each of these has lost a frame."""
        self.lost_one = asyncio.Event()
        self._intake = intake
        self._server: grpc.aio.Server | None = None
        self.port = 0

    async def listen(self, port: int = 0) -> None:
        """Serve at a port, or any free one."""
        self._server = grpc.aio.server(interceptors=[Rejecting()], options=[("grpc.so_reuseport", 0)])
        handoff_pb2_grpc.add_DestinationServiceServicer_to_server(self, self._server)
        name = handoff_pb2.DESCRIPTOR.services_by_name["DestinationService"].full_name
        read_requests_with(self._server, name, self.Transfer, decode_request)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{port}")
        await self._server.start()

    async def hang_up(self) -> None:
        """Send everybody away, and listen no more."""
        if self._server is not None:
            server, self._server = self._server, None
            await server.stop(None)

    async def Transfer(  # noqa: N802 - named by the contract
        self, request_iterator: AsyncIterator[Received], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[transfer_pb2.TransferResponse]:
        opening = await anext(aiter(request_iterator))
        if opening.open.lane in self.away:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "nobody answers")
        self.connections += 1
        left = self.break_after.pop() if self.break_after else -1
        take = partial(self._take, opening.open.lane)
        serve = self.lanes[opening.open.lane].serve(request_iterator, take, opening.open.connection)
        async for response in serve:
            yield response
            if self.hang:
                await asyncio.Event().wait()
            left -= 1
            if left == 0:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "the link was cut")

    async def _take(self, lane: int, request: Received) -> int:
        if lane in self.away:
            self.lost_one.set()
            raise ConnectionResetError("the link was cut")
        if self.away:
            await self.lost_one.wait()
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
    folder: Path, *, stall_timeout_s: float = 20.0, reconnect_timeout_s: float = 20.0
) -> AsyncIterator[tuple[RamFile, Intake, Receiver, Lanes, list[str]]]:
    """Source memory, destination memory, the receiver between them, lanes, and the events they told."""
    events: list[str] = []
    with (
        RamFile.create(folder / "a.ram", PAGES * PAGE_SIZE) as ram,
        RamFile.create(folder / "b.ram", PAGES * PAGE_SIZE) as other,
    ):
        intake = Intake(other, PageTable(PAGES))
        receiver = Receiver(intake)
        await receiver.listen()
        options = [("grpc.use_local_subchannel_pool", 1)]
        lanes = Lanes(
            LaneSettings(
                migration_id=b"m" * 16,
                transfer_token=b"t" * 32,
                open_channel=lambda: grpc.insecure_channel(f"127.0.0.1:{receiver.port}", options),
                window=Window(LANES, LANES * 64 * 1024, 16 * PAGE_SIZE),
                stall_timeout_s=stall_timeout_s,
                reconnect_timeout_s=reconnect_timeout_s,
                on_event=lambda name, _facts: events.append(name),
            )
        )
        try:
            yield ram, intake, receiver, lanes, events
        finally:
            await lanes.close()
            await receiver.hang_up()


async def until(condition: Callable[[], object]) -> None:
    """Poll until a condition holds."""
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - conditions of several objects, none of which tells
            await asyncio.sleep(0.005)


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
        assert 1 <= lanes.traffic.reconnects == receiver.connections - LANES
        assert events.count("lane lost") == events.count("lane reopened") == lanes.traffic.reconnects


async def test_closed_lanes_read_nothing_more(tmp_path: Path) -> None:
    """Whoever closes them may close what they read: a chunk that is being made is waited for."""
    entered, leave = threading.Event(), threading.Event()

    class Slow:
        def next(self, waited_s: float) -> None:
            del waited_s  # a chunk that takes long
            entered.set()
            leave.wait(60)

    async with two_ends(tmp_path) as (_ram, _intake, _receiver, lanes, _events):
        await lanes.open()
        carrying = asyncio.create_task(lanes.carry(Slow()))
        await asyncio.to_thread(entered.wait, 60)
        carrying.cancel()
        closing = asyncio.create_task(lanes.close())
        done, _ = await asyncio.wait({closing}, timeout=0.3)
        leave.set()
        await closing
        assert not done


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


async def test_a_destination_that_is_away_is_waited_for(tmp_path: Path) -> None:
    """For longer than a stall may last; then all goes on, and no more than the window is sent twice."""
    async with two_ends(tmp_path, stall_timeout_s=0.5) as (ram, intake, receiver, lanes, events):
        scribble(ram, 2)
        await lanes.open()
        sending = asyncio.create_task(send_all(ram, lanes, PageTable(PAGES)))
        await until(lambda: sum(lane.frames for lane in receiver.lanes) > 4)
        await receiver.hang_up()
        await until(lambda: lanes.connections.standing == 0)
        assert not sending.done()
        # What had come when the connections were lost may still be on its way into memory for a moment.
        await until(lambda: (lanes.connections.all_lost_s or 0.0) > 0.5)
        arrived = sum(lane.frames for lane in receiver.lanes)
        await until(lambda: (lanes.connections.all_lost_s or 0.0) > 1.5)
        assert lanes.connections.reconnect_left_s < 20.0 - 1.5
        assert sum(lane.frames for lane in receiver.lanes) == arrived
        await receiver.listen(receiver.port)
        await sending
        await lanes.finish()
        assert intake.ram.path.read_bytes() == ram.path.read_bytes()
        assert lanes.traffic.reconnects == LANES
        assert lanes.traffic.repeated_bytes <= LANES * 64 * 1024 + LANES * 1024
        assert [events.count(name) for name in ("connection lost", "connection back", "lane lost")] == [
            1,
            1,
            3,
        ]
        assert lanes.connections.broken_s > 1.5


async def test_a_destination_that_stays_away_is_named(tmp_path: Path) -> None:
    """The limit and the last cause are told."""
    async with two_ends(tmp_path, reconnect_timeout_s=0.8) as (ram, _intake, receiver, lanes, _events):
        await lanes.open()
        await receiver.hang_up()
        with pytest.raises(PeerUnreachableError, match=r"for 0.8 s: .*127\.0\.0\.1") as failed:
            await send_all(ram, lanes, PageTable(PAGES))
        assert failed.value.metadata["limit"] == "reconnect_timeout"


async def test_a_lane_that_is_away_does_not_hold_up_the_others(tmp_path: Path) -> None:
    """All but what the lost lane had taken arrives while it is away; it brings the rest when it is back."""
    async with two_ends(tmp_path, stall_timeout_s=0.5) as (ram, intake, receiver, lanes, _events):
        scribble(ram, 3)
        await lanes.open()
        receiver.away = {1}
        sending = asyncio.create_task(send_all(ram, lanes, PageTable(PAGES)))
        frame_bytes = 16 * PAGE_SIZE
        await until(lambda: sum(lane.frames for lane in receiver.lanes) >= PAGES // 16 - 1)
        assert lanes.connections.standing == LANES - 1
        assert lanes.connections.all_lost_s is None
        await until(
            lambda: lanes.in_flight_bytes <= frame_bytes + 1024
        )  # the last acknowledgements are heard
        await until(lambda: lanes.connections.broken_s > 1.0)
        assert not sending.done()
        receiver.away.clear()
        await sending
        await lanes.finish()
        assert intake.ram.path.read_bytes() == ram.path.read_bytes()


async def test_an_opening_that_comes_late_does_not_take_the_lane() -> None:
    """An older connection's opening is refused and the newer one goes on; a source that does not count may reopen."""

    async def nothing() -> AsyncIterator[Received]:
        await asyncio.Event().wait()
        yield transfer_pb2.TransferRequest()

    async def take(_request: Received) -> int:
        return 0

    lane = Lane(1 << 20)
    requests: asyncio.Queue[Received] = asyncio.Queue()

    async def of_queue() -> AsyncIterator[Received]:
        while True:
            yield await requests.get()

    newer = lane.serve(of_queue(), take, 2)
    assert (await anext(newer)).WhichOneof("message") == "welcome"
    for late in (1, 2):
        with pytest.raises(StaleAttemptError):
            await anext(lane.serve(nothing(), take, late))
    await requests.put(chunk_frame(transfer_pb2.Chunk(sequence=1)))
    assert (await anext(newer)).ack.acknowledged == 1
    assert (await anext(lane.serve(nothing(), take))).welcome.acknowledged == 1
    await requests.put(chunk_frame(transfer_pb2.Chunk(sequence=2)))
    with pytest.raises(StaleAttemptError):
        await anext(newer)
