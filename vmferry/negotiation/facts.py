"""What is known about a machine, its host and a destination before anything is decided.

Promise: plain values without a default meaning. An empty text, an empty list or 0 is "not known", and of what is not
known nothing is told; only a destination's memory without a list of kinds means tmpfs, as older releases mean it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vmferry.memory.backings import TMPFS
from vmferry.negotiation.findings import Finding

PAGE_SIZE_BYTES = 4096

CpuidKey = tuple[int, int, str]
"""Leaf, sub-leaf and register."""


@dataclass(frozen=True)
class KindOffer:
    """A machine kind a host can run."""

    kind: str
    version: str
    oldest_state_version: int
    newest_state_version: int
    binary: str = ""
    machine_types: Sequence[str] = ()
    accelerators: Sequence[str] = ()


@dataclass(frozen=True)
class BackingOffer:
    """A kind of guest memory that a host can make."""

    name: str
    page_size_bytes: int
    available_bytes: int


@dataclass(frozen=True)
class Device:
    """A device of a running machine that was asked for by name, not a part of its machine type."""

    id: str
    type: str
    """What it is, in the hypervisor's words."""


@dataclass(frozen=True)
class Network:
    """A network interface of a machine as one host sees it."""

    tap: str
    bridge: str
    mtu_bytes: int
    up: bool = True


@dataclass(frozen=True)
class MachineFacts:
    """What the source knows about the machine."""

    name: str
    machine_id: str
    kind: str
    state_version: int
    memory_bytes: int
    vcpus: int
    running: bool
    owned: bool
    migrating: bool
    alive: bool = True
    """Whether its process runs."""
    status: str = ""
    """What it does, in the hypervisor's word."""
    unreachable: str = ""
    """Why it could not be asked, if it could not."""
    binary: str = ""
    """The hypervisor that its description names, if it names one."""
    hypervisor_version: str = ""
    """Of its running process, for kinds whose hosts have different ones."""
    blockers: Sequence[str] = ()
    """Why its hypervisor would not let it go, in its own words."""
    accelerator: str = ""
    memory_backing: str = TMPFS
    memory_page_bytes: int = PAGE_SIZE_BYTES
    """Size of the pages that its memory is made of."""
    described_devices: Sequence[str] = ()
    """The devices that its description asks for."""
    found_devices: Sequence[Device] | None = None
    """Those it has; ``None`` if that is not known."""
    foreign_backends: Sequence[Device] = ()
    """Network back ends of it that lie in other processes."""
    found_vcpus: int = 0
    found_memory_bytes: int = 0
    cpuid: Mapping[CpuidKey, int] | None = None
    """What its guest sees of its processor; ``None`` if that is not known."""
    predicted_total_s: float = 0.0
    """How long the migration would take; 0 is unknown."""
    shared_memory: bool = True
    """Whether its memory is a shared mapping that can be read from outside of its hypervisor."""
    streams_live: bool = True
    """Whether its hypervisor sees every write of the guest while it streams memory."""


@dataclass(frozen=True)
class TrackerFact:
    """What a probe found about one write tracker."""

    kind: str
    usable: bool
    reason: str


@dataclass(frozen=True)
class HostFacts:
    """What the source knows about itself, and when it asked the destination."""

    host: str = ""
    software_version: str = ""
    kernel: str = ""
    clock_source: str = ""
    certificate_expires_at_s: float = 0.0
    asked_at_s: float = 0.0
    """Its wall clock when it asked."""
    answered_at_s: float = 0.0
    """Its wall clock when the answer had come."""


@dataclass(frozen=True)
class Offer:
    """What the destination offers."""

    host: str
    software_version: str
    protocol_versions: Sequence[int]
    kinds: Sequence[KindOffer]
    available_memory_bytes: int
    page_size_bytes: int
    encodings: Sequence[str]
    incoming_migrations: int
    max_incoming_migrations: int
    machine_names: Sequence[str]
    held_machine_ids: Sequence[str]
    refusals: Sequence[Finding] = ()
    """What it found wrong with the machine's description."""
    draining: bool = False
    cpus: int = 0
    kernel: str = ""
    clock_source: str = ""
    at_s: float = 0.0
    """Its wall clock when it answered."""
    certificate_expires_at_s: float = 0.0
    trackers: Sequence[TrackerFact] = ()
    memory_backings: Sequence[BackingOffer] = ()
    paths: Sequence[str] = ()
    """Ways for memory to travel that it can receive; empty means the direct one."""
    stream_encodings: Sequence[str] = ()
    """Encodings in which it takes pieces of a hypervisor's stream; empty means none."""
    cpuid: Mapping[CpuidKey, int] | None = None
    """What a guest of this description would see of its processor there; ``None`` if that is not known."""

    @property
    def backings(self) -> Sequence[BackingOffer]:
        """The kinds of memory it can make, also where an older release does not list them."""
        return self.memory_backings or (
            BackingOffer(TMPFS, self.page_size_bytes, self.available_memory_bytes),
        )
