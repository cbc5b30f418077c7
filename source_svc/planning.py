"""Gathering the facts for a compatibility report, and what follows from it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from source_svc.files import shown
from source_svc.forecasts import Forecast
from source_svc.offer import offer_from_message
from source_svc.peer import Destination
from vmferry.errors import MachineDeadError, MachineNotOwnedError, VmferryError
from vmferry.handoff import source
from vmferry.handoff.ledger import HostLedger
from vmferry.handoff.states import Attempt
from vmferry.machines import host, network
from vmferry.machines.command import device_ids, render_command
from vmferry.machines.fileidentity import Contents
from vmferry.machines.port import RunState
from vmferry.machines.qmp import QmpMachine
from vmferry.machines.spec import QEMU, MachineSpec
from vmferry.memory.backings import HUGETLBFS, TMPFS
from vmferry.memory.probe import TrackerFinding
from vmferry.negotiation.encodings import AUTO
from vmferry.negotiation.facts import PAGE_SIZE_BYTES, HostFacts, MachineFacts, Network, TrackerFact
from vmferry.negotiation.findings import Finding, finding
from vmferry.negotiation.report import Report, compare
from vmferry.transfer.window import Budget
from vmferry.v1 import compatibility_pb2


@dataclass
class Plan:
    """What is needed to judge and to begin one machine's migration to one destination."""

    spec: MachineSpec
    ledger: HostLedger
    trackers: Sequence[TrackerFinding]
    own: str
    destination: str
    certificate_expires_at_s: float
    switch_timeout_s: float
    negotiate_timeout_s: float
    contents: Contents
    """Hashes of files that are known already."""
    budget: Budget = field(kw_only=True)
    """What all migrations of this host may have in flight."""
    migrating: bool = False
    destination_incarnation: str = ""
    forecast: Forecast = field(default_factory=Forecast)
    """How the migration is expected to go."""

    async def report(
        self,
        machine: QmpMachine | None,
        destination: Destination,
        tracker: str,
        *,
        path: str = "",
        compression: str = AUTO,
        compare_bytes: bool = False,
        predict: Callable[[Report], Awaitable[Forecast]] | None = None,
    ) -> Report:
        """Ask both hosts; the destination must answer.

        Args:
            machine: the running machine, if it runs.
            destination: where it would go.
            tracker: write tracker that is insisted on, or empty.
            path: way of memory that is insisted on, or empty.
            compression: encoding of page contents that is insisted on, or "auto".
            compare_bytes: whether all memory is to be compared byte for byte.
            predict: given what was found, fills in :attr:`forecast`, which is reported on too.
        """
        facts = await self._facts(machine)
        networks = await asyncio.to_thread(self._networks)
        asked_at_s = time.time()
        async with shown(self.spec, self.contents, pid=machine.pid if machine else None) as files:
            answer = await destination.negotiate(
                self.spec, networks, files.identities, timeout_s=self.negotiate_timeout_s
            )
        self.destination_incarnation = answer.destination_incarnation
        judge = partial(
            compare,
            offer=offer_from_message(answer, files.findings),
            trackers=[TrackerFact(found.kind, found.usable, found.reason) for found in self.trackers],
            here=self._here(asked_at_s),
            insist_on_tracker=tracker,
            insist_on_path=path,
            insist_on_encoding=compression,
            compare_bytes=compare_bytes,
            switch_timeout_s=self.switch_timeout_s,
        )
        report = judge(facts)
        if predict is None:
            return report
        self.forecast = await predict(report)
        if self.forecast.message is None:
            return replace(report, findings=[*report.findings, _unpredicted(self.forecast.why_not)])
        return judge(replace(facts, predicted_total_s=self.forecast.total_s))

    def _here(self, asked_at_s: float) -> HostFacts:
        return HostFacts(
            host=self.own,
            software_version=host.software_version(),
            kernel=host.kernel_release(),
            clock_source=host.clock_source(),
            certificate_expires_at_s=self.certificate_expires_at_s,
            asked_at_s=asked_at_s,
            answered_at_s=time.time(),
        )

    async def _facts(self, machine: QmpMachine | None) -> MachineFacts:
        rights = await asyncio.to_thread(self.ledger.rights, self.spec.uuid)
        part = self.spec.qemu
        facts = MachineFacts(
            name=self.spec.name,
            machine_id=self.spec.uuid,
            kind=self.spec.kind,
            state_version=host.state_version(self.spec.kind),
            memory_bytes=self.spec.memory_bytes,
            vcpus=self.spec.vcpus,
            running=False,
            owned=rights.owner and not rights.damaged,
            migrating=self.migrating or not isinstance(rights.outgoing, source.Quiet),
            alive=machine is not None,
            binary=part.binary if part is not None else "",
            accelerator=part.accelerator if part is not None else "",
            memory_backing=part.memory_backing if part is not None else TMPFS,
            predicted_total_s=self.forecast.total_s,
            shared_memory=self.spec.shared_memory,
            streams_live=self.spec.streams_live,
        )
        if machine is None:
            return facts
        try:
            return await self._of_running(machine, facts)
        except MachineDeadError:
            return replace(facts, alive=False)
        except VmferryError as error:
            return replace(facts, unreachable=error.message)

    async def _of_running(self, machine: QmpMachine, facts: MachineFacts) -> MachineFacts:
        state, word = await machine.status()
        facts = replace(
            facts,
            running=state is RunState.RUNNING,
            status=word,
            memory_page_bytes=await asyncio.to_thread(_page_bytes, machine, facts.memory_backing),
        )
        if self.spec.kind != QEMU:
            return facts
        found = await machine.inspect()
        return replace(
            facts,
            hypervisor_version=found.version,
            blockers=found.blockers,
            described_devices=device_ids(render_command(self.spec, machine.paths, incoming=False)),
            found_devices=found.devices,
            foreign_backends=found.foreign_backends,
            found_vcpus=found.vcpus,
            found_memory_bytes=found.memory_bytes,
            cpuid=found.cpuid,
        )

    def _networks(self) -> list[Network]:
        """The machine's interfaces as this host has them; those that cannot be seen are left out."""
        nics = self.spec.qemu.nics if self.spec.qemu is not None else ()
        found = [network.tap(nic.tap) for nic in nics if nic.backend == "tap"]
        return [one for one in found if one is not None]

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


def _page_bytes(machine: QmpMachine, backing: str) -> int:
    """The size of the pages that guest memory is made of; 0 if it is not known."""
    if backing != HUGETLBFS:
        return PAGE_SIZE_BYTES
    try:
        # A file of huge pages is read and written in whole ones, and says so.
        return machine.ram.path.stat().st_blksize
    except OSError:
        return 0


def _unpredicted(why: str) -> Finding:
    return finding(
        "prediction.unavailable",
        f"how long it would take is not known: {why}",
        "source host",
        "Nothing needs to be done: the migration measures by itself while it runs.",
    )


def report_to_message(
    report: Report, prediction: compatibility_pb2.Prediction | None = None
) -> compatibility_pb2.CompatibilityReport:
    """The report as callers get it."""
    items = [
        compatibility_pb2.CompatibilityItem(
            severity=compatibility_pb2.Severity.ValueType(found.severity.value),
            id=found.id,
            message=found.message,
            object=found.object,
            remedy=found.remedy,
        )
        for found in report.findings
    ]
    return compatibility_pb2.CompatibilityReport(
        compatible=not report.blocking,
        items=items,
        protocol_version=report.protocol_version,
        tracker=report.tracker,
        prediction=prediction,
        path=report.path,
        path_reason=report.path_reason,
        available_memory_bytes=report.room_bytes,
    )
