"""The parts of a micro-VM: registers, ports, clock, serial port, network interface, CPU thread."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support import wait_until
from vmferry.errors import ConfigError, DeviceStateError, MachineFailedError
from vmferry.machines.microvm import cpu as cpu_module
from vmferry.machines.microvm.cpu import Cpu
from vmferry.machines.microvm.devices import PORT_SERIAL, PORT_SERIAL_STATUS, Boot, Clock, Power, Serial
from vmferry.machines.microvm.engine import Ending, Engine
from vmferry.machines.microvm.nic import PORT_NIC, Backend, Nic, parse_mac, rarp_announcement
from vmferry.machines.microvm.ports import PortBus
from vmferry.machines.microvm.ram import AddressError, Ram

MIB = 1 << 20
MAC = bytes.fromhex("525400aabbcc")
CODE = 0x10000


@pytest.fixture
def ram(tmp_path: Path) -> Ram:
    """Two MiB of guest memory."""
    path = tmp_path / "ram"
    path.touch()
    os.truncate(path, 2 * MIB)
    return Ram(path, 2 * MIB)


@pytest.fixture
def serial(tmp_path: Path) -> tuple[PortBus, Serial]:
    """A serial port that writes to a file named serial."""
    bus = PortBus()
    return bus, Serial(bus, tmp_path / "serial")


def run_to_end(cpu: Cpu, code: str) -> None:
    """Run code that ends with hlt."""
    cpu.write_memory(CODE, bytes.fromhex(code))
    cpu.uc.emu_start(CODE, (1 << 64) - 1)
    assert cpu.halted()


REGISTERS = st.fixed_dictionaries(
    {
        name: st.integers(0, (1 << 64) - 1)
        for name in (*(f"R{n}" for n in range(8, 16)), "RAX", "RBX", "RSP", "FS_BASE")
    }
    | {f"XMM{n}": st.integers(0, (1 << 128) - 1) for n in range(16)}
    | {f"FP{n}": st.integers(0, (1 << 80) - 1) for n in range(8)}
)


@given(values=REGISTERS)
def test_register_payloads_round_trip(values: dict[str, int]) -> None:
    """Packing and unpacking lose no bit of any register."""
    registers = dict.fromkeys(cpu_module.unpack(bytes(len(cpu_module.pack(ZERO)))), 0) | values
    assert cpu_module.unpack(cpu_module.pack(registers)) == registers


ZERO = dict.fromkeys(
    [
        *("RAX", "RBX", "RCX", "RDX", "RSI", "RDI", "RBP", "RSP", *(f"R{n}" for n in range(8, 16))),
        *("RIP", "RFLAGS", "FS_BASE", "GS_BASE", "MXCSR"),
        *("FPCW", "FPSW", "FPTAG", "FIP", "FCS", "FDP", "FDS", "FOP"),
        *(f"XMM{n}" for n in range(16)),
        *(f"FP{n}" for n in range(8)),
    ],
    0,
)


def test_a_cpu_goes_on_with_all_registers_of_another(ram: Ram) -> None:
    """General, flag, base, vector and floating-point registers set by guest code arrive at a second CPU."""
    first, second = Cpu(ram), Cpu(ram)
    first.uc.reg_write(cpu_module.x86.UC_X86_REG_RSP, 0x9000)
    # fninit; fld1; fldpi; mov rax, imm64; wrfsbase rax; movq xmm3, rax; mov eax, 5; wrgsbase rax; stc; hlt
    run_to_end(
        first,
        "dbe3 d9e8 d9eb 48b88877665544332211 f3480faed0 66480f6ed8 b805000000 f3480faed8 f9 f4",
    )
    second.prepare(first.save())()
    moved = second.registers()
    assert moved == first.registers()
    assert (moved["FS_BASE"], moved["GS_BASE"], moved["XMM3"]) == (0x1122334455667788, 5, 0x1122334455667788)
    assert moved["RFLAGS"] & 1
    # fstp tbyte [0x3000]; fstp tbyte [0x3010]; hlt: pi and one, from the stack that moved
    run_to_end(second, "db3c2500300000 db3c2510300000 f4")
    assert ram.read(0x3000, 10) == bytes.fromhex("35c26821a2da0fc90040")
    assert ram.read(0x3010, 10) == bytes.fromhex("0000000000000080ff3f")


def test_a_cpu_whose_control_registers_were_changed_is_not_saved(ram: Ram) -> None:
    """What would be lost is refused instead."""
    cpu = Cpu(ram)
    run_to_end(cpu, "0f20e0 4883c804 0f22e0 f4")  # mov rax, cr4; or rax, 4; mov cr4, rax; hlt
    with pytest.raises(MachineFailedError, match="control registers"):
        cpu.save()


def test_a_cpu_state_that_cannot_be_is_refused(ram: Ram) -> None:
    """Wrong sizes and a position outside of memory are found before anything is applied."""
    cpu = Cpu(ram)
    with pytest.raises(DeviceStateError):
        cpu.prepare(cpu.save()[:-1])
    with pytest.raises(DeviceStateError, match="outside"):
        cpu.prepare(cpu_module.pack(cpu.registers() | {"RIP": 2 * MIB}))


@pytest.mark.parametrize("size", [2 * MIB - 1, 2 * MIB + 1, 0])
def test_a_ram_file_of_another_size_is_refused(tmp_path: Path, size: int) -> None:
    """Size is part of what a machine is."""
    path = tmp_path / "ram"
    path.touch()
    os.truncate(path, size)
    with pytest.raises(ConfigError, match="exactly"):
        Ram(path, 2 * MIB)


@pytest.mark.parametrize(("address", "length"), [(-1, 1), (2 * MIB, 1), (2 * MIB - 1, 2), (1 << 63, 1 << 63)])
def test_memory_outside_does_not_exist(ram: Ram, address: int, length: int) -> None:
    """No address a guest can name reaches beyond its RAM."""
    with pytest.raises(AddressError):
        ram.read(address, length)


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


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[socket.socket]:
    """The other end of a cable."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as link:
        link.bind(str(tmp_path / "cable"))
        link.settimeout(5)
        yield link


