"""The network interface: frames by DMA, and the announcement."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import wait_until
from vmferry.errors import ConfigError
from vmferry.machines.microvm.cpu import Cpu
from vmferry.machines.microvm.nic import PORT_NIC, Backend, Nic, parse_mac, rarp_announcement
from vmferry.machines.microvm.ports import PortBus
from vmferry.machines.microvm.ram import Ram

MIB = 1 << 20
MAC = bytes.fromhex("525400aabbcc")


@pytest.fixture
def ram(tmp_path: Path) -> Ram:
    """Two MiB of guest memory."""
    path = tmp_path / "ram"
    path.touch()
    os.truncate(path, 2 * MIB)
    return Ram(path, 2 * MIB)


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[socket.socket]:
    """The other end of a cable."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as link:
        link.bind(str(tmp_path / "cable"))
        link.settimeout(5)
        yield link


@pytest.fixture
def backend(peer: socket.socket) -> Iterator[Backend]:
    """This end of the cable."""
    backend = Backend(f"dgram:unix:{peer.getsockname()}")
    yield backend
    backend.close()


def test_frames_go_out_and_come_in_by_dma(ram: Ram, peer: socket.socket, backend: Backend) -> None:
    """What lies in guest memory is sent, and what is received lies in guest memory."""
    bus = PortBus()
    Nic(bus, Cpu(ram), MAC, backend)
    assert (bus.read(PORT_NIC, 4) | bus.read(PORT_NIC + 4, 4) << 32).to_bytes(6, "little") == MAC
    ram.write(0x5000, b"hello")
    for offset, value in ((0x08, 0x5000), (0x0C, 0), (0x10, 5)):
        bus.write(PORT_NIC + offset, value)
    frame, guest = peer.recvfrom(100)
    assert frame == b"hello"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as stranger:
        stranger.sendto(b"stranger", guest)
    peer.sendto(b"answer", guest)
    for offset, value in ((0x18, 0x6000), (0x1C, 0), (0x20, 100)):
        bus.write(PORT_NIC + offset, value)
    assert bus.read(PORT_NIC + 0x24, 4) == 6
    assert bus.read(PORT_NIC + 0x24, 4) == 0
    assert ram.read(0x6000, 7) == b"answer\0"


def test_dma_that_makes_no_sense_is_ignored(ram: Ram, peer: socket.socket, backend: Backend) -> None:
    """No register value of a guest can read or write beyond its memory, or raise."""
    bus = PortBus()
    Nic(bus, Cpu(ram), MAC, backend)
    for high, low, length in ((0, 2 * MIB - 1, 2), (0xFFFFFFFF, 0xFFFFFFFF, 60), (0, 0, 0), (0, 0, 1 << 31)):
        bus.write(PORT_NIC + 0x08, low)
        bus.write(PORT_NIC + 0x0C, high)
        bus.write(PORT_NIC + 0x10, length)
    assert bus.misuses == 4
    bus.write(PORT_NIC + 0x08, 0)
    bus.write(PORT_NIC + 0x0C, 0)
    bus.write(PORT_NIC + 0x10, 1)
    _, guest = peer.recvfrom(100)
    for capacity, address in ((3, 0), (100, 2 * MIB - 1)):
        peer.sendto(b"answer", guest)
        bus.write(PORT_NIC + 0x18, address)
        bus.write(PORT_NIC + 0x20, capacity)
        assert bus.read(PORT_NIC + 0x24, 4) == 0
    assert bus.misuses == 6


def test_frames_without_a_peer_are_dropped(ram: Ram, tmp_path: Path) -> None:
    """A cable that leads nowhere stops nobody."""
    backend = Backend(f"dgram:unix:{tmp_path / 'nobody'}")
    nic = Nic(PortBus(), Cpu(ram), MAC, backend)
    nic.announce()
    backend.close()
    assert backend.dropped == 1


def test_frames_go_over_udp_too() -> None:
    """The other form of the option."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer:
        peer.bind(("127.0.0.1", 0))
        peer.settimeout(5)
        backend = Backend(f"dgram:127.0.0.1:{peer.getsockname()[1]}")
        backend.send(b"frame")
        frame, guest = peer.recvfrom(100)
        peer.sendto(b"answer", guest)
        wait_until(lambda: backend.receive() == b"answer", what="the answer")
        backend.close()
        assert frame == b"frame"


def test_the_announcement_is_a_broadcast_rarp_of_sixty_bytes() -> None:
    """Switches learn from the source address, hosts from the protocol's fields."""
    frame = rarp_announcement(MAC)
    assert len(frame) == 60
    assert frame[:14] == b"\xff" * 6 + MAC + b"\x80\x35"
    assert frame[14:42] == bytes.fromhex("0001 0800 06 04 0003") + MAC + bytes(4) + MAC + bytes(4)


@pytest.mark.parametrize(
    "text", ["", "52:54:00:aa:bb", "52:54:00:aa:bb:cg", "01:00:5e:00:00:01", "525400aabbcc"]
)
def test_an_address_that_is_none_is_refused(text: str) -> None:
    """Multicast addresses and other spellings are the user's mistake."""
    with pytest.raises(ConfigError):
        parse_mac(text)


@pytest.mark.parametrize("option", ["tap:x", "dgram:", "dgram:localhost:port", "dgram:unix"])
def test_a_cable_that_leads_nowhere_by_its_name_is_refused(option: str) -> None:
    """Only the two documented forms exist."""
    with pytest.raises(ConfigError):
        Backend(option)
