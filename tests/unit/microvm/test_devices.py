"""Ports, clock, power, serial port and boot parameters."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmferry.errors import DeviceStateError
from vmferry.machines.microvm.devices import PORT_SERIAL, PORT_SERIAL_STATUS, Boot, Clock, Power, Serial
from vmferry.machines.microvm.ports import PortBus

MIB = 1 << 20


@pytest.fixture
def serial(tmp_path: Path) -> Iterator[tuple[PortBus, Serial]]:
    """A serial port that writes to a file named serial."""
    bus = PortBus()
    port = Serial(bus, tmp_path / "serial")
    yield bus, port
    port.close()


def test_ports_where_nothing_is_read_as_ones() -> None:
    """A misuse is counted and harmless."""
    bus = PortBus()
    bus.write(0x77, 1)
    assert [bus.read(0x77, size) for size in (1, 2, 4)] == [0xFF, 0xFFFF, 0xFFFFFFFF]
    assert bus.misuses == 4


def test_guest_time_stands_still_while_paused_and_goes_on_elsewhere() -> None:
    """Only time between start and stop counts, across machines too."""
    first, second = Clock(PortBus()), Clock(PortBus())
    first.start(1_000)
    first.stop(1_700)
    first.start(5_000)
    first.stop(5_300)
    assert first.guest_ns() == 1_000
    second.prepare(first.save())()
    now = time.monotonic_ns()
    second.start(now)
    assert second.guest_ns() >= 1_000
    second.stop(now + 50)
    assert second.guest_ns() == 1_050


def test_a_latched_clock_half_moves_with_the_clock() -> None:
    """A crossing between the two reads of one value does not mix two values."""
    here, there = PortBus(), PortBus()
    first, second = Clock(here), Clock(there)
    before = time.time_ns()
    low = here.read(0x508, 4)
    second.prepare(first.save())()
    assert before <= there.read(0x50C, 4) << 32 | low <= time.time_ns()


def test_sleep_ends_in_guest_time() -> None:
    """A machine that was paused in the middle of a sleep sleeps the rest of it."""
    bus = PortBus()
    clock = Clock(bus)
    asked: list[bool] = []
    power = Power(bus, clock, lambda: asked.append(True))
    bus.write(0x510, 3)
    assert power.asleep_ns() == 3_000
    assert asked == [True]
    clock.start(0)
    clock.stop(2_000)
    assert power.asleep_ns() == 1_000
    moved = Power(PortBus(), clock, lambda: None)
    moved.prepare(power.save())()
    assert moved.asleep_ns() == 1_000


def test_serial_lines_are_written_whole(serial: tuple[PortBus, Serial], tmp_path: Path) -> None:
    """An unfinished line moves with the machine instead of being cut in two."""
    bus, port = serial
    for byte in b"one\ntw":
        bus.write(PORT_SERIAL, byte)
    assert (tmp_path / "serial").read_bytes() == b"one\n"
    there = PortBus()
    moved = Serial(there, tmp_path / "other")
    moved.prepare(port.save())()
    for byte in b"o\n":
        there.write(PORT_SERIAL, byte)
    moved.close()
    assert (tmp_path / "other").read_bytes() == b"two\n"


def test_serial_input_waits_in_a_bounded_ring(serial: tuple[PortBus, Serial]) -> None:
    """Input comes out in order, is refused whole when there is no room, and moves with the machine."""
    bus, port = serial
    assert bus.read(PORT_SERIAL, 1) == 0
    assert port.feed(b"ab")
    assert not port.feed(bytes(4095))
    port.prepare(port.save())()
    assert bus.read(PORT_SERIAL_STATUS, 1) & 1
    assert [bus.read(PORT_SERIAL, 1) for _ in range(3)] == [ord("a"), ord("b"), 0]
    assert not bus.read(PORT_SERIAL_STATUS, 1) & 1


@pytest.mark.parametrize("payload", [b"", b"\1", b"\1\0\0\0", b"\0\0\1\0", b"\xff\xff\0\0" + bytes(0xFFFF)])
def test_serial_state_with_wrong_lengths_is_refused(serial: tuple[PortBus, Serial], payload: bytes) -> None:
    """Lengths are checked against what is there and against the sizes of the buffers."""
    with pytest.raises(DeviceStateError):
        serial[1].prepare(payload)


@pytest.mark.parametrize(("memory", "program"), [(2 * MIB, "writer"), (4 * MIB, "canary")])
def test_the_state_of_a_machine_of_another_shape_is_refused(memory: int, program: str) -> None:
    """Program and memory size must agree."""
    mine = Boot(PortBus(), memory_bytes=2 * MIB, program="canary", parameters=[1])
    other = Boot(PortBus(), memory_bytes=memory, program=program, parameters=[1])
    with pytest.raises(DeviceStateError, match="not of this one"):
        mine.prepare(other.save())


def test_boot_parameters_move() -> None:
    """What the guest reads after a crossing is what it read before."""
    bus = PortBus()
    here = Boot(PortBus(), memory_bytes=2 * MIB, program="canary", parameters=[5 << 32 | 7])
    there = Boot(bus, memory_bytes=2 * MIB, program="canary", parameters=[])
    assert bus.read(0x1010, 4) == bus.read(0x1014, 4) == 0xFFFFFFFF
    here.booted = True
    there.prepare(here.save())()
    assert (bus.read(0x1010, 4), bus.read(0x1014, 4), there.booted) == (7, 5, True)