def test_frames_go_out_and_come_in_by_dma(ram: Ram, peer: socket.socket) -> None:
    """What lies in guest memory is sent, and what is received lies in guest memory."""
    bus = PortBus()
    Nic(bus, Cpu(ram), MAC, Backend(f"dgram:unix:{peer.getsockname()}"))
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


def test_dma_that_makes_no_sense_is_ignored(ram: Ram, peer: socket.socket) -> None:
    """No register value of a guest can read or write beyond its memory, or raise."""
    bus = PortBus()
    Nic(bus, Cpu(ram), MAC, Backend(f"dgram:unix:{peer.getsockname()}"))
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
    assert backend.dropped == 1


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


def engine_for(ram: Ram, code: str, ended: threading.Event) -> tuple[Engine, Clock]:
    """A CPU thread that will run ``code``."""
    bus = PortBus()
    clock = Clock(bus)
    cpu = Cpu(ram)
    cpu.write_memory(CODE, bytes.fromhex(code))
    cpu.rip = CODE
    return Engine(cpu, bus, clock, Power(bus, clock, cpu.uc.emu_stop), ended.set), clock


def test_stopped_means_not_one_instruction_more(ram: Ram) -> None:
    """A counter in memory moves between start and stop and at no other time, over many rounds."""
    engine, clock = engine_for(ram, "48ff042500200000 ebf6", threading.Event())  # inc qword [0x2000]; jmp $-8
    seen = ram.read(0x2000, 8)
    for _ in range(50):
        engine.start()
        wait_until(lambda before=seen: ram.read(0x2000, 8) != before, what="progress of the guest")
        engine.stop()
        seen, time_seen = ram.read(0x2000, 8), clock.guest_ns()
        assert (ram.read(0x2000, 8), clock.guest_ns()) == (seen, time_seen)
    assert engine.ended is None
    assert engine.times.last_start_ns < engine.times.last_stop_ns  # type: ignore[operator]


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("f4", Ending.HALTED),
        ("0f0b", Ending.FAULTED),  # ud2
        ("48a1 ffffffffffffff7f", Ending.FAULTED),  # mov rax, [beyond memory]
        ("48b8 00000070 00000000 ffe0", Ending.FAULTED),  # jump beyond memory
        ("31c9 48f7f1", Ending.FAULTED),  # division by zero
    ],
)
def test_a_guest_that_ends_is_told(ram: Ram, code: str, kind: Ending) -> None:
    """Halting and each kind of fault end the run, with a reason."""
    told = threading.Event()
    engine, _ = engine_for(ram, code, told)
    engine.start()
    assert told.wait(5)
    assert engine.ended is not None
    assert engine.ended.kind is kind
    engine.stop()


def test_a_sleeping_guest_stops_at_once(ram: Ram) -> None:
    """A guest that asked for an hour of sleep is stopped without waiting for it."""
    engine, _ = engine_for(ram, "66ba1005 b8ffffffff ef ebfe", threading.Event())  # out 0x510, -1; jmp $
    engine.start()
    started = time.monotonic()
    engine.stop()
    assert time.monotonic() - started < 5
