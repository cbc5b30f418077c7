"""Reading a round's pages for the lanes, in whichever of their threads has room for them.

Promise: each page of the round is read once; a lane's thread reads, hashes and compresses a chunk with a builder of
its own; memory that is zero is passed by without giving the lane anything to send.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from source_svc.compressing import Compression
from vmferry.transfer.frames import Batches, BuiltChunk, ChunkBuilder
from vmferry.transfer.traffic import Traffic


@dataclass(frozen=True)
class Round:
    """What is read."""

    number: int
    batches: Batches
    compare_only: bool
    """Whether the destination is to compare instead of write."""

    @property
    def names_zeros(self) -> bool:
        """Whether pages that are zero are named: the destination's memory is new at first, and therefore zero."""
        return self.number > 1


class PageSupply:
    """Makes a round's chunks."""

    def __init__(
        self,
        of: Round,
        builders: Sequence[ChunkBuilder],
        compression: Compression,
        traffic: Traffic,
        *,
        page_count: int,
    ) -> None:
        self.left = page_count
        """Pages that were not read yet."""
        self._round = of
        # Whatever is told while pages are read belongs to the span of whoever begins the round.
        self._free = [(builder, contextvars.copy_context()) for builder in builders]
        self._compression = compression
        self._traffic = traffic
        self._lock = threading.Lock()
        self._stopped = False

    def stop(self) -> None:
        """Make nothing more, however much is left."""
        self._stopped = True

    def next(self, waited_s: float) -> BuiltChunk | None:
        """The next chunk that says something; ``None`` if the round has no more."""
        with self._lock:
            builder, context = self._free.pop()
        try:
            return context.run(self._next, builder, waited_s)
        finally:
            with self._lock:
                self._free.append((builder, context))

    def _next(self, builder: ChunkBuilder, waited_s: float) -> BuiltChunk | None:
        while not self._stopped and (runs := self._round.batches.next()):
            built = builder.build(
                runs,
                round_number=self._round.number,
                method=self._compression.next(),
                zeros=self._round.names_zeros,
                compare_only=self._round.compare_only,
            )
            self._compression.add(built.effort, blocked_s=waited_s)
            waited_s = 0.0
            with self._lock:
                self.left -= built.pages
                self._traffic.zero_pages += 0 if self._round.compare_only else built.zero_pages
            if not built.empty:
                return built
        return None
