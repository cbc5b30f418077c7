"""The virtual CPU: an engine over guest RAM, and every register a guest can see, as bytes.

Promise: :meth:`Cpu.save` holds the general registers, rip, rflags, segment bases, SSE and x87 state; a CPU to which
they were applied goes on exactly where the saved one stopped. Control registers and descriptor tables are fixed on
this machine (64-bit mode, no paging, no interrupts): a guest that changed them cannot be saved, and is told so.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, ClassVar, Final

from unicorn import UC_ARCH_X86, UC_MODE_64, UC_PROT_ALL
from unicorn import x86_const as x86
from unicorn.unicorn import Uc

from vmferry.errors import DeviceStateError, MachineFailedError
from vmferry.machines.microvm.ports import Part
from vmferry.machines.microvm.ram import Ram

_WORDS: Final = (
    *("RAX", "RBX", "RCX", "RDX", "RSI", "RDI", "RBP", "RSP"),
    *(f"R{number}" for number in range(8, 16)),
    *("RIP", "RFLAGS", "FS_BASE", "GS_BASE", "MXCSR"),
    *("FPCW", "FPSW", "FPTAG", "FIP", "FCS", "FDP", "FDS", "FOP"),
)
"""Registers of at most 64 bits, each saved as a u64, in this order."""
_VECTORS: Final = tuple(f"XMM{number}" for number in range(16))
_FLOATS: Final = tuple(f"FP{number}" for number in range(8))
"""The x87 stack by physical register: mantissa u64 and exponent u16."""
_LAYOUT: Final = struct.Struct(f"<{len(_WORDS)}Q{16 * len(_VECTORS)}s" + "QH" * len(_FLOATS))
_FIXED: Final = ("CR0", "CR3", "CR4", "GDTR", "IDTR", "LDTR", "TR", "CS", "DS", "ES", "SS", "FS", "GS")
_MSR_EFER: Final = 0xC0000080
_MSR_KERNEL_GS_BASE: Final = 0xC0000102
_RESET: Final = {"RFLAGS": 0x2, "MXCSR": 0x1F80, "FPCW": 0x37F, "FPTAG": 0xFFFF}

Registers = dict[str, int]
"""Values by register name; FP registers as mantissa + (exponent << 64)."""


def pack(registers: Registers) -> bytes:
    """The payload of the ``cpu`` section."""
    vectors = b"".join(registers[name].to_bytes(16, "little") for name in _VECTORS)
    floats = [part for name in _FLOATS for part in (registers[name] & (1 << 64) - 1, registers[name] >> 64)]
    return _LAYOUT.pack(*(registers[name] for name in _WORDS), vectors, *floats)


def unpack(payload: bytes) -> Registers:
    """The registers in a payload of the ``cpu`` section."""
    if len(payload) != _LAYOUT.size:
        raise DeviceStateError(f"section 'cpu' has {len(payload)} bytes instead of {_LAYOUT.size}")
    values = _LAYOUT.unpack(payload)
    registers: Registers = dict(zip(_WORDS, values, strict=False))
    vectors, *floats = values[len(_WORDS) :]
    for number, name in enumerate(_VECTORS):
        registers[name] = int.from_bytes(vectors[16 * number : 16 * number + 16], "little")
    for number, name in enumerate(_FLOATS):
        registers[name] = floats[2 * number] | floats[2 * number + 1] << 64
    return registers


def _constant(name: str) -> int:
    # Unicorn names the 64-bit flags register by its 32-bit name.
    return int(getattr(x86, f"UC_X86_REG_{'EFLAGS' if name == 'RFLAGS' else name}"))


class Cpu(Part):
    """One x86-64 CPU in 64-bit mode over a machine's RAM."""

    name: ClassVar[str] = "cpu"
    version: ClassVar[int] = 1

    def __init__(self, ram: Ram) -> None:
        engine: type[Any] = Uc  # the library's annotations stop here
        self.uc: Any = engine(UC_ARCH_X86, UC_MODE_64)
        self._ram = ram
        # JUSTIFICATION: the guest must write into the shared file itself, not into a copy of the engine's.
        # SAFETY: ``ram`` outlives the engine (both live until the process ends) and never moves its mapping.
        self.uc.mem_map_ptr(0, ram.size, UC_PROT_ALL, ram.address)
        for name, value in _RESET.items():
            self.uc.reg_write(_constant(name), value)
        self._fixed_at_reset = self._fixed_state()

    @property
    def rip(self) -> int:
        """Address of the next instruction."""
        return int(self.uc.reg_read(x86.UC_X86_REG_RIP))

    @rip.setter
    def rip(self, address: int) -> None:
        self.uc.reg_write(x86.UC_X86_REG_RIP, address)

    def halted(self) -> bool:
        """Whether the last instruction executed was ``hlt``."""
        return 0 < self.rip <= self._ram.size and self._ram.read(self.rip - 1, 1) == b"\xf4"

    def read_memory(self, address: int, length: int) -> bytes:
        """Read as a device does."""
        return self._ram.read(address, length)

    def write_memory(self, address: int, data: bytes) -> None:
        """Write as a device does: code already translated from there is forgotten."""
        self._ram.check(address, len(data))
        self.uc.mem_write(address, data)

    def registers(self) -> Registers:
        """All saved registers; only while the CPU stands still."""
        found: Registers = {name: self.uc.reg_read(_constant(name)) for name in (*_WORDS, *_VECTORS)}
        for name in _FLOATS:
            mantissa, exponent = self.uc.reg_read(_constant(name))
            found[name] = mantissa | exponent << 64
        return found

    def save(self) -> bytes:
        """The registers as the payload of a section."""
        if self._fixed_state() != self._fixed_at_reset:
            raise MachineFailedError(
                "the guest changed control registers or descriptor tables, which are not saved"
            )
        return pack(self.registers())

    def prepare(self, payload: bytes) -> Callable[[], None]:
        """Check saved registers; the result applies them."""
        registers = unpack(payload)
        if registers["RIP"] >= self._ram.size:
            raise DeviceStateError(
                "the saved CPU stands outside the memory of this machine", rip=registers["RIP"]
            )

        def apply() -> None:
            for name in (*_WORDS, *_VECTORS):
                self.uc.reg_write(_constant(name), registers[name])
            for name in _FLOATS:
                self.uc.reg_write(_constant(name), (registers[name] & (1 << 64) - 1, registers[name] >> 64))

        return apply

    def _fixed_state(self) -> list[Any]:
        msrs = [self.uc.msr_read(msr) for msr in (_MSR_EFER, _MSR_KERNEL_GS_BASE)]
        return [*(self.uc.reg_read(_constant(name)) for name in _FIXED), *msrs]
