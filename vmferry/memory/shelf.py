"""Room outside of a service's memory: a file without a name, for what is too much to be kept in it.

Promise: the file goes with its shelf, also when the process is killed. It takes disk only for what was put there.
Where there is no room, whoever was to be told is told once, and nothing more is taken: the caller keeps it then.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from pathlib import Path

from vmferry.memory.nameless import open_nameless


class Shelf:
    """Bytes by their offset."""

    def __init__(self, folder: Path, refused: Callable[[OSError], None] = lambda _: None) -> None:
        """Make nothing yet.

        Args:
            folder: where the file will be; on a disk, or it is memory after all.
            refused: told why nothing more can be put here.
        """
        self._folder = folder
        self._refused = refused
        self._lock = threading.Lock()
        self._fd = -1
        self._full = False

    def put(self, data: bytes, offset: int) -> bool:
        """Take something new in; says whether there was room."""
        with self._lock:
            if self._full:
                return False
            try:
                if self._fd < 0:
                    self._fd = self._open()
                self.write(data, offset)
            except OSError as error:
                self._full = True
                self._refused(error)
                return False
            return True

    def write(self, data: bytes, offset: int) -> None:
        """Replace something that was put here.

        Raises:
            OSError: the file system took less than it had room for.
        """
        written = 0
        while written < len(data):
            written += os.pwrite(self._fd, memoryview(data)[written:], offset + written)

    def read(self, size: int, offset: int) -> bytes:
        """What was put here."""
        return os.pread(self._fd, size, offset)

    def _open(self) -> int:
        fd = open_nameless(self._folder)
        weakref.finalize(self, os.close, fd)
        return fd
