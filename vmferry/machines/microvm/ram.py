"""Guest RAM: a file mapped shared, whose page writes another process can ask the kernel about.

Promise: the mapping is exactly the file, stays at one address for the life of the process, and the file outlives the
process. With tracking on, the mapping is registered with a userfaultfd of this process in asynchronous
write-protect mode, which is what ``PAGEMAP_SCAN`` from another process needs; writes by guest code and writes by
this process on behalf of devices are both seen, because both go through this one mapping.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import stat
from pathlib import Path

from vmferry.errors import ConfigError, TrackerUnavailableError
from vmferry.memory.userfault import track_own_range

_log = logging.getLogger(__name__)


class AddressError(ValueError):
    """A guest named memory that the machine does not have; never leaves the device that raised it."""


class Ram:
    """The memory of one machine."""

    def __init__(self, path: Path, size: int) -> None:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as error:
            raise ConfigError(
                f"cannot open the RAM file {path}: {error.strerror}", field="ram-file"
            ) from error
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode) or found.st_size != size:
                raise ConfigError(
                    f"the RAM file {path} has {found.st_size} bytes, the machine needs a file of exactly {size}",
                    field="ram-file",
                )
            self._mapping = mmap.mmap(descriptor, size, mmap.MAP_SHARED)
        finally:
            os.close(descriptor)
        self.size = size
        # JUSTIFICATION: the CPU engine needs the address of the mapping.
        # SAFETY: the exported buffer keeps the mapping from being closed or resized while this object lives.
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._mapping))

    def track_writes(self) -> None:
        """Let the kernel note writes for whoever asks; where it cannot, the machine runs all the same."""
        try:
            self._tracker = track_own_range(self.address, self.size)
        except TrackerUnavailableError as error:
            _log.warning("writes to RAM are not tracked: %s", error)

    def check(self, address: int, length: int) -> None:
        """Raise :class:`AddressError` unless the range lies inside."""
        if not 0 <= address <= address + length <= self.size:
            raise AddressError(f"{length} bytes at {address:#x} are outside of memory")

    def read(self, address: int, length: int) -> bytes:
        """A copy of a range."""
        self.check(address, length)
        return self._mapping[address : address + length]

    def write(self, address: int, data: bytes) -> None:
        """Replace a range; only while no CPU may have translated code from it."""
        self.check(address, len(data))
        self._mapping[address : address + len(data)] = data
