"""What keeps a machine from being updated in place: every reason there is, from facts that others found out.

Promise: pure; all reasons are told, not just the first; a name never gets another meaning. An update may change
nothing that a guest can see: two descriptions are compared field by field, and what is allowed to differ is listed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

MAY_DIFFER: Final = frozenset({"version", "qemu.binary", "microvm.self_track"})
"""What no guest can see: how its description is numbered, which program runs it, and who notes its writes."""
ROOM_BYTES: Final = 192 << 20
"""What a second process needs for itself, beside the guest's memory that it shares."""

OBSTACLES: Final = (
    "update.accelerator",
    "update.changes-guest",
    "update.cpu",
    "update.device-not-saved",
    "update.hypervisor-not-allowed",
    "update.hypervisor-unusable",
    "update.machine-busy",
    "update.machine-not-owned",
    "update.machine-not-running",
    "update.machine-type",
    "update.memory-not-shared",
    "update.nic-not-shareable",
    "update.no-memory",
    "update.no-place",
)
"""Every name there is; docs/update.md has a row for each."""


@dataclass(frozen=True)
class Obstacle:
    """One reason why not."""

    id: str
    message: str
    object: str = ""
    remedy: str = ""


@dataclass(frozen=True)
class UpdateFacts:
    """What is known of a machine, its host, and what is to run it."""

    owned: bool = True
    busy: str = ""
    """What else is going on with it."""
    running: bool = True
    shared_memory: bool = True
    changes: Sequence[str] = ()
    """Fields in which the two descriptions differ."""
    binary: str = ""
    binary_allowed: bool = True
    binary_problem: str = ""
    """Why the new binary cannot be asked."""
    machine_type: str = ""
    machine_types: frozenset[str] | None = None
    """Those that the new binary has; None if there is no binary, or it was not asked."""
    accelerator_problem: str = ""
    blockers: Sequence[str] = ()
    """Why the hypervisor would not give out its guest's state."""
    foreign_backends: Sequence[str] = ()
    """Devices whose state is partly in other processes."""
    taps: Sequence[str] = ()
    """Network interfaces of the host that one process alone can hold."""
    available_bytes: int = ROOM_BYTES
    no_place: str = ""
    """Why the files of a second process, or its records, have no room."""


def obstacles(facts: UpdateFacts) -> list[Obstacle]:
    """Everything that is in the way."""
    return [*_about_machine(facts), *_about_target(facts), *_about_devices(facts), *_about_host(facts)]


def differing(old: Mapping[str, object], new: Mapping[str, object], prefix: str = "") -> list[str]:
    """The fields in which two descriptions differ, but for those that may."""
    found = []
    for name in sorted({*old, *new}):
        full, before, after = prefix + name, old.get(name), new.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found += differing(before, after, full + ".")
        elif before != after and full not in MAY_DIFFER:
            found.append(full)
    return found


def different_cpu(
    old: Mapping[tuple[int, int, str], int] | None, new: Mapping[tuple[int, int, str], int] | None
) -> list[Obstacle]:
    """What the guest has seen of its processor in the old process, and would miss in the new one.

    More than it has seen does no harm, as in a migration: a guest asks once, when it boots.
    """
    if old is None or new is None:
        return []
    leaves = sorted({key[0] for key, bits in old.items() if bits & ~new.get(key, 0)})
    return [
        Obstacle(
            "update.cpu",
            f"the new process lacks features that its guest has seen, in CPUID leaf {leaf:#x}",
            "qemu.cpu",
            "Migrate the machine after it was shut down, or use a release that has the same model.",
        )
        for leaf in leaves
    ]


def _about_machine(facts: UpdateFacts) -> Iterator[Obstacle]:
    if not facts.owned:
        yield Obstacle("update.machine-not-owned", "this host may not run the machine", "journal")
    if facts.busy:
        yield Obstacle("update.machine-busy", facts.busy, "machine", "Wait until that is over.")
    if not facts.running:
        yield Obstacle(
            "update.machine-not-running",
            "its guest does not run, so there is nothing to keep: start it anew with what it is to be",
            "machine",
            "vmferry machine stop, and run.",
        )
    if not facts.shared_memory:
        yield Obstacle(
            "update.memory-not-shared",
            "its memory is its hypervisor's own, and no second process can have it",
            "qemu.memory_backing",
            "Describe it with tmpfs, hugetlbfs or memfd the next time it is started; until then, migrate it.",
        )


def _about_target(facts: UpdateFacts) -> Iterator[Obstacle]:
    for name in facts.changes:
        yield Obstacle(
            "update.changes-guest",
            f"{name} differs, which the guest could see",
            name,
            "Leave it as it is; it can be changed when the guest is started anew.",
        )
    if not facts.binary_allowed:
        yield Obstacle(
            "update.hypervisor-not-allowed",
            f"{facts.binary} is not among the hypervisors of this host",
            "qemu.binary",
            "Add it to qemu_binaries in the host's configuration, and restart the service.",
        )
    if facts.binary_problem:
        yield Obstacle("update.hypervisor-unusable", facts.binary_problem, "qemu.binary", "Install it.")
    if facts.machine_types is not None and facts.machine_type not in facts.machine_types:
        yield Obstacle(
            "update.machine-type",
            f"{facts.binary} does not know the machine type {facts.machine_type}",
            "qemu.machine",
            "Use a release that still has it.",
        )
    if facts.accelerator_problem:
        yield Obstacle(
            "update.accelerator", facts.accelerator_problem, "qemu.accelerator", "Use another one."
        )


def _about_devices(facts: UpdateFacts) -> Iterator[Obstacle]:
    for reason in facts.blockers:
        yield Obstacle("update.device-not-saved", reason, "device", "Migrate the guest's work elsewhere.")
    for name in facts.foreign_backends:
        yield Obstacle(
            "update.device-not-saved",
            f"part of the state of {name} is in another process",
            name,
            "Remove it.",
        )
    for name in facts.taps:
        yield Obstacle(
            "update.nic-not-shareable",
            f"the interface {name} can be held by one process at a time: a second one would take its packets",
            name,
            "Move the machine to another host and back.",
        )


def _about_host(facts: UpdateFacts) -> Iterator[Obstacle]:
    if facts.available_bytes < ROOM_BYTES:
        yield Obstacle(
            "update.no-memory",
            f"this host has {facts.available_bytes >> 20} MiB to give, and a second process may need "
            f"{ROOM_BYTES >> 20} MiB for itself",
            "memory",
            "Move a machine away first.",
        )
    if facts.no_place:
        yield Obstacle("update.no-place", facts.no_place, "run_dir", "Make room.")
