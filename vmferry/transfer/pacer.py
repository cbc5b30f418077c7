"""The one gate that all frames of a migration go through, whichever lane they take, new ones and repeated ones.

Promise: frames pass one after the other, none earlier than :mod:`vmferry.transfer.pacing` allows; a rate that is
changed applies to those that wait already. Lanes wait in their own threads; any thread may change the rate.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from vmferry.transfer.pacing import TokenBucket, largest_frame


class Pacer:
    """Keeps all lanes of a migration together within a rate."""

    def __init__(self, bytes_per_second: float | None = None) -> None:
        self._bucket = TokenBucket(bytes_per_second)
        self._turn = threading.Lock()
        """Held by the frame that is the next to pass."""
        self._changed = threading.Condition()

    @property
    def bytes_per_second(self) -> float | None:
        """The rate; ``None`` if there is no limit."""
        return self._bucket.bytes_per_second

    def change(self, bytes_per_second: float | None) -> None:
        """Apply another rate from now on."""
        with self._changed:
            if bytes_per_second != self._bucket.bytes_per_second:
                self._bucket.change(bytes_per_second, time.monotonic())
                self._changed.notify_all()

    def wake(self) -> None:
        """Have those that wait look whether they still have to."""
        with self._changed:
            self._changed.notify_all()

    def largest_frame(self, frame_bytes: int) -> int:
        """How large the next frame may be made, of at most so many bytes."""
        return largest_frame(self.bytes_per_second, frame_bytes)

    def admit(self, frame_bytes: int, given_up: Callable[[], bool] = lambda: False) -> None:
        """Return when a frame of so many bytes may go out, or whoever sends it has given up."""
        if self._bucket.bytes_per_second is None and not self._turn.locked():
            return
        with self._turn, self._changed:
            while not given_up() and (wait_s := self._bucket.wait_s(time.monotonic())) > 0:
                self._changed.wait(wait_s)
            self._bucket.spend(frame_bytes, time.monotonic())
