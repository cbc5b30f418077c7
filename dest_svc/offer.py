"""What this host offers to machines that would arrive."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Final

from dest_svc.receiver import Receiver
from vmferry.config import HostConfig
from vmferry.errors import MachineFailedError
from vmferry.handoff.ledger import HostLedger
from vmferry.machines import host
from vmferry.machines.directory import MachineDirectory
from vmferry.machines.qemu import probe
from vmferry.machines.spec import MachineSpec
from vmferry.memory.backings import HUGETLBFS, TMPFS
from vmferry.memory.probe import TrackerFinding
from vmferry.negotiation.encodings import ENCODINGS
from vmferry.negotiation.facts import KindOffer
from vmferry.negotiation.path import PATHS
from vmferry.negotiation.report import PAGE_SIZE_BYTES, PROTOCOL_VERSIONS
from vmferry.security.identity import Identity
from vmferry.v1 import compatibility_pb2

_MIB: Final = 1024 * 1024


def left_for_newcomers(
    config: HostConfig, receivers: Iterable[Receiver], ready_bytes: int = 0
) -> list[host.MemoryBacking]:
    """What guest memory can be here, and how much of each kind is left after what is promised to ``receivers``.

    Memory that is kept ready, ``ready_bytes``, is for newcomers, or given up for them.
    """
    promised = sum(
        receiver.outstanding_bytes for receiver in receivers if receiver.spec.memory_backing != HUGETLBFS
    )
    spoken_for = promised + config.memory_headroom_mib * _MIB - ready_bytes
    return [
        backing  # the kernel itself keeps account of the huge pages that it promised
        if backing.name == HUGETLBFS
        else replace(backing, available_bytes=max(0, backing.available_bytes - spoken_for))
        for backing in host.memory_backings(config.ram_dir, config.huge_root)
    ]


def make_offer(
    own: Identity,
    ledger: HostLedger,
    directory: MachineDirectory,
    trackers: Sequence[TrackerFinding],
    *,
    qemu_binaries: Sequence[Path],
    backings: Sequence[host.MemoryBacking],
    reserved_memory_bytes: int,
    ready_memory_bytes: int,
    incoming: int,
    max_incoming: int,
    draining: bool,
    certificate_not_after: datetime,
    newcomer: str,
) -> compatibility_pb2.HostOffer:
    """The offer as a source gets it for the machine ``newcomer``; empty if it asks for none.

    What an earlier attempt left of that very machine is not in its way: beginning a newer one closes it.
    """
    findings = [
        compatibility_pb2.TrackerFinding(kind=found.kind, usable=found.usable, reason=found.reason)
        for found in trackers
    ]
    offer = compatibility_pb2.HostOffer(
        host=own.uri,
        software_version=host.software_version(),
        protocol_versions=PROTOCOL_VERSIONS,
        kinds=map(_kind, host.kind_offers(qemu_binaries)),
        available_memory_bytes=next(found.available_bytes for found in backings if found.name == TMPFS),
        reserved_memory_bytes=reserved_memory_bytes,
        ready_memory_bytes=ready_memory_bytes,
        page_size_bytes=PAGE_SIZE_BYTES,
        encodings=ENCODINGS,
        stream_encodings=ENCODINGS,
        incoming_migrations=incoming,
        max_incoming_migrations=max_incoming,
        kernel=host.kernel_release(),
        machine_names=[
            record.spec.name
            for record in directory.list()
            if record.spec.uuid != newcomer and not ledger.rights(record.spec.uuid).awaits_word
        ],
        held_machine_ids=[machine for machine in ledger.machines() if _held(ledger, machine)],
        trackers=findings,
        draining=draining,
        cpus=host.usable_cpus(),
        clock_source=host.clock_source(),
        memory_backings=[
            compatibility_pb2.MemoryBackingOffer(
                name=found.name, page_size_bytes=found.page_bytes, available_bytes=found.available_bytes
            )
            for found in backings
        ],
        paths=PATHS,
    )
    offer.certificate_expire_time.FromDatetime(certificate_not_after)
    return offer


def _kind(kind: KindOffer) -> compatibility_pb2.MachineKindOffer:
    return compatibility_pb2.MachineKindOffer(
        kind=kind.kind,
        version=kind.version,
        oldest_state_version=kind.oldest_state_version,
        newest_state_version=kind.newest_state_version,
        binary=kind.binary,
        machine_types=kind.machine_types,
        accelerators=kind.accelerators,
    )


def guest_cpuid(spec: MachineSpec, config: HostConfig) -> list[compatibility_pb2.CpuidWord]:
    """What a guest of this description would see of its processor here; empty if that is not known."""
    part = spec.qemu
    # Nothing is started that the configuration does not allow.
    if part is None or Path(part.binary) not in config.qemu_binaries or not part.resolved:
        return []
    try:
        words = probe.guest_cpuid(part, spec.vcpus) or {}
    except MachineFailedError:
        return []
    return [
        compatibility_pb2.CpuidWord(leaf=leaf, subleaf=subleaf, register=register, bits=bits)
        for (leaf, subleaf, register), bits in words.items()
    ]


def _held(ledger: HostLedger, machine: str) -> bool:
    """Whether this host takes the machine from nobody; one that was handed off may come back by a later right."""
    rights = ledger.rights(machine)
    return rights.holds and not rights.awaits_word
