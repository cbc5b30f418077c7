"""What a machine is made of: the typed description both hosts must agree on.

Promise: a :class:`MachineSpec` that exists is valid. Nothing in it is passed through to a hypervisor unread:
every key is known, typed and bounded, an unknown one is refused by name. What every kind of machine has stands here;
the rest is the table of its kind, ``[microvm]`` or ``[qemu]``.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import tomllib
import uuid as uuids
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from vmferry.machines.fields import (
    ADDED_IN_3,
    canonical,
    check_choice,
    check_number,
    check_pattern,
    check_types,
    invalid,
    needed_version,
    read_table,
    write_table,
)
from vmferry.machines.microvm.spec import MicrovmSpec
from vmferry.machines.qemu.spec import QemuSpec
from vmferry.memory.backings import ANONYMOUS, HUGETLBFS, TMPFS
from vmferry.memory.hugepages import HUGE_PAGE_BYTES

NEWEST_VERSION: Final = 4
MAX_MEMORY_MIB: Final = 1_048_576
MICROVM: Final = "microvm"
QEMU: Final = "qemu"
KINDS: Final = (MICROVM, QEMU)
MAX_VCPUS: Final = {MICROVM: 1, QEMU: 255}

_MIB: Final = 1024 * 1024
_NAME = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


@dataclass(frozen=True, kw_only=True)
class MachineSpec:
    """The description of one machine; invalid values raise InvalidArgumentError naming the field."""

    version: int = field(init=False, default=1)
    """The least version of descriptions that can say this; computed, so that older hosts understand what they can."""
    name: str
    """What people call it: a DNS label, unique on a host."""
    uuid: str
    """The machine's identity everywhere, on every host, for its whole life."""
    kind: str = MICROVM
    """What runs it: ``microvm`` or ``qemu``, which is also the name of the table with the rest."""
    memory_mib: int
    vcpus: int = 1
    microvm: MicrovmSpec | None = None
    qemu: QemuSpec | None = None
    guest_name: str = field(default="", metadata=ADDED_IN_3)
    """What its guest is called in Scheduled Events and in the instance document; empty: its name."""
    availability_set: str = field(default="", metadata=ADDED_IN_3)
    """Machines of one availability set see each other's Scheduled Events; empty: it is in none."""

    def __post_init__(self) -> None:
        self.validate()
        object.__setattr__(self, "version", needed_version(self))

    def validate(self) -> None:
        """Check every field.

        Raises:
            InvalidArgumentError: naming the first field at fault and what would be right.
        """
        check_types(self)
        check_pattern("name", self.name, _NAME, "1 to 63 of a-z, 0-9 and '-', beginning with a letter")
        check_pattern("uuid", self.uuid, _UUID, "a UUID in lower-case hexadecimal")
        check_choice("kind", self.kind, KINDS)
        check_number("memory_mib", self.memory_mib, 1, MAX_MEMORY_MIB)
        check_number("vcpus", self.vcpus, 1, MAX_VCPUS[self.kind])
        for key in ("guest_name", "availability_set"):
            if getattr(self, key):
                check_pattern(key, getattr(self, key), _LABEL, "1 to 64 of A-Z, a-z, 0-9, '.', '_' and '-'")
        for kind in KINDS:
            given = getattr(self, kind) is not None
            if given and kind != self.kind:
                raise invalid(kind, f"the machine is of kind {self.kind}", "remove that table")
            if not given and kind == self.kind:
                raise invalid(kind, "missing", f"a machine of kind {kind} needs the table [{kind}]")
        if self.memory_backing == HUGETLBFS and self.memory_mib * _MIB % HUGE_PAGE_BYTES:
            fault = f"{self.memory_mib} MiB are not a whole number of huge pages"
            raise invalid("memory_mib", fault, f"it must be a multiple of {HUGE_PAGE_BYTES // _MIB}")

    def check_said(self, given: int) -> None:
        """Refuse a description that was given out for a version which cannot say what it says."""
        if given < self.version:
            fault = f"version {given} cannot say what this description says"
            raise invalid("version", fault, f"it must be {self.version}, or be left out")

    @property
    def called(self) -> str:
        """What its guest is called in Scheduled Events."""
        return self.guest_name or self.name

    @property
    def macs(self) -> tuple[str, ...]:
        """Addresses of its network interfaces."""
        if self.microvm is not None:
            return (self.microvm.mac,)
        assert self.qemu is not None
        return tuple(nic.mac for nic in self.qemu.nics)

    @property
    def metadata(self) -> bool:
        """Whether its guest reaches the host's metadata service by its own hardware."""
        if self.microvm is not None:
            return self.microvm.metadata
        return self.qemu is not None and any(nic.metadata for nic in self.qemu.nics)

    @property
    def memory_bytes(self) -> int:
        """Guest memory."""
        return self.memory_mib * _MIB

    @property
    def memory_backing(self) -> str:
        """What guest memory is, in the words of ``qemu.memory_backing``."""
        return self.qemu.memory_backing if self.qemu is not None else TMPFS

    @property
    def shared_memory(self) -> bool:
        """Whether guest memory can be read and written from outside of the machine's process."""
        return self.memory_backing != ANONYMOUS

    @property
    def streams_live(self) -> bool:
        """Whether its hypervisor sees every write of the guest while it streams memory.

        QEMU's emulator does not: it takes back the mark of a written page before its cached translations forget that
        the page may be written without another mark (QEMU's commit 03bfc2188f mended the worst case, others are
        known). QEMU 7.2.22 by itself, told to copy on until 1 ms of memory is left, delivered pages that were a
        moment old in 7 of 24 migrations.
        """
        return self.qemu is not None and self.qemu.accelerator == "kvm"

    @property
    def label(self) -> str:
        """What it is, in a few words for people."""
        if self.microvm is not None:
            return f"microvm {self.microvm.program}"
        assert self.qemu is not None
        return f"qemu {self.qemu.machine} {self.qemu.accelerator}"

    @classmethod
    def from_toml(cls, text: str) -> MachineSpec:
        """Read a description.

        Raises:
            InvalidArgumentError: not TOML, or a key is unknown, missing, of the wrong type or out of range.
        """
        try:
            values = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise invalid("spec", f"not valid TOML: {error}", "correct the line it names") from error
        given = check_version(values.pop("version", NEWEST_VERSION))
        spec = read_table(cls, values)
        spec.check_said(given)
        return spec

    @classmethod
    def load(cls, path: Path) -> MachineSpec:
        """Read a description from a file; errors are those of :meth:`from_toml`."""
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise invalid("spec", f"cannot read {path}: {error.strerror}", "name a readable file") from error
        except UnicodeDecodeError as error:
            raise invalid("spec", f"{path} is not UTF-8 text", "save it as UTF-8") from error
        return cls.from_toml(text)

    def to_toml(self) -> str:
        """The description as TOML that :meth:`from_toml` reads back to an equal one."""
        return "\n".join(write_table(self)) + "\n"

    def digest(self) -> bytes:
        """SHA-256 of the canonical form; equal on two hosts exactly if their descriptions are equal."""
        text = json.dumps(canonical(self), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(b"vmferry machine spec\n" + text.encode()).digest()


def check_version(given: object) -> int:
    """The version that a description was given out for; refuses one that this release does not know."""
    if type(given) is not int:
        fault = f"must be of type int, not {type(given).__name__}"
        raise invalid("version", fault, "give a whole number, or leave it out")
    check_number("version", given, 1, NEWEST_VERSION)
    return given


def new_spec(
    name: str, memory_mib: int, program: str, params: Mapping[str, str] | None = None
) -> MachineSpec:
    """Describe a micro-VM that has never been, with a fresh identity and a locally administered MAC."""
    part = MicrovmSpec(program=program, params=params or {}, mac=new_mac())
    return MachineSpec(name=name, uuid=str(uuids.uuid4()), memory_mib=memory_mib, microvm=part)


def new_qemu_spec(name: str, memory_mib: int, vcpus: int, part: QemuSpec) -> MachineSpec:
    """Describe a QEMU machine that has never been, with a fresh identity."""
    return MachineSpec(
        name=name, uuid=str(uuids.uuid4()), kind=QEMU, memory_mib=memory_mib, vcpus=vcpus, qemu=part
    )


def new_mac() -> str:
    """A fresh, locally administered MAC address."""
    return ":".join(f"{byte:02x}" for byte in b"\x52\x54\x00" + secrets.token_bytes(3))
