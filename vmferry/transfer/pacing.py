"""Keeping what is sent within a rate: a token bucket. Pure: no I/O, no clock; the caller says what time it is.

Promise: in any window of a second or more no more is let through than the rate allows and five per cent, as long as
no frame is larger than :func:`largest_frame`; a sender that always has something to send gets all of the rate. What
is counted is what goes over the wire: the bytes of a frame, and what the layers below add to them.
"""

from __future__ import annotations

from typing import Final

LEAST_BYTES_PER_S: Final = 256 * 1024
"""The lowest rate: below it a frame with a single page would be too much for the promise."""

_OVERHEAD: Final = 1.02
"""TLS, HTTP/2 and TCP add 0.4 % on loopback and 4.5 % on Ethernet; in between, either is well within the promise."""
_CREDIT_S: Final = 0.020
"""How much of what a late sender has missed it may make up for."""
_FRAME_S: Final = 0.020
"""No frame takes longer than this at the rate that it is made for."""
_LEAST_FRAME_BYTES: Final = 4096


def largest_frame(bytes_per_second: float | None, frame_bytes: int) -> int:
    """The largest frame for a rate, a multiple of a page; ``frame_bytes`` if that is smaller or there is no rate."""
    if bytes_per_second is None:
        return frame_bytes
    pages = int(bytes_per_second * _FRAME_S) // _LEAST_FRAME_BYTES
    return min(frame_bytes, max(pages, 1) * _LEAST_FRAME_BYTES)


class TokenBucket:
    """Says when the next frame may go. It may go when all before it are paid for."""

    def __init__(self, bytes_per_second: float | None = None) -> None:
        self._rate = bytes_per_second
        self._paid_at = 0.0

    @property
    def bytes_per_second(self) -> float | None:
        """The rate; ``None`` if there is no limit."""
        return self._rate

    def change(self, bytes_per_second: float | None, now_s: float) -> None:
        """Go on with another rate; what was sent and is not paid for yet is paid for at the new one."""
        owed = max(0.0, self._paid_at - now_s) * (self._rate or 0.0)
        self._rate = bytes_per_second
        self._paid_at = now_s + (owed / bytes_per_second if bytes_per_second else 0.0)

    def wait_s(self, now_s: float) -> float:
        """How long the next frame has to wait."""
        return 0.0 if self._rate is None else max(0.0, self._paid_at - now_s)

    def spend(self, frame_bytes: int, now_s: float) -> None:
        """Note that a frame goes out, which did not have to wait any longer."""
        if self._rate is not None:
            self._paid_at = max(self._paid_at, now_s - _CREDIT_S) + frame_bytes * _OVERHEAD / self._rate
