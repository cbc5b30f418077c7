"""The CPU thread: exact starts and stops, and what a guest does to itself."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.support import wait_until
from vmferry.machines.microvm.activity import Activity
from vmferry.machines.microvm.cpu import Cpu
from vmferry.machines.microvm.devices import Clock, Power
from vmferry.machines.microvm.engine import Ending, Engine
from vmferry.machines.microvm.ports import PortBus
from vmferry.machines.microvm.ram import Ram

MIB = 1 << 20
CODE = 0x10000
MakeVcpu = Callable[[str], tuple[Engine, Clock]]


@pytest.fixture
def ram(tmp_path: Path) -> Ram:
    """Two MiB of guest memory."""
    path = tmp_path / "ram"
    path.touch()
    os.truncate(path, 2 * MIB)
    return Ram(path, 2 * MIB)


@pytest.fixture
def vcpu(ram: Ram) -> Iterator[MakeVcpu]:
    """Makes a CPU thread that will run the code given in hexadecimal."""
    engines: list[Engine] = []

    def make(code: str) -> tuple[Engine, Clock]:
        bus = PortBus()
        clock = Clock(bus)
        cpu = Cpu(ram)
        cpu.write_memory(CODE, bytes.fromhex(code))
        cpu.rip = CODE
        power = Power(bus, clock, cpu.uc.emu_stop)
        engines.append(Engine(cpu, bus, clock, power, Activity(None), lambda: None))
        return engines[-1], clock

    yield make
    for engine in engines:
        engine.close()


def _moved_on(ram: Ram, before: bytes) -> bool:
    return ram.read(0x2000, 8) != before


def test_stopped_means_not_one_instruction_more(ram: Ram, vcpu: MakeVcpu) -> None:
    """A counter in memory moves between start and stop and at no other time, over many rounds."""
    engine, clock = vcpu("48ff042500200000 ebf6")  # inc qword [0x2000]; jmp $-8
    seen = ram.read(0x2000, 8)
    for _ in range(50):
        engine.start()
        wait_until(partial(_moved_on, ram, seen), what="progress of the guest")
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
def test_a_guest_that_ends_is_told(vcpu: MakeVcpu, code: str, kind: Ending) -> None:
    """Halting and each kind of fault end the run, with a reason."""
    engine, _ = vcpu(code)
    engine.start()
    wait_until(lambda: engine.ended, what="the end of the guest")
    assert engine.ended is not None
    assert engine.ended.kind is kind
    engine.stop()


def test_a_sleeping_guest_stops_at_once(vcpu: MakeVcpu) -> None:
    """A guest that asked for an hour of sleep is stopped without waiting for it."""
    engine, _ = vcpu("66ba1005 b8ffffffff ef ebfe")  # out 0x510, -1; jmp $
    engine.start()
    started = time.monotonic()
    engine.stop()
    assert time.monotonic() - started < 5
