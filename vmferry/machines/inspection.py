"""What a running QEMU says of itself, asked for a plan: its release, its parts, and what its guest was shown.

Promise: it asks and changes nothing. A question that this release does not know is an answer of ``None``, told as
"not known"; a hypervisor that cannot be asked at all is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from vmferry.errors import MachineFailedError
from vmferry.machines.monitor import Monitor
from vmferry.machines.qemu import cpuid
from vmferry.negotiation.facts import CpuidKey, Device

IGNORE_SHARED: Final = "x-ignore-shared"
"""The capability that keeps memory out of the device state."""
LATE_ACTIVATE: Final = "late-block-activate"
"""A copy that has loaded its state takes its disks, and their locks, only when it is told to run."""

_FOLDERS: Final = ("/machine/peripheral", "/machine/peripheral-anon")
_CHILD: Final = re.compile(r"child<(.+)>")
# Network back ends have no place among QEMU's objects; this is the one list of them.
_BACK_END: Final = re.compile(r"(\S+): index=\d+,type=(vhost-user|vhost-vdpa)\b")


@dataclass(frozen=True)
class Inspection:
    """What a running hypervisor says about itself."""

    version: str
    blockers: Sequence[str]
    """Why it would not let its machine go; empty if nothing stands in the way."""
    vcpus: int
    memory_bytes: int
    devices: Sequence[Device] | None
    """What was asked for by name, at its start or later."""
    foreign_backends: Sequence[Device]
    """Network back ends in other processes."""
    cpuid: Mapping[CpuidKey, int] | None
    """What its guest sees of its first processor."""


async def inspect(monitor: Monitor, needed: Iterable[str]) -> Inspection:
    """Ask the QEMU behind a monitor, which must have the capabilities that are ``needed``.

    Raises:
        MachineFailedError: it cannot be asked, or gives answers without sense.
        MachineDeadError: its process has ended.
    """
    release = await monitor.execute("query-version", repeatable=True)
    capabilities = await monitor.execute("query-migrate-capabilities", repeatable=True)
    progress = await monitor.execute("query-migrate", repeatable=True)
    processors = await monitor.execute("query-cpus-fast", repeatable=True)
    memory = await monitor.execute("query-memory-size-summary", repeatable=True)
    try:
        numbers = release["qemu"]
        blockers = [str(reason) for reason in progress.get("blocked-reasons", ())]
        known = {capability["capability"] for capability in capabilities}
        blockers += [f"it has no capability {name}" for name in needed if name not in known]
        first = min(processors, key=lambda one: int(one["cpu-index"]))
        return Inspection(
            version=f"{numbers['major']}.{numbers['minor']}.{numbers['micro']}",
            blockers=tuple(blockers),
            vcpus=len(processors),
            memory_bytes=int(memory["base-memory"]) + int(memory.get("plugged-memory", 0)),
            devices=await _devices(monitor),
            foreign_backends=await _foreign_backends(monitor),
            cpuid=await _cpuid(monitor, str(first["qom-path"])),
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise MachineFailedError(f"its hypervisor gave an answer without sense: {error!r}") from error


async def _devices(monitor: Monitor) -> Sequence[Device] | None:
    found = []
    for folder in _FOLDERS:
        children = await _if_known(monitor, "qom-list", {"path": folder})
        if children is None:
            return None
        for child in children:
            match = _CHILD.fullmatch(str(child["type"]))
            if match is not None:
                found.append(Device(str(child["name"]), match[1]))
    return tuple(found)


async def _foreign_backends(monitor: Monitor) -> Sequence[Device]:
    text = await _if_known(monitor, "human-monitor-command", {"command-line": "info network"})
    return tuple(Device(match[1], match[2]) for match in _BACK_END.finditer(str(text or "")))


async def _cpuid(monitor: Monitor, path: str) -> Mapping[CpuidKey, int] | None:
    answer = await _if_known(monitor, "qom-get", {"path": path, "property": cpuid.PROPERTY})
    return None if answer is None else cpuid.words(answer)


async def _if_known(monitor: Monitor, command: str, arguments: Mapping[str, Any]) -> Any:
    """The answer, or ``None`` if the hypervisor itself refuses the question."""
    try:
        return await monitor.execute(command, arguments, repeatable=True)
    except MachineFailedError as error:
        if error.metadata.get("error_class"):
            return None
        raise
