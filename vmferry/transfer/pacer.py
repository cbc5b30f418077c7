"""The one gate that all frames of a migration go through, whichever lane they take, new ones and repeated ones.

Promise: frames pass in the order in which they came, none earlier than :mod:`vmferry.transfer.pacing` allows; a rate
that is changed applies to those that wait already.
"""

from __future__ import annotations

import asyncio
import contextlib

from vmferry.transfer.pacing import TokenBucket, largest_frame


class Pacer:
    """Keeps all lanes of a migration together within a rate."""

    def __init__(self, bytes_per_second: float | None = None) -> None:
        self._bucket = TokenBucket(bytes_per_second)
        self._turn = asyncio.Lock()
        self._changed = asyncio.Event()

    @property
    def bytes_per_second(self) -> float | None:
        """The rate; ``None`` if there is no limit."""
        return self._bucket.bytes_per_second

    def change(self, bytes_per_second: float | None) -> None:
        """Apply another rate from now on."""
        if bytes_per_second != self._bucket.bytes_per_second:
            self._bucket.change(bytes_per_second, asyncio.get_running_loop().time())
            self._changed.set()

    def largest_frame(self, frame_bytes: int) -> int:
        """How large the next frame may be made, of at most so many bytes."""
        return largest_frame(self.bytes_per_second, frame_bytes)

    async def admit(self, frame_bytes: int) -> None:
        """Return when a frame of so many bytes may go out."""
        if self._bucket.bytes_per_second is None and not self._turn.locked():
            return
        loop = asyncio.get_running_loop()
        async with self._turn:
            while (wait_s := self._bucket.wait_s(loop.time())) > 0:
                self._changed.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait_s):
                        await self._changed.wait()
            self._bucket.spend(frame_bytes, loop.time())
