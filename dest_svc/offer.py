"""What this host offers to machines that would arrive."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vmferry.handoff.ledger import HostLedger
from vmferry.machines import host
from vmferry.machines.directory import MachineDirectory
from vmferry.memory.probe import TrackerFinding
from vmferry.negotiation.report import ENCODINGS, PAGE_SIZE_BYTES, PROTOCOL_VERSIONS
from vmferry.security.identity import Identity
from vmferry.v1 import compatibility_pb2


def make_offer(
    own: Identity,
    ledger: HostLedger,
    directory: MachineDirectory,
    trackers: Sequence[TrackerFinding],
    *,
    qemu_binaries: Sequence[Path],
    available_memory_bytes: int,
    reserved_memory_bytes: int,
    incoming: int,
    max_incoming: int,
) -> compatibility_pb2.HostOffer:
    """The offer as a source gets it."""
    kinds = [
        compatibility_pb2.MachineKindOffer(
            kind=kind.kind,
            version=kind.version,
            oldest_state_version=kind.oldest_state_version,
            newest_state_version=kind.newest_state_version,
            binary=kind.binary,
            machine_types=kind.machine_types,
            accelerators=kind.accelerators,
        )
        for kind in host.kind_offers(qemu_binaries)
    ]
    findings = [
        compatibility_pb2.TrackerFinding(kind=found.kind, usable=found.usable, reason=found.reason)
        for found in trackers
    ]
    return compatibility_pb2.HostOffer(
        host=own.uri,
        software_version=host.software_version(),
        protocol_versions=PROTOCOL_VERSIONS,
        kinds=kinds,
        available_memory_bytes=available_memory_bytes,
        reserved_memory_bytes=reserved_memory_bytes,
        page_size_bytes=PAGE_SIZE_BYTES,
        encodings=ENCODINGS,
        incoming_migrations=incoming,
        max_incoming_migrations=max_incoming,
        kernel=host.kernel_release(),
        machine_names=[
            record.spec.name for record in directory.list() if not ledger.rights(record.spec.uuid).awaits_word
        ],
        held_machine_ids=[machine for machine in ledger.machines() if _held(ledger, machine)],
        trackers=findings,
    )


def _held(ledger: HostLedger, machine: str) -> bool:
    """Whether this host takes the machine from nobody; one that was handed off may come back by a later right."""
    rights = ledger.rights(machine)
    return rights.holds and not rights.awaits_word
