"""Pieces that are compressed side by side reach the lanes in the order of their stream."""

from __future__ import annotations

import asyncio
import itertools
import random
from pathlib import Path
from typing import cast

from source_svc.carrying import Carrier
from source_svc.compressing import Compression
from vmferry.machines.stream_socket import StreamSource
from vmferry.negotiation.encodings import ENCODINGS
from vmferry.transfer.compression import METHODS
from vmferry.transfer.lanes import Lanes
from vmferry.transfer.pieces import unpack
from vmferry.transfer.streams import StreamDigest
from vmferry.transfer.traffic import Traffic
from vmferry.transfer.wire import PieceFrame

MIB = 1024 * 1024
WINDOW = 6 * MIB


class SlowLanes:
    """Lanes on which what was handed over arrives when more is waited for."""

    def __init__(self) -> None:
        self.traffic = Traffic()
        self.in_flight_bytes = 0
        self.handed: list[PieceFrame] = []
        self.most_under_way = 0

    async def send(self, piece: PieceFrame) -> None:
        self.handed.append(piece)
        size = piece.head.decoded_bytes or len(piece.data)
        self.traffic.data_bytes += size
        self.in_flight_bytes += size
        self.most_under_way = max(self.most_under_way, self.in_flight_bytes)
        await asyncio.sleep(0)

    async def wait_for(self, condition: object) -> None:
        assert callable(condition)
        while not condition():
            self.in_flight_bytes = 0
            await asyncio.sleep(0)


async def test_a_piece_that_is_quickly_compressed_waits_for_the_one_before(tmp_path: Path) -> None:
    """Large and small ones in turn: all come in their order, whole, and within the limit."""
    chance = random.Random(1)
    whole = b"".join(chance.choice([b"memory", chance.randbytes(64)]) * 1024 for _ in range(700))
    source, lanes, digest = StreamSource(tmp_path / "stream"), SlowLanes(), StreamDigest()
    sizes = itertools.cycle([2 * MIB, 3000])
    carrier = Carrier(
        source,
        cast("Lanes", lanes),
        digest,
        Compression([METHODS[4]], readers=2, traffic=lambda: lanes.traffic),
        lambda: WINDOW,
        lambda _limit: next(sizes),
    )
    source.listen()
    _, writer = await asyncio.open_unix_connection(tmp_path / "stream")
    await source.accept()
    carrying = asyncio.create_task(carrier.run())
    try:
        writer.write(whole)
        await writer.drain()
        writer.close()
        async with asyncio.timeout(60):
            await carrying
    finally:
        carrying.cancel()
        writer.close()
        source.close()
    offsets = [piece.head.offset for piece in lanes.handed]
    assert offsets == sorted(offsets)
    assert len(offsets) > 10
    assert b"".join(bytes(unpack(piece, ENCODINGS).data) for piece in lanes.handed) == whole
    assert digest.size_bytes == len(whole)
    assert sum(len(piece.data) for piece in lanes.handed) < len(whole) / 2
    assert lanes.most_under_way <= WINDOW + 2 * 2 * MIB
