"""Facts about this host that decide what it can take in."""

from __future__ import annotations

import contextlib
import os
import platform
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from vmferry.errors import ConfigError, MachineFailedError
from vmferry.machines.microvm import devicestate
from vmferry.machines.qemu import devicestate as qemu_state
from vmferry.machines.qemu import probe
from vmferry.machines.qemu.spec import ACCELERATORS, QemuSpec
from vmferry.machines.spec import MICROVM, QEMU
from vmferry.memory import hugepages
from vmferry.memory.backings import ANONYMOUS, HUGETLBFS, MEMFD, TMPFS
from vmferry.memory.runs import PAGE_SIZE
from vmferry.negotiation.facts import KindOffer

_CGROUP = Path("/sys/fs/cgroup")
_CLOCK_SOURCE = Path("/sys/devices/system/clocksource/clocksource0/current_clocksource")


@dataclass(frozen=True)
class MemoryBacking:
    """A kind of guest memory that this host can make."""

    name: str
    page_bytes: int
    available_bytes: int
    """How much of it new guests could take now."""


def memory_backings(ram_root: Path, huge_root: Path | None) -> list[MemoryBacking]:
    """What guest memory can be here, and how much of each kind is left."""
    free = available_memory_bytes()
    room = _file_system_room(ram_root)
    found = [
        MemoryBacking(TMPFS, PAGE_SIZE, min(free, room)),
        MemoryBacking(MEMFD, PAGE_SIZE, free),
        MemoryBacking(ANONYMOUS, PAGE_SIZE, free),
    ]
    if huge_root is not None:
        with contextlib.suppress(ConfigError, OSError):
            hugepages.check_folder(huge_root)
            found.append(
                MemoryBacking(HUGETLBFS, hugepages.HUGE_PAGE_BYTES, hugepages.available_bytes(huge_root))
            )
    return found


def available_memory_bytes() -> int:
    """Memory that new guests could take now: bounded by the host and by its control group."""
    values = dict(
        line.split(":", 1)
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        if ":" in line
    )
    available = int(values["MemAvailable"].split()[0]) * 1024
    return max(0, min(available, _control_group_room()))


def _file_system_room(ram_root: Path) -> int:
    file_system = os.statvfs(ram_root if ram_root.exists() else _existing_parent(ram_root))
    return file_system.f_bavail * file_system.f_frsize


def _existing_parent(path: Path) -> Path:
    return next(parent for parent in path.absolute().parents if parent.exists())


def _control_group_room() -> int:
    """What a memory limit on this container or unit leaves; unlimited counts as very much."""
    unlimited = 1 << 62
    try:
        limit = (_CGROUP / "memory.max").read_text(encoding="ascii").strip()
        used = int((_CGROUP / "memory.current").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return unlimited
    return unlimited if limit == "max" else int(limit) - used


def kernel_release() -> str:
    """Release of the running kernel."""
    return platform.release()


def clock_source() -> str:
    """What the kernel counts time by; empty if it does not say."""
    try:
        return _CLOCK_SOURCE.read_text(encoding="ascii").strip()
    except OSError:
        return ""


def usable_cpus() -> int:
    """Processors that this process, and the machines it starts, may use."""
    return len(os.sched_getaffinity(0))


def software_version() -> str:
    """Version of the installed vmferry."""
    return metadata.version("vmferry")


def kind_offers(qemu_binaries: Sequence[Path]) -> list[KindOffer]:
    """The machine kinds this host can run; the first time, the binaries of QEMU are asked and tried."""
    version = f"unicorn {metadata.version('unicorn')}"
    offers = [KindOffer(MICROVM, version, devicestate.FORMAT, devicestate.FORMAT)]
    for path in qemu_binaries:
        with contextlib.suppress(MachineFailedError):
            offers.append(_qemu_offer(probe.probe_binary(str(path))))
    return offers


def _qemu_offer(binary: probe.Binary) -> KindOffer:
    return KindOffer(
        QEMU,
        binary.version_text,
        qemu_state.STREAM_VERSION,
        qemu_state.STREAM_VERSION,
        binary=binary.path,
        machine_types=tuple(sorted(binary.machine_types)),
        accelerators=tuple(
            name for name in ACCELERATORS if not probe.accelerator_problem(binary.path, name, QemuSpec.cpu)
        ),
    )


def state_version(kind: str) -> int:
    """Version of the device state that machines of ``kind`` save on this host."""
    return {MICROVM: devicestate.FORMAT, QEMU: qemu_state.STREAM_VERSION}[kind]


def is_machine_id(text: str) -> bool:
    """Whether ``text`` is a machine's identity: a lower-case UUID."""
    try:
        return str(uuid.UUID(text)) == text
    except ValueError:
        return False
