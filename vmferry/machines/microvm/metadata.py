"""The device that leads to the host's metadata service: bytes to and from a unix socket, as through a serial port.

Promise: what the guest can see of it, and what it has not delivered, moves with it; whatever comes in, or does not,
the guest goes on. The service connects to the socket whenever it likes, one at a time; the newest counts.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, Final

from vmferry.errors import DeviceStateError
from vmferry.machines.microvm.ports import Part, PortBus

PORT_METADATA: Final = 0x700
PORT_METADATA_STATUS: Final = 0x704
_READ_BYTES: Final = 65536


class Metadata(Part):
    """The device. Ports are used on the CPU thread, the socket in the event loop that it was made in."""

    name: ClassVar[str] = "metadata"
    version: ClassVar[int] = 1
    MOST_BYTES: ClassVar[int] = 65536
    """That wait in either direction; what comes beyond is lost."""
    _LENGTHS: ClassVar[struct.Struct] = struct.Struct("<II")

    def __init__(self, bus: PortBus, path: Path) -> None:
        self._path = path
        self._loop = asyncio.get_running_loop()
        self._input: deque[int] = deque()
        self._output = bytearray()
        self._server: asyncio.Server | None = None
        self._writer: asyncio.StreamWriter | None = None
        bus.on_write(PORT_METADATA, self._send)
        bus.on_write(PORT_METADATA_STATUS, self._deliver)
        bus.on_read(PORT_METADATA, lambda: self._input.popleft() if self._input else 0)
        bus.on_read(PORT_METADATA_STATUS, lambda: int(bool(self._input)))

    async def listen(self) -> None:
        """Let the service connect."""
        self._path.unlink(missing_ok=True)
        self._server = await asyncio.start_unix_server(self._serve, self._path)

    def close(self) -> None:
        """Let nobody connect any more."""
        if self._server is not None:
            self._server.close()
        if self._writer is not None:
            self._writer.close()

    def save(self) -> bytes:
        """Bytes waiting in both directions."""
        lengths = self._LENGTHS.pack(len(self._input), len(self._output))
        return lengths + bytes(self._input) + bytes(self._output)

    def prepare(self, payload: bytes) -> Callable[[], None]:
        """Check the lengths."""
        incoming, outgoing = self._unpack(self._LENGTHS, payload[: self._LENGTHS.size])
        data = payload[self._LENGTHS.size :]
        if len(data) != incoming + outgoing or max(incoming, outgoing) > self.MOST_BYTES:
            raise DeviceStateError("section 'metadata' has lengths that do not fit", section=self.name)

        def apply() -> None:
            self._input = deque(data[:incoming])
            self._output = bytearray(data[incoming:])

        return apply

    def _send(self, value: int) -> None:
        if len(self._output) < self.MOST_BYTES:
            self._output.append(value & 0xFF)

    def _deliver(self, _value: int) -> None:
        data, self._output = bytes(self._output), bytearray()
        self._loop.call_soon_threadsafe(self._write, data)

    def _write(self, data: bytes) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(data)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        before, self._writer = self._writer, writer
        if before is not None:
            before.close()
        with contextlib.suppress(OSError, asyncio.CancelledError):
            while data := await reader.read(_READ_BYTES):
                self._input.extend(data[: self.MOST_BYTES - len(self._input)])
        writer.close()
