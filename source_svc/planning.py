"""Gathering the facts for a compatibility report, and what follows from it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from source_svc.peer import Destination
from vmferry.errors import IncompatibleError, MachineNotOwnedError, VmferryError
from vmferry.handoff import source
from vmferry.handoff.ledger import HostLedger
from vmferry.handoff.states import Attempt
from vmferry.machines import host
from vmferry.machines.port import RunState
from vmferry.machines.qmp import HypervisorFacts, QmpMachine
from vmferry.machines.spec import QEMU, MachineSpec
from vmferry.memory.probe import TrackerFinding
from vmferry.negotiation.report import (
    Finding,
    KindOffer,
    MachineFacts,
    Offer,
    Report,
    Severity,
    TrackerFact,
    compare,
)
from vmferry.v1 import compatibility_pb2, handoff_pb2


@dataclass
class Plan:
    """What is needed to judge and to begin one machine's migration to one destination."""

    spec: MachineSpec
    ledger: HostLedger
    trackers: Sequence[TrackerFinding]
    own: str
    destination: str
    migrating: bool = False
    destination_incarnation: str = ""

    async def report(
        self,
        machine: QmpMachine | None,
        destination: Destination,
        tracker: str,
        *,
        path: str = "",
        compare_bytes: bool = False,
    ) -> Report:
        """Ask both hosts; the destination must answer."""
        answer = await destination.negotiate(self.spec)
        self.destination_incarnation = answer.destination_incarnation
        facts = await self._facts(machine)
        trackers = [TrackerFact(found.kind, found.usable, found.reason) for found in self.trackers]
        return compare(
            facts,
            _offer(answer),
            trackers,
            insist_on_tracker=tracker,
            insist_on_path=path,
            compare_bytes=compare_bytes,
        )

    async def _facts(self, machine: QmpMachine | None) -> MachineFacts:
        rights = await asyncio.to_thread(self.ledger.rights, self.spec.uuid)
        running, hypervisor = False, HypervisorFacts("", ())
        if machine is not None:
            try:
                running = await machine.run_state() is RunState.RUNNING
                if self.spec.kind == QEMU:
                    hypervisor = await machine.hypervisor()
            except VmferryError:
                running = False
        return MachineFacts(
            name=self.spec.name,
            machine_id=self.spec.uuid,
            kind=self.spec.kind,
            state_version=host.state_version(self.spec.kind),
            memory_bytes=self.spec.memory_mib * 1024 * 1024,
            vcpus=self.spec.vcpus,
            running=running,
            owned=rights.owner and not rights.damaged,
            migrating=self.migrating or not isinstance(rights.outgoing, source.Quiet),
            binary=self.spec.qemu.binary if self.spec.qemu is not None else "",
            hypervisor_version=hypervisor.version,
            blockers=hypervisor.blockers,
            shared_memory=self.spec.shared_memory,
            streams_live=self.spec.streams_live,
        )

    def attempt(self, migration_id: bytes, number: int, address: str) -> Attempt:
        """The attempt to open, by what the journals say now."""
        rights = self.ledger.rights(self.spec.uuid)
        if not rights.permitted:
            raise MachineNotOwnedError(
                f"this host may not send {self.spec.name} away: {rights.standing.name}"
            )
        return Attempt(
            machine_id=self.spec.uuid,
            migration_id=migration_id,
            number=number,
            epoch_from=rights.epochs.granted,
            source=self.own,
            destination=self.destination,
            source_incarnation=self.ledger.incarnation,
            destination_incarnation=self.destination_incarnation,
            destination_address=address,
        )


def incompatible(report: Report) -> IncompatibleError:
    """The error that names everything that blocks."""
    blocking = report.blocking
    return IncompatibleError(
        "; ".join(f"{finding.id}: {finding.message}" for finding in blocking),
        remedy=" ".join(finding.remedy for finding in blocking),
        findings=",".join(finding.id for finding in blocking),
    )


def report_to_message(report: Report) -> compatibility_pb2.CompatibilityReport:
    """The report as callers get it."""
    items = [
        compatibility_pb2.CompatibilityItem(
            severity=compatibility_pb2.Severity.ValueType(finding.severity.value),
            id=finding.id,
            message=finding.message,
            object=finding.object,
            remedy=finding.remedy,
        )
        for finding in report.findings
    ]
    return compatibility_pb2.CompatibilityReport(
        compatible=not report.blocking,
        items=items,
        protocol_version=report.protocol_version,
        tracker=report.tracker,
        path=report.path,
        path_reason=report.path_reason,
    )


def _offer(answer: handoff_pb2.NegotiateResponse) -> Offer:
    offer = answer.offer
    kinds = [
        KindOffer(
            kind.kind,
            kind.version,
            kind.oldest_state_version,
            kind.newest_state_version,
            binary=kind.binary,
            machine_types=tuple(kind.machine_types),
            accelerators=tuple(kind.accelerators),
        )
        for kind in offer.kinds
    ]
    refusals = [
        Finding(Severity.BLOCKS, item.id, item.message, item.object, item.remedy) for item in answer.items
    ]
    return Offer(
        host=offer.host,
        software_version=offer.software_version,
        protocol_versions=list(offer.protocol_versions),
        kinds=kinds,
        available_memory_bytes=offer.available_memory_bytes,
        page_size_bytes=offer.page_size_bytes,
        encodings=list(offer.encodings),
        incoming_migrations=offer.incoming_migrations,
        max_incoming_migrations=offer.max_incoming_migrations,
        machine_names=list(offer.machine_names),
        held_machine_ids=list(offer.held_machine_ids),
        refusals=refusals,
        paths=list(offer.paths),
    )
