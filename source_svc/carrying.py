"""Carrying a hypervisor's stream to the lanes: read in pieces, compressed side by side, handed over in order.

Promise: pieces are handed over in the order of the stream, so that on each lane the one that is waited for comes
first; no more is read than the limit allows to be under way, counted as the stream has it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from source_svc.compressing import Compression
from vmferry.machines.stream_socket import StreamSource
from vmferry.together import together
from vmferry.transfer.compression import RAW
from vmferry.transfer.lanes import Lanes
from vmferry.transfer.pieces import PieceBuilder
from vmferry.transfer.streams import StreamDigest

CARRIERS: Final = 2
"""Pieces that are compressed at a time."""


@dataclass
class Carrier:
    """Carries one stream."""

    source: StreamSource
    lanes: Lanes
    digest: StreamDigest
    """Of what was read."""
    compression: Compression
    limit: Callable[[], int]
    """How many bytes of the stream may be under way."""
    piece_bytes: Callable[[int], int]
    """How large a piece may be, with such a limit."""
    _reading: asyncio.Lock = field(default_factory=asyncio.Lock)
    _handing_over: asyncio.Condition = field(default_factory=asyncio.Condition)
    _handed_bytes: int = 0

    @property
    def arrived_bytes(self) -> int:
        """What the destination's hypervisor has taken in, about."""
        return self.lanes.traffic.data_bytes - self.lanes.in_flight_bytes

    @property
    def under_way_bytes(self) -> int:
        """What was read and is not known to have arrived: being compressed, waiting for a lane, or in flight."""
        return self.digest.size_bytes - self.arrived_bytes

    async def run(self) -> None:
        """Carry until the hypervisor hangs up."""
        self.compression.start()
        await together(*(self._carry(PieceBuilder()) for _ in range(CARRIERS)))

    async def _carry(self, builder: PieceBuilder) -> None:
        while True:
            async with self._reading:
                began, limit = time.monotonic(), self.limit()
                await self.lanes.wait_for(partial(self._is_within, limit))
                blocked_s = time.monotonic() - began
                data = await self.source.read(self.piece_bytes(limit))
                if not data:
                    return
                offset = self.digest.size_bytes
                self.digest.update(data)
            method = self.compression.next()
            if method == RAW:
                piece, effort = builder.build(offset, data, method)
            else:
                piece, effort = await asyncio.to_thread(builder.build, offset, data, method)
            async with self._handing_over:
                await self._handing_over.wait_for(partial(self._is_next, offset))
                made = time.monotonic()
                await self.lanes.send(piece)
                blocked_s += time.monotonic() - made
                self._handed_bytes += len(data)
                self._handing_over.notify_all()
            self.compression.add(effort, blocked_s=blocked_s)

    def _is_within(self, limit: int) -> bool:
        return self.under_way_bytes <= limit

    def _is_next(self, offset: int) -> bool:
        return offset == self._handed_bytes
