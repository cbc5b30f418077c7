"""What this host offers to machines that would arrive, and what it never lets in."""

from __future__ import annotations

import contextlib
import ipaddress
from collections.abc import Sequence
from pathlib import Path

from vmferry.errors import InvalidArgumentError
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
        )
        for kind in host.kind_offers()
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
        machine_names=[record.spec.name for record in directory.list()],
        held_machine_ids=[machine for machine in ledger.machines() if ledger.rights(machine).holds],
        trackers=findings,
    )


def check_netdev(netdev: str, root: Path) -> None:
    """Refuse a network end point that would let a source reach into this host."""
    if not netdev:
        return
    target = netdev.removeprefix("dgram:")
    if target.startswith("unix:"):
        path = Path(target.removeprefix("unix:"))
        if path.resolve().is_relative_to(root.resolve()):
            return
        raise InvalidArgumentError(f"network sockets must lie below {root}", field="spec.microvm.netdev")
    address = target.rpartition(":")[0].strip("[]")
    with contextlib.suppress(ValueError):
        if ipaddress.ip_address(address).is_loopback:
            return
    raise InvalidArgumentError(
        "a network end point must be a loopback address here", field="spec.microvm.netdev"
    )
