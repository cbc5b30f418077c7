"""The network interface: frames by DMA between guest RAM and a datagram socket, and the announcement of the machine.

Promise: whatever a guest puts into the registers, and whatever arrives on the network, the process goes on; frames
that cannot be moved are dropped and counted. Only frames from the one peer named at start reach the guest.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable
from typing import Any, ClassVar, Final, Protocol

from vmferry.errors import ConfigError, DeviceStateError
from vmferry.machines.microvm.ports import U32, Part, PortBus
from vmferry.machines.microvm.ram import AddressError

PORT_NIC: Final = 0x600
MAX_FRAME_BYTES: Final = 9216
"""Jumbo frames and nothing larger."""
_RARP_FRAME_BYTES: Final = 60
_RARP: Final = struct.Struct(">6s6sHHHBBH6s4s6s4s")


class GuestMemory(Protocol):
    """What DMA needs."""

    def read_memory(self, address: int, length: int) -> bytes:
        """A copy of guest memory; raises AddressError outside of it."""

    def write_memory(self, address: int, data: bytes) -> None:
        """Write guest memory; raises AddressError outside of it."""


class Backend:
    """The datagram socket behind a network interface: every datagram is one Ethernet frame."""

    def __init__(self, option: str) -> None:
        """Open the backend named by ``dgram:unix:PATH`` or ``dgram:HOST:PORT``."""
        kind, _, rest = option.partition(":")
        if kind != "dgram" or not rest:
            raise ConfigError(f"{option!r} is neither dgram:unix:PATH nor dgram:HOST:PORT", field="netdev")
        self._peer: Any  # a socket address of the family chosen below
        if rest.startswith("unix:"):
            self._peer = rest.removeprefix("unix:")
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self._socket.bind("")  # Linux picks an abstract name, so that the peer can answer
        else:
            host, _, port = rest.rpartition(":")
            try:
                family, *_, self._peer = socket.getaddrinfo(
                    host.strip("[]"), port, type=socket.SOCK_DGRAM, flags=socket.AI_NUMERICSERV
                )[0]
            except OSError as error:
                raise ConfigError(f"cannot resolve {option!r}: {error.strerror}", field="netdev") from error
            self._socket = socket.socket(family, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self.dropped = 0

    def close(self) -> None:
        """Unplug."""
        self._socket.close()

    def send(self, frame: bytes) -> None:
        """Send a frame, or drop it: networks may."""
        try:
            self._socket.sendto(frame, self._peer)
        except OSError:
            self.dropped += 1

    def receive(self) -> bytes | None:
        """The next frame of the peer, if one has arrived."""
        while True:
            try:
                frame, sender = self._socket.recvfrom(MAX_FRAME_BYTES + 1)
            except OSError:
                return None
            if sender == self._peer and len(frame) <= MAX_FRAME_BYTES:
                return frame
            self.dropped += 1


class Nic(Part):
    """A network interface without interrupts: the guest kicks what it sends and polls for what it receives."""

    name: ClassVar[str] = "nic"
    version: ClassVar[int] = 1
    _LAYOUT: ClassVar[struct.Struct] = struct.Struct("<6sQQI")

    def __init__(self, bus: PortBus, memory: GuestMemory, mac: bytes, backend: Backend | None) -> None:
        self.mac = mac
        self._bus = bus
        self._memory = memory
        self._backend = backend
        self._tx_address = 0
        self._rx_address = 0
        self._rx_capacity = 0
        bus.on_read_constant(PORT_NIC, int.from_bytes(mac, "little"))
        bus.on_write(PORT_NIC + 0x08, self._set_tx_low)
        bus.on_write(PORT_NIC + 0x0C, self._set_tx_high)
        bus.on_write(PORT_NIC + 0x10, self._transmit)
        bus.on_write(PORT_NIC + 0x18, self._set_rx_low)
        bus.on_write(PORT_NIC + 0x1C, self._set_rx_high)
        bus.on_write(PORT_NIC + 0x20, self._set_rx_capacity)
        bus.on_read(PORT_NIC + 0x24, self._receive)

    def announce(self) -> None:
        """Tell the network where this machine is now: one broadcast RARP frame. May be called on any thread."""
        if self._backend is not None:
            self._backend.send(rarp_announcement(self.mac))

    def save(self) -> bytes:
        """Address and registers."""
        return self._LAYOUT.pack(self.mac, self._tx_address, self._rx_address, self._rx_capacity)

    def prepare(self, payload: bytes) -> Callable[[], None]:
        """Refuse the state of an interface with another address."""
        mac, tx_address, rx_address, rx_capacity = self._unpack(self._LAYOUT, payload)
        if mac != self.mac:
            raise DeviceStateError(
                f"the device state has MAC {mac.hex(':')}, this machine {self.mac.hex(':')}"
            )

        def apply() -> None:
            self._tx_address = tx_address
            self._rx_address = rx_address
            self._rx_capacity = rx_capacity

        return apply

    def _set_tx_low(self, value: int) -> None:
        self._tx_address = self._tx_address & ~U32 | value

    def _set_tx_high(self, value: int) -> None:
        self._tx_address = self._tx_address & U32 | value << 32

    def _set_rx_low(self, value: int) -> None:
        self._rx_address = self._rx_address & ~U32 | value

    def _set_rx_high(self, value: int) -> None:
        self._rx_address = self._rx_address & U32 | value << 32

    def _set_rx_capacity(self, value: int) -> None:
        self._rx_capacity = value

    def _transmit(self, length: int) -> None:
        if not 0 < length <= MAX_FRAME_BYTES:
            self._bus.misuse(f"transmission of {length} bytes")
            return
        try:
            frame = self._memory.read_memory(self._tx_address, length)
        except AddressError as error:
            self._bus.misuse(f"transmission: {error}")
            return
        if self._backend is not None:
            self._backend.send(frame)

    def _receive(self) -> int:
        frame = self._backend.receive() if self._backend is not None else None
        if frame is None:
            return 0
        if len(frame) > self._rx_capacity:
            self._bus.misuse(f"a receive buffer of {self._rx_capacity} bytes for a frame of {len(frame)}")
            return 0
        try:
            self._memory.write_memory(self._rx_address, frame)
        except AddressError as error:
            self._bus.misuse(f"reception: {error}")
            return 0
        return len(frame)


def rarp_announcement(mac: bytes) -> bytes:
    """A broadcast RARP request for one's own address, 60 bytes: switches learn the machine's port from it."""
    nobody = bytes(4)
    broadcast = b"\xff" * 6
    frame = _RARP.pack(broadcast, mac, 0x8035, 1, 0x0800, 6, 4, 3, mac, nobody, mac, nobody)
    return frame.ljust(_RARP_FRAME_BYTES, b"\0")


def parse_mac(text: str) -> bytes:
    """The six bytes of ``52:54:00:aa:bb:cc``; unicast only."""
    try:
        mac = bytes.fromhex(text.replace(":", ""))
    except ValueError:
        mac = b""
    if mac.hex(":") != text.lower() or len(mac) != 6 or mac[0] & 1:  # noqa: PLR2004 - an address has six bytes
        raise ConfigError(f"{text!r} is not a unicast MAC address like 52:54:00:aa:bb:cc", field="mac")
    return mac
