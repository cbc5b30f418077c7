"""Pieces of a stream reach the hypervisor in their order, or are refused by name; nothing waits for ever."""

from __future__ import annotations

import asyncio
import random

import pytest

from dest_svc.streaming import OrderedStream
from vmferry.errors import ChunkRejectedError, MachineFailedError, StaleAttemptError, StreamBrokenError
from vmferry.transfer.streams import MAX_PIECE_BYTES, StreamDigest
from vmferry.transfer.wire import PieceFrame
from vmferry.v1.transfer_pb2 import StreamPiece

WINDOW = 4 * MAX_PIECE_BYTES


class Hypervisor:
    """Takes bytes in, when it is let."""

    def __init__(self) -> None:
        self.taken = b""
        self.hung_up: Exception | None = None
        self.awake = asyncio.Event()
        self.awake.set()

    async def write(self, data: bytes) -> None:
        await self.awake.wait()
        if self.hung_up is not None:
            raise self.hung_up
        self.taken += data


def piece(offset: int, data: bytes = b"x", *, last: bool = False) -> PieceFrame:
    return PieceFrame(StreamPiece(offset=offset), data, last)


async def test_any_order_becomes_the_right_one() -> None:
    """Lanes that bring their pieces at odds with each other make one whole stream."""
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    chance = random.Random(seed)
    hypervisor, want = Hypervisor(), StreamDigest()
    stream = OrderedStream(hypervisor.write, window_bytes=WINDOW)
    pieces, whole = [], b""
    for _ in range(60):
        data = chance.randbytes(chance.randint(1, 9))
        pieces.append(piece(len(whole), data))
        whole += data
    pieces.append(piece(len(whole), b"", last=True))
    want.update(whole)
    chance.shuffle(pieces)
    await asyncio.gather(*(stream.put(one) for one in pieces))
    assert hypervisor.taken == whole
    assert stream.root() == want.root()


WRITTEN, WAITING = piece(0, b"0123"), piece(10, b"abcd")
BAD = {
    "empty": (piece(4, b""), "data"),
    "too large": (piece(4, bytes(MAX_PIECE_BYTES + 1)), "data"),
    "too far ahead": (piece(4 + WINDOW + 1), "offset"),
    "at the end of all numbers": (piece(2**64 - 1), "offset"),
    "written already": (piece(0, b"0123"), "offset"),
    "partly written": (piece(2, b"2345"), "offset"),
    "the same as one that waits": (piece(10, b"abcd"), "offset"),
    "into one that waits": (piece(8, b"89a"), "offset"),
    "around one that waits": (piece(8, b"89abcde"), "offset"),
    "inside one that waits": (piece(11, b"b"), "offset"),
    "an end before what waits": (piece(4, b"45", last=True), "last"),
    "an end inside of what waits": (piece(12, b"", last=True), "offset"),
}


@pytest.mark.parametrize("name", BAD)
async def test_a_piece_that_does_not_fit_is_refused(name: str) -> None:
    """Told by its field; what fits is still taken in afterwards."""
    bad, field = BAD[name]
    hypervisor = Hypervisor()
    stream = OrderedStream(hypervisor.write, window_bytes=WINDOW)
    await stream.put(WRITTEN)
    waiting = asyncio.create_task(stream.put(WAITING))
    await asyncio.sleep(0)
    with pytest.raises(ChunkRejectedError) as caught:
        await stream.put(bad)
    assert caught.value.field == field
    await asyncio.gather(stream.put(piece(4, b"456789")), waiting)
    await stream.put(piece(14, b"", last=True))
    assert hypervisor.taken == b"0123456789abcd"


@pytest.mark.parametrize("late", [piece(3), piece(9), piece(3, b"", last=True), piece(3, b"y", last=True)])
async def test_nothing_follows_the_end(late: PieceFrame) -> None:
    """Neither data nor another end."""
    stream = OrderedStream(Hypervisor().write, window_bytes=WINDOW)
    await stream.put(piece(0, b"abc", last=True))
    with pytest.raises(ChunkRejectedError) as caught:
        await stream.put(late)
    assert caught.value.field == "last"


async def test_a_stream_without_its_end_is_not_whole() -> None:
    """Neither with nothing, nor with everything but the end, nor with a gap before it."""
    stream = OrderedStream(Hypervisor().write, window_bytes=WINDOW)
    with pytest.raises(StreamBrokenError):
        stream.root()
    await stream.put(piece(0, b"abc"))
    with pytest.raises(StreamBrokenError):
        stream.root()
    ending = asyncio.create_task(stream.put(piece(9, b"", last=True)))
    await asyncio.sleep(0)
    with pytest.raises(StreamBrokenError, match="3 bytes"):
        stream.root()
    await stream.fail(StaleAttemptError("over"))
    await asyncio.gather(ending, return_exceptions=True)


async def test_closing_ends_every_wait() -> None:
    """Of a piece whose turn has not come, and of one that the hypervisor does not take."""
    hypervisor = Hypervisor()
    hypervisor.awake.clear()
    stream = OrderedStream(hypervisor.write, window_bytes=WINDOW)
    tasks = [asyncio.create_task(stream.put(piece(at))) for at in (0, 5, 7)]
    await asyncio.sleep(0)
    await stream.fail(StaleAttemptError("the attempt is closed"))
    async with asyncio.timeout(60):
        ended = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(error) for error in ended] == [StaleAttemptError] * 3
    with pytest.raises(StaleAttemptError):
        await stream.put(piece(0))
    assert hypervisor.taken == b""


async def test_a_hypervisor_that_hangs_up_fails_every_piece() -> None:
    """The one that is being written with the cause, and all others with what was said about it first."""
    hypervisor = Hypervisor()
    hypervisor.hung_up = MachineFailedError("it ended")
    stream = OrderedStream(hypervisor.write, window_bytes=WINDOW)
    waiting = asyncio.create_task(stream.put(piece(1)))
    await asyncio.sleep(0)
    with pytest.raises(MachineFailedError, match="it ended"):
        await stream.put(piece(0))
    with pytest.raises(MachineFailedError, match="it ended"):
        await waiting
