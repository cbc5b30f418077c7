"""Whether a machine can be updated in place: the facts, found out here, and the reasons that follow from them.

Promise: asking changes nothing and starts nothing but a binary of QEMU that is asked what it knows. Whatever can be
known beforehand is told beforehand; what only the new process itself can say is compared before the guest is paused.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from pathlib import Path

from vmferry.config import HostConfig
from vmferry.errors import ConfigError, IncompatibleError, MachineFailedError, VmferryError
from vmferry.handoff.rights import Rights
from vmferry.machines import host
from vmferry.machines.beside import paths_beside
from vmferry.machines.directory import MachineDirectory, MachineRecord
from vmferry.machines.fields import canonical
from vmferry.machines.microvm import version
from vmferry.machines.port import RunState
from vmferry.machines.qemu import probe
from vmferry.machines.qmp import QmpMachine
from vmferry.machines.spec import QEMU, MachineSpec
from vmferry.machines.wire import spec_from_message
from vmferry.negotiation.about_update import Obstacle, UpdateFacts, different_cpu, differing, obstacles
from vmferry.v1 import update_pb2 as pb


@dataclass(frozen=True)
class Examined:
    """What was found out."""

    spec: MachineSpec
    """What the machine is to be."""
    obstacles: list[Obstacle]
    old_version: str = ""
    new_version: str = ""

    def insist(self) -> None:
        """Refuse unless nothing is in the way.

        Raises:
            IncompatibleError: with everything that is.
        """
        if self.obstacles:
            raise refused(self.obstacles)


def refused(found: list[Obstacle]) -> IncompatibleError:
    """The error that names everything that is in the way."""
    return IncompatibleError(
        "; ".join(f"{one.id}: {one.message}" for one in found),
        remedy=" ".join(dict.fromkeys(one.remedy for one in found if one.remedy)) or "Look at the reasons.",
        findings=",".join(one.id for one in found),
    )


def wanted_spec(record: MachineRecord, target: pb.UpdateTarget) -> MachineSpec:
    """What the machine is to be.

    Raises:
        InvalidArgumentError: that is not a description of a machine.
    """
    spec = spec_from_message(target.spec) if target.HasField("spec") else record.spec
    if target.qemu_binary and spec.qemu is not None:
        spec = replace(spec, qemu=replace(spec.qemu, binary=target.qemu_binary))
    return spec


class UpdateCheck:
    """What this host can say about updates of its machines."""

    def __init__(self, config: HostConfig, directory: MachineDirectory) -> None:
        self._config = config
        self._directory = directory

    async def examine(
        self, record: MachineRecord, target: pb.UpdateTarget, rights: Rights, busy: str
    ) -> Examined:
        """Find out all there is."""
        spec = wanted_spec(record, target)
        facts = UpdateFacts(
            owned=rights.owner and not rights.damaged,
            busy=busy or ("another update is open" if rights.being_updated else ""),
            running=record.alive,
            shared_memory=spec.shared_memory and record.spec.shared_memory,
            changes=differing(canonical(record.spec), canonical(spec)),
            available_bytes=next(iter(host.memory_backings(self._directory.ram_root, None))).available_bytes,
            no_place=_no_place(record),
        )
        if target.qemu_binary and spec.qemu is None:
            facts = replace(facts, changes=[*facts.changes, "qemu.binary of a machine that is not QEMU's"])
        old_version = ""
        if record.alive:
            facts, old_version = await self._of_running(record, facts)
        facts, new_version = await asyncio.to_thread(self._of_target, spec, facts)
        return Examined(spec, obstacles(facts), old_version, new_version)

    async def _of_running(self, record: MachineRecord, facts: UpdateFacts) -> tuple[UpdateFacts, str]:
        machine = self._directory.open(record, observe=True)
        try:
            facts = replace(facts, running=await machine.run_state() is RunState.RUNNING)
            if record.spec.kind != QEMU:
                return facts, await machine.version()
            found = await machine.inspect()
            backends = [f"{one.id} ({one.type})" for one in found.foreign_backends]
            return replace(facts, blockers=found.blockers, foreign_backends=backends), found.version
        except VmferryError as error:
            return replace(facts, blockers=[f"its hypervisor cannot be asked: {error.message}"]), ""
        finally:
            await machine.close()

    def _of_target(self, spec: MachineSpec, facts: UpdateFacts) -> tuple[UpdateFacts, str]:
        part = spec.qemu
        if part is None:
            return facts, version.TEXT
        facts = replace(
            facts,
            binary=part.binary,
            binary_allowed=Path(part.binary) in self._config.qemu_binaries,
            machine_type=part.machine,
            taps=[nic.tap for nic in part.nics if nic.tap],
        )
        if not facts.binary_allowed:
            return facts, ""
        try:
            binary = probe.probe_binary(part.binary)
        except MachineFailedError as error:
            return replace(facts, binary_problem=error.message), ""
        problem = probe.accelerator_problem(part.binary, part.accelerator, part.cpu)
        facts = replace(facts, machine_types=binary.machine_types, accelerator_problem=problem)
        return facts, binary.version_text


class Comparison:
    """What is compared once the new process is there, with the guest still running in the old one."""

    async def compare(self, old: QmpMachine, new: QmpMachine) -> None:
        """Refuse a new process that its guest could tell from the old one.

        Raises:
            IncompatibleError: with what differs.
        """
        if old.spec.kind != QEMU:
            return
        before, after = await old.inspect(), await new.inspect()
        found = different_cpu(before.cpuid, after.cpuid)
        if found:
            raise refused(found)


def _no_place(record: MachineRecord) -> str:
    try:
        paths_beside(record.paths)
    except ConfigError as error:
        return error.message
    return ""
