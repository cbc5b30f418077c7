"""The two notions every device is built from: a part with state, and the bus of I/O ports.

Promise: no access of a guest to a port can raise into the engine. One that makes no sense is ignored (a read gives
all ones), counted, and logged the first time.
"""

from __future__ import annotations

import logging
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Final

from vmferry.errors import DeviceStateError

_log = logging.getLogger(__name__)

U32: Final = (1 << 32) - 1


class Part(ABC):
    """A part of the machine with state that moves with it."""

    name: ClassVar[str]
    version: ClassVar[int]
    upgrades: ClassVar[Mapping[int, Callable[[bytes], bytes]]] = MappingProxyType({})
    """By version, how a payload of that version becomes one of the next."""

    @abstractmethod
    def save(self) -> bytes:
        """The state as bytes; only while the CPU stands still."""

    @abstractmethod
    def prepare(self, payload: bytes) -> Callable[[], None]:
        """Check a saved state without touching anything; calling the result applies it and cannot fail.

        Raises:
            DeviceStateError: the payload cannot be the state of this part of this machine.
        """

    def _unpack(self, layout: struct.Struct, payload: bytes) -> tuple[Any, ...]:
        if len(payload) != layout.size:
            message = f"section {self.name!r} has {len(payload)} bytes instead of {layout.size}"
            raise DeviceStateError(message, section=self.name)
        return layout.unpack(payload)


class PortBus:
    """Which device answers at which port."""

    def __init__(self) -> None:
        self._readers: dict[int, Callable[[], int]] = {}
        self._writers: dict[int, Callable[[int], None]] = {}
        self.misuses = 0

    def on_read(self, port: int, reader: Callable[[], int]) -> None:
        """Let ``reader`` answer reads of ``port``."""
        assert port not in self._readers, f"port {port:#x} is taken"
        self._readers[port] = reader

    def on_read_constant(self, port: int, value: int) -> None:
        """Offer a 64-bit value that never changes: the low half at ``port``, the high half at ``port + 4``."""
        self.on_read(port, lambda: value & U32)
        self.on_read(port + 4, lambda: value >> 32)

    def on_write(self, port: int, writer: Callable[[int], None]) -> None:
        """Let ``writer`` take what is written to ``port``."""
        assert port not in self._writers, f"port {port:#x} is taken"
        self._writers[port] = writer

    def read(self, port: int, size: int) -> int:
        """The value the guest reads."""
        mask = (1 << 8 * size) - 1
        reader = self._readers.get(port)
        if reader is None:
            self.misuse(f"read of port {port:#x}, where nothing is")
            return mask
        return reader() & mask

    def write(self, port: int, value: int) -> None:
        """Take a value the guest writes."""
        writer = self._writers.get(port)
        if writer is None:
            self.misuse(f"write to port {port:#x}, where nothing is")
        else:
            writer(value & U32)

    def misuse(self, what: str) -> None:
        """Count an access that makes no sense."""
        self.misuses += 1
        if self.misuses == 1:
            _log.warning("the guest misuses a device: %s (further ones are only counted)", what)
