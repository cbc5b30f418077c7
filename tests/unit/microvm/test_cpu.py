"""Registers and memory of the virtual CPU: nothing a guest can see gets lost."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from unicorn import x86_const

from vmferry.errors import ConfigError, DeviceStateError, MachineFailedError
from vmferry.machines.microvm import cpu as cpu_module
from vmferry.machines.microvm.cpu import Cpu
from vmferry.machines.microvm.ram import AddressError, Ram

MIB = 1 << 20
CODE = 0x10000


@pytest.fixture
def ram(tmp_path: Path) -> Ram:
    """Two MiB of guest memory."""
    path = tmp_path / "ram"
    path.touch()
    os.truncate(path, 2 * MIB)
    return Ram(path, 2 * MIB)


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
    registers = ZERO | values
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
    first.uc.reg_write(x86_const.UC_X86_REG_RSP, 0x9000)
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
