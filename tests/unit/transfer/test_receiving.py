"""One receiving lane: what becomes of a frame when its connection goes, or when it is refused."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable

import pytest

from vmferry.errors import HashMismatchError
from vmferry.transfer.receiving import Lane, Response
from vmferry.transfer.wire import Received, chunk_frame
from vmferry.v1 import transfer_pb2


class Connection:
    """A connection of a lane, fed by hand."""

    def __init__(self, lane: Lane, take: Taker) -> None:
        self._requests: asyncio.Queue[Received] = asyncio.Queue()
        self._responses = lane.serve(self._read(), take)

    async def _read(self) -> AsyncIterator[Received]:
        while True:
            yield await self._requests.get()

    def send(self, sequence: int, data: bytes = b"") -> None:
        """Send a frame that says nothing but its number, with so many bytes."""
        self._requests.put_nowait(chunk_frame(transfer_pb2.Chunk(sequence=sequence, data=data)))

    async def hear(self) -> Response:
        """The next response."""
        return await anext(self._responses)


class Taker:
    """Takes frames at once, or when it is told to."""

    def __init__(self, *, at_once: bool) -> None:
        self.at_once = at_once
        self.begun = asyncio.Event()
        self.go_on = asyncio.Event()
        self.taken: list[int] = []
        self.refuse = False

    def __call__(self, request: Received) -> int | Awaitable[int]:
        return self._put(request) if self.at_once else self._wait(request)

    async def _wait(self, request: Received) -> int:
        self.begun.set()
        await self.go_on.wait()
        return self._put(request)

    def _put(self, request: Received) -> int:
        if self.refuse:
            raise HashMismatchError("not what was sent", field="data_hash")
        assert not isinstance(request, transfer_pb2.TransferRequest)
        self.taken.append(request.head.sequence)
        return 0


async def test_a_frame_is_put_in_to_its_end_though_its_connection_is_gone() -> None:
    """The next connection is welcomed when it is in, with the frame counted; sent again it is not taken again."""
    lane, take = Lane(1 << 20), Taker(at_once=False)
    first = Connection(lane, take)
    await first.hear()
    first.send(1)
    answer = asyncio.create_task(first.hear())
    await take.begun.wait()
    answer.cancel()
    await asyncio.gather(answer, return_exceptions=True)
    second = Connection(lane, take)
    welcome = asyncio.create_task(second.hear())
    await asyncio.sleep(0)
    assert not welcome.done()
    take.go_on.set()
    assert (await welcome).welcome.acknowledged == 1
    second.send(1)
    assert (await second.hear()).ack.acknowledged == 1
    assert take.taken == [1]


async def test_what_is_done_at_once_needs_no_turn_of_the_loop() -> None:
    """A frame that waits is answered before anything else runs, so that nothing comes between."""
    lane, take = Lane(1 << 20), Taker(at_once=True)
    connection = Connection(lane, take)
    await connection.hear()
    connection.send(1)
    connection.send(2)
    turns: list[int] = []
    asyncio.get_running_loop().call_soon(turns.append, 1)
    assert [(await connection.hear()).ack.acknowledged for _ in range(2)] == [1, 2]
    assert not turns


async def test_the_loop_has_its_turn_after_a_large_frame() -> None:
    """However many have come already, whoever else waits for the loop does not wait for all of them."""
    connection = Connection(Lane(1 << 24), Taker(at_once=True))
    await connection.hear()
    turns: list[int] = []
    for sequence in (1, 2, 3):
        connection.send(sequence, bytes(1 << 20))
        asyncio.get_running_loop().call_soon(turns.append, sequence)
    assert (await connection.hear()).ack.acknowledged == 1
    assert not turns
    assert (await connection.hear()).ack.acknowledged == 2
    assert turns


@pytest.mark.parametrize("at_once", [True, False])
async def test_a_refused_frame_is_neither_counted_nor_in_the_way(at_once: bool) -> None:
    """Its connection is told why; the next one is welcomed without it, and is told the same of it."""
    lane, take = Lane(1 << 20), Taker(at_once=at_once)
    take.refuse = True
    take.go_on.set()
    for _ in range(2):
        connection = Connection(lane, take)
        assert (await connection.hear()).welcome.acknowledged == 0
        connection.send(1)
        with pytest.raises(HashMismatchError):
            await connection.hear()
    assert not lane.lock.locked()
    take.refuse = False
    connection = Connection(lane, take)
    await connection.hear()
    connection.send(1)
    assert (await connection.hear()).ack.acknowledged == 1
