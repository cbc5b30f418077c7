"""A memory file seen through mappings of parts of it: pages without a system call for each.

To read or write a page of a file by a system call costs three times what copying it costs. Through a mapping only the
copy is left, and what it takes to map pages, sixteen at a time. A whole guest is never mapped at once: mapped memory
is counted as the service's own by whoever does not look closely.

Promise: at most :data:`KEPT` windows stay mapped besides those in use. Whoever asks for a part makes sure that its
pages are there: touching one that is not would take memory, and end the process if there is none.
"""

from __future__ import annotations

import contextlib
import mmap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

WINDOW_BYTES: Final = 8 * 1024 * 1024
KEPT: Final = 2
AROUND_BYTES: Final = 64 * 1024
"""What Linux maps when one page of it is read, if it is there; of a page that is written first, only that page."""


@dataclass
class _Window:
    map: mmap.mmap
    users: int = 0


class Windows:
    """Windows into one file; may be used by several threads at a time."""

    def __init__(self, fd: int, size_bytes: int, *, writable: bool) -> None:
        self._fd = fd
        self._size_bytes = size_bytes
        self._protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        self._open: dict[int, _Window] = {}
        self._lock = threading.Lock()

    @property
    def mapped_bytes(self) -> int:
        """What is mapped now."""
        return sum(len(window.map) for window in tuple(self._open.values()))

    def views(self, offset: int, length: int) -> Iterator[memoryview]:
        """A part of the file, as views one behind the other; each is good until the next is asked for."""
        end = offset + length
        while offset < end:
            number, start = divmod(offset, WINDOW_BYTES)
            count = min(WINDOW_BYTES - start, end - offset)
            with (
                self._window(number) as window,
                memoryview(window) as whole,
                whole[start : start + count] as view,
            ):
                yield view
            offset += count

    def close(self) -> None:
        """Unmap all; nobody uses them any more."""
        with self._lock:
            for window in self._open.values():
                _close(window)
            self._open.clear()

    @contextmanager
    def _window(self, number: int) -> Iterator[mmap.mmap]:
        with self._lock:
            window = self._open.pop(number, None)
            if window is None:
                window = _Window(self._map(number))
            self._open[number] = window  # the last one is the one that was used last
            window.users += 1
            surplus = self._surplus()
        for one in surplus:
            _close(one)
        try:
            yield window.map
        finally:
            with self._lock:
                window.users -= 1

    def _map(self, number: int) -> mmap.mmap:
        start = number * WINDOW_BYTES
        size = min(WINDOW_BYTES, self._size_bytes - start)
        return mmap.mmap(self._fd, size, mmap.MAP_SHARED, self._protection, offset=start)

    def _surplus(self) -> list[_Window]:
        """Take out those that nobody uses, the oldest first, until few enough are left."""
        idle = [number for number, window in self._open.items() if not window.users]
        return [self._open.pop(number) for number in idle[: max(0, len(idle) - KEPT)]]


def _close(window: _Window) -> None:
    # A thread whose caller was cancelled may still look through it; then it goes with the last look.
    with contextlib.suppress(BufferError):
        window.map.close()


def map_around(view: memoryview) -> None:
    """Have pages mapped that are about to be written, sixteen at a time instead of each by itself."""
    bytes(view[::AROUND_BYTES])
