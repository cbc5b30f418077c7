"""What this host never lets in: paths, interfaces and hypervisors that a description must not reach.

Promise: every file of this host that a description names is looked up with all symbolic links followed, and lies
below a folder that the host's configuration opens for machines; what is refused is told by the name of its field.
The same list is told to a source that asks beforehand and enforced when it begins.
"""

from __future__ import annotations

import contextlib
import ipaddress
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from vmferry.config import HostConfig
from vmferry.errors import ConfigError, InvalidArgumentError, MachineFailedError
from vmferry.machines import network
from vmferry.machines.qemu import probe
from vmferry.machines.qemu.spec import NicSpec, QemuSpec
from vmferry.machines.spec import MachineSpec
from vmferry.memory.backings import HUGETLBFS
from vmferry.memory.hugepages import check_folder
from vmferry.negotiation.about_network import about_network
from vmferry.negotiation.facts import Network
from vmferry.negotiation.findings import FINDINGS, Finding, Severity
from vmferry.v1 import compatibility_pb2


@dataclass(frozen=True)
class Refusal:
    """One reason for which a machine cannot run on this host."""

    id: str
    """The id of the finding in a compatibility report."""
    field: str
    """The field of the description."""
    message: str
    remedy: str
    severity: Severity = Severity.BLOCKS

    def __post_init__(self) -> None:
        assert self.severity in FINDINGS[self.id], self.id

    @classmethod
    def of(cls, finding: Finding) -> Refusal:
        """A finding about a field of the description."""
        return cls(finding.id, finding.object, finding.message, finding.remedy, finding.severity)

    def item(self) -> compatibility_pb2.CompatibilityItem:
        """As a caller that asks beforehand gets it."""
        return compatibility_pb2.CompatibilityItem(
            severity=compatibility_pb2.Severity.ValueType(self.severity.value),
            id=self.id,
            message=self.message,
            object=self.field,
            remedy=self.remedy,
        )

    def error(self) -> InvalidArgumentError:
        """The same for a caller that begins all the same."""
        return InvalidArgumentError(self.message, field=f"spec.{self.field}", remedy=self.remedy)


def refusals(
    spec: MachineSpec, config: HostConfig, networks: Mapping[str, Network] | None = None
) -> Iterator[Refusal]:
    """Everything in a description that this host refuses; asks and tries the hypervisor, which takes a moment.

    Args:
        spec: the description.
        config: what this host opens.
        networks: the machine's interfaces as its source has them, by name, if it told.
    """
    if spec.microvm is not None:
        yield from _about_netdev(spec.microvm.netdev, config.run_dir / "net")
    if spec.qemu is not None:
        yield from _about_hypervisor(spec.qemu, config)
        yield from _about_memory(spec.qemu, config)
        for field, path in spec.qemu.host_files().items():
            yield from _about_file(field, Path(path), config)
        for number, nic in enumerate(spec.qemu.nics):
            yield from _about_nic(f"qemu.nics[{number}].tap", nic, config, (networks or {}).get(nic.tap))


def _about_netdev(netdev: str, root: Path) -> Iterator[Refusal]:
    """A network end point must not let a source reach into this host."""
    target = netdev.removeprefix("dgram:")
    remedy = "Give the machine another network end point."
    if target.startswith("unix:"):
        path = Path(target.removeprefix("unix:"))
        if not path.resolve().is_relative_to(root.resolve()):
            message = f"network sockets must lie below {root}"
            yield Refusal("network.not-allowed", "microvm.netdev", message, remedy)
    elif target:
        address = target.rpartition(":")[0].strip("[]")
        with contextlib.suppress(ValueError):
            if ipaddress.ip_address(address).is_loopback:
                return
        message = "a network end point must be a loopback address here"
        yield Refusal("network.not-allowed", "microvm.netdev", message, remedy)


