"""Findings about the machine itself: what it does, what it is made of, and who can run its kind."""

from __future__ import annotations

from collections.abc import Iterator

from vmferry.negotiation.facts import KindOffer, MachineFacts, Offer
from vmferry.negotiation.findings import Finding, finding

OLDEST_HYPERVISOR = {"qemu": (7, 2)}
"""The oldest releases, of kinds that hosts have in different ones."""

_MIB = 1024 * 1024
_NOT_RUNNING = {
    "paused": ("is paused", "Resume it first; only a running machine is migrated live."),
    "shutdown": ("has switched itself off", "Nothing of it runs: stop it here and start it there."),
    "inmigrate": ("is still arriving here itself", "Wait until it has arrived."),
    "suspended": ("is asleep", "Wake its guest first; one that sleeps cannot be held still."),
    "prelaunch": ("has not been started yet", "Start it first; only a running machine is migrated live."),
}
_FAILED = {
    "io-error": ("stands still because one of its disks failed", "Mend the disk and resume the machine."),
    "guest-panicked": ("stands still because its guest's kernel panicked", "Restart the guest."),
    "internal-error": (
        "stands still after an error inside its hypervisor",
        "Look at its log and restart it.",
    ),
    "watchdog": ("was stopped by its watchdog", "Look at the guest, and restart it."),
}
_VFIO = ("vfio",)
_VHOST_USER = ("vhost-user", "vhost-vdpa", "vdpa")


def about_state(machine: MachineFacts) -> Iterator[Finding]:
    """Whether it runs, is this host's, and is free to go."""
    if not machine.owned:
        yield finding(
            "machine.not-owned",
            f"this host has no right to send {machine.name} away",
            machine.name,
            "Call the host that owns the machine (vmferry list --machines says whose it is).",
        )
    if machine.migrating:
        yield finding(
            "machine.busy",
            f"{machine.name} already has an open migration",
            machine.name,
            f"Wait for it to end, or cancel it (vmferry list --machine {machine.name} --open).",
        )
    yield from _about_life(machine)
    for blocker in machine.blockers:
        yield finding(
            "machine.not-migratable",
            f"the hypervisor of {machine.name} says: {blocker}",
            machine.name,
            "Remove the device that forbids it, or shut the machine down and start it elsewhere.",
        )


def _about_life(machine: MachineFacts) -> Iterator[Finding]:
    if not machine.alive:
        yield finding(
            "machine.dead",
            f"the process of {machine.name} has ended",
            machine.name,
            f"Look at its log, remove what is left (vmferry machine stop {machine.name}), and start it anew.",
        )
    elif machine.unreachable:
        yield finding(
            "machine.unreachable",
            f"{machine.name} cannot be asked: {machine.unreachable}",
            machine.name,
            "See who holds the machine's watch.sock, and look at its log in the same folder.",
        )
    elif machine.status in _FAILED:
        words, remedy = _FAILED[machine.status]
        yield finding("machine.failed", f"{machine.name} {words} ({machine.status})", machine.name, remedy)
    elif machine.status in _NOT_RUNNING or not machine.running:
        words, remedy = _NOT_RUNNING.get(machine.status, ("is not running", "Start or resume it first."))
        told = f" ({machine.status})" if machine.status else ""
        yield finding("machine.not-running", f"{machine.name} {words}{told}", machine.name, remedy)


def about_parts(machine: MachineFacts) -> Iterator[Finding]:
    """What the running machine has, or lacks, against its description: the destination builds it from that."""
    described, found = set(machine.described_devices), machine.found_devices
    extra = [device for device in found or () if device.id not in described]
    missing = sorted(described - {device.id for device in found or ()}) if found is not None else []
    differences = [
        *(f"it has a device {device.id} ({device.type})" for device in extra),
        *(f"its device {name} is gone" for name in missing),
    ]
    if machine.found_vcpus and machine.found_vcpus != machine.vcpus:
        differences.append(f"it has {machine.found_vcpus} processors instead of {machine.vcpus}")
    if machine.found_memory_bytes and machine.found_memory_bytes != machine.memory_bytes:
        differences.append(
            f"it has {machine.found_memory_bytes // _MIB} MiB of memory instead of {machine.memory_bytes // _MIB}"
        )
    if differences:
        yield finding(
            "machine.differs",
            f"{machine.name} is not what its description says any more: {'; '.join(differences)}",
            ", ".join([*(device.id for device in extra), *missing]) or machine.name,
            "Undo what was plugged or unplugged by hand (QMP device_del), or restart it from a description that "
            "says it.",
        )
    yield from _about_types(machine)


def _about_types(machine: MachineFacts) -> Iterator[Finding]:
    for device in machine.found_devices or ():
        if device.type.startswith(_VFIO):
            yield finding(
                "device.vfio",
                f"{device.id} is a device of this host ({device.type}), which writes memory unseen",
                f"{device.id} ({device.type})",
                f"Unplug it first (QMP device_del id={device.id}), and plug in another at the destination.",
            )
        elif device.type.startswith(_VHOST_USER):
            yield _in_another_process(device.id, device.type)
    for device in machine.foreign_backends:
        yield _in_another_process(device.id, device.type)


def _in_another_process(name: str, kind: str) -> Finding:
    return finding(
        "device.vhost-user",
        f"{name} is served by another process ({kind}), which writes memory unseen and keeps state of its own",
        f"{name} ({kind})",
        "Run the machine with a device that its hypervisor serves itself.",
    )


def about_kind(machine: MachineFacts, offer: Offer) -> Iterator[Finding]:
    """Whether the destination has the hypervisor, in a release that loads this machine's state."""
    same = [kind for kind in offer.kinds if kind.kind == machine.kind]
    kind = next((kind for kind in same if kind.binary == machine.binary), None)
    if kind is None:
        has = ", ".join(sorted({" ".join(filter(None, (one.kind, one.binary))) for one in offer.kinds}))
        wanted = " ".join(filter(None, (machine.kind, machine.binary)))
        yield finding(
            "machine.kind-unsupported",
            f"{offer.host} cannot run machines of kind {wanted}; it runs {has or 'none'}",
            machine.kind,
            "Choose a destination that can, or install the hypervisor there and name it in qemu_binaries.",
        )
        return
    if not kind.oldest_state_version <= machine.state_version <= kind.newest_state_version:
        yield finding(
            "machine.state-version",
            f"the device state has version {machine.state_version}, {offer.host} loads "
            f"{kind.oldest_state_version} to {kind.newest_state_version}",
            machine.kind,
            "Update the destination first; machines move from older to newer software.",
        )
    yield from _about_release(machine, kind, offer)


def _about_release(machine: MachineFacts, kind: KindOffer, offer: Offer) -> Iterator[Finding]:
    oldest = OLDEST_HYPERVISOR.get(machine.kind)
    if oldest is None:
        return
    here, there = release(machine.hypervisor_version), release(kind.version)
    for where, version in (("this host", here), (offer.host, there)):
        if version and version < oldest:
            yield finding(
                "hypervisor.too-old",
                f"{where} has {machine.kind} {_dotted(version)}, and the oldest that works is {_dotted(oldest)}",
                where,
                f"Install {machine.kind} {_dotted(oldest)} or newer there.",
            )
    if there and there < here:
        yield finding(
            "hypervisor.older",
            f"{machine.name} runs on {machine.kind} {machine.hypervisor_version}, {offer.host} has {kind.version}; "
            "even where the machine type is known there, going back a release is tested by nobody",
            machine.kind,
            "Update the destination first; machines move from older to newer software.",
        )


def release(version: str) -> tuple[int, ...]:
    """Major and minor number, by which releases compare."""
    return tuple(int(number) for number in version.split(".")[:2] if number.isdecimal())


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