def _about_hypervisor(part: QemuSpec, config: HostConfig) -> Iterator[Refusal]:
    if Path(part.binary) not in config.qemu_binaries:
        message = f"{part.binary} is none of the binaries that machines may name here"
        remedy = "Add it to qemu_binaries in the destination's configuration, if it is meant to be used."
        yield Refusal("hypervisor.not-allowed", "qemu.binary", message, remedy)
        return
    if not part.resolved:
        message = (
            f"the machine type {part.machine} with accelerator {part.accelerator} differs from host to host"
        )
        yield Refusal("machine.unresolved", "qemu.machine", message, "Run it with 'vmferry machine run'.")
        return
    try:
        binary = probe.probe_binary(part.binary)
    except MachineFailedError as error:
        yield Refusal("machine.kind-unsupported", "qemu.binary", error.message, error.instance_remedy)
        return
    if part.machine not in binary.machine_types:
        message = f"QEMU {binary.version_text} has no machine type {part.machine}"
        remedy = "Install a QEMU on the destination that is at least as new as the source's."
        yield Refusal("machine.type-unsupported", "qemu.machine", message, remedy)
    problem = probe.accelerator_problem(part.binary, part.accelerator, part.cpu)
    if problem:
        message = f"{part.accelerator} cannot run a CPU of model {part.cpu} here: {problem}"
        remedy = (
            "Choose a destination with the same accelerator and CPU features, or a more modest CPU model."
        )
        yield Refusal("accelerator.unavailable", "qemu.accelerator", message, remedy)


def _about_memory(part: QemuSpec, config: HostConfig) -> Iterator[Refusal]:
    if part.memory_backing != HUGETLBFS:
        return
    problem = "this host has no folder for memory in huge pages"
    if config.huge_root is not None:
        try:
            check_folder(config.huge_root)
        except ConfigError as error:
            problem = error.message
        else:
            return
    remedy = "Mount a hugetlbfs and name it as huge_dir in the destination's configuration."
    yield Refusal("memory.backing", "qemu.memory_backing", problem, remedy)


def _about_file(field: str, path: Path, config: HostConfig) -> Iterator[Refusal]:
    found = resolved_file(field, path, config)
    if isinstance(found, Refusal):
        yield found


def resolved_file(field: str, path: Path, config: HostConfig) -> Path | Refusal:
    """A file with all links followed, or why no machine may use it here."""
    roots = " and ".join(map(str, config.image_roots)) or "nowhere"
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        # Whether it exists outside of the roots is nobody's business.
        if not any(path.is_relative_to(root) for root in config.image_roots):
            return _outside(field, path, roots)
        message = f"{path} cannot be found: {getattr(error, 'strerror', None) or error}"
        return Refusal("file.missing", field, message, "Put the same file there, at the same path.")
    if not any(real.is_relative_to(root.resolve()) for root in config.image_roots):
        return _outside(field, path, roots)
    if not stat.S_ISREG(real.stat().st_mode):
        remedy = "Name a regular file; block devices are not moved yet."
        return Refusal("file.not-regular", field, f"{path} is not a regular file", remedy)
    return real


def _outside(field: str, path: Path, roots: str) -> Refusal:
    message = f"{path} does not lie where files of machines may lie on this host: {roots}"
    remedy = (
        "Put it there on both hosts, or add its folder to image_roots in the destination's configuration."
    )
    return Refusal("file.outside-roots", field, message, remedy)


def _about_nic(field: str, nic: NicSpec, config: HostConfig, at_source: Network | None) -> Iterator[Refusal]:
    if nic.backend != "tap":
        return
    if nic.tap not in config.taps:
        remedy = "Add it to taps in the destination's configuration, if machines are to use it."
        yield Refusal("network.not-allowed", field, f"machines may not use {nic.tap} here", remedy)
        return
    here = network.tap(nic.tap)
    if here is None:
        remedy = f"Make it first: ip tuntap add {nic.tap} mode tap"
        yield Refusal("network.missing", field, f"there is no tap {nic.tap} on this host", remedy)
    else:
        yield from map(Refusal.of, about_network(field, at_source, here))
