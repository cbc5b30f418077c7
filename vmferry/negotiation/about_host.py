"""Findings about the two hosts: room, kernels, clocks and certificates."""

from __future__ import annotations

from collections.abc import Iterator

from vmferry.memory.backings import TMPFS
from vmferry.negotiation.about_machine import release
from vmferry.negotiation.facts import HostFacts, MachineFacts, Offer
from vmferry.negotiation.findings import Finding, Severity, finding

CLOCK_TOLERANCE_S = 1.0
SHORTEST_MIGRATION_S = 60.0
"""What a migration may take of which nothing was predicted."""
CERTIFICATE_MARGIN_S = 60.0
"""What a certificate must outlive the migration by: the hand-off itself is never cut off."""
_DAY_S = 24 * 3600.0
_MIB = 1024 * 1024
_SLOW_TRACKER = "hash"


def about_room(machine: MachineFacts, offer: Offer) -> Iterator[Finding]:
    """Whether the destination takes newcomers, has no such machine yet, and has processors enough."""
    if offer.draining:
        yield finding(
            "host.draining",
            f"{offer.host} is being emptied and takes no newcomers",
            offer.host,
            "Choose another destination, or undo it there (vmferry undrain; draining = false in its configuration).",
        )
    if offer.incoming_migrations >= offer.max_incoming_migrations:
        yield finding(
            "host.full",
            f"{offer.host} takes in {offer.max_incoming_migrations} migrations at a time and has "
            f"{offer.incoming_migrations}",
            offer.host,
            "Nothing needs to be done: a migration waits for room in the queue. More room: max_incoming there.",
        )
    if machine.machine_id in offer.held_machine_ids:
        yield finding(
            "machine.already-there",
            f"{offer.host} owns {machine.name} already, or is sending it away",
            machine.machine_id,
            "Nothing to do, or wait for the destination to finish its own migration of it.",
        )
    if machine.name in offer.machine_names:
        yield finding(
            "machine.name-taken",
            f"{offer.host} has a machine named {machine.name} already",
            machine.name,
            "Stop the other machine there, or choose another destination.",
        )
    if 0 < offer.cpus < machine.vcpus:
        yield finding(
            "host.cpus",
            f"{machine.name} has {machine.vcpus} virtual processors, {offer.host} has {offer.cpus}",
            offer.host,
            "Choose a destination with more processors: some of the guest's would wait for others that wait for "
            "them.",
        )


def about_memory(machine: MachineFacts, offer: Offer) -> Iterator[Finding]:
    """Whether the destination can make the same kind of memory, and has enough of it after its promises."""
    wanted = machine.memory_bytes // _MIB
    kinds = [backing for backing in offer.backings if backing.name == machine.memory_backing]
    fitting = [backing for backing in kinds if machine.memory_page_bytes in (0, backing.page_size_bytes)]
    if not kinds:
        yield finding(
            "memory.backing",
            f"the memory of {machine.name} lies in {machine.memory_backing}, {offer.host} can make "
            f"{', '.join(sorted({backing.name for backing in offer.backings}))}",
            machine.memory_backing,
            "Choose a destination that has it, or make it there (docs/qemu.md).",
        )
    elif not fitting:
        sizes = ", ".join(str(backing.page_size_bytes) for backing in kinds)
        yield finding(
            "memory.page-size",
            f"pages have {machine.memory_page_bytes} bytes here and {sizes} at {offer.host}",
            offer.host,
            "Choose a destination with the same page size.",
        )
    elif machine.memory_backing != TMPFS and (most := max(one.available_bytes for one in fitting)) < (
        machine.memory_bytes
    ):
        yield finding(
            "memory.backing",
            f"{machine.name} needs {wanted} MiB of {machine.memory_backing}, {offer.host} has {most // _MIB} MiB",
            machine.memory_backing,
            "Make more of it there, or choose another destination.",
        )
    # Other kinds have room of their own, huge pages for instance what was set aside for them.
    if machine.memory_backing == TMPFS and machine.memory_bytes > offer.available_memory_bytes:
        yield finding(
            "memory.insufficient",
            f"{machine.name} needs {wanted} MiB, {offer.host} has {offer.available_memory_bytes // _MIB} MiB to "
            "give after what it has promised to others",
            offer.host,
            "Free memory on the destination or choose another one.",
        )


def about_kernels(here: HostFacts, offer: Offer) -> Iterator[Finding]:
    """What differs between the kernels, and whether the machine could come back as fast."""
    if here.kernel and offer.kernel and here.kernel != offer.kernel:
        older = release(offer.kernel) < release(here.kernel)
        yield finding(
            "kernel.older" if older else "kernel.differs",
            f"this host runs Linux {here.kernel}, {offer.host} runs {offer.kernel}",
            offer.host,
        )
    usable = [tracker.kind for tracker in offer.trackers if tracker.usable]
    if offer.trackers and (not usable or usable[0] == _SLOW_TRACKER):
        best = f"only by the tracker {usable[0]}" if usable else "by no tracker at all"
        yield finding(
            "tracker.way-back",
            f"{offer.host} (Linux {offer.kernel or 'unknown'}) finds writes {best}: the way back would be slow, "
            "or shut",
            offer.host,
            "Run 'vmferry probe' there; a kernel from 6.7 on tracks writes directly.",
        )


def about_clocks(machine: MachineFacts, here: HostFacts, offer: Offer) -> Iterator[Finding]:
    """Whether the guest's time would jump, or be counted by something else."""
    apart = _apart(here, offer)
    if abs(apart) > CLOCK_TOLERANCE_S:
        yield finding(
            "clock.skew",
            f"the clock of {offer.host} is at least {abs(apart):.1f} s {'ahead of' if apart > 0 else 'behind'} "
            "this host's: the guest's clock would jump by as much where it follows the host's",
            offer.host,
            "Synchronise both hosts' clocks (chronyc tracking), then plan again.",
        )
    if here.clock_source and offer.clock_source and here.clock_source != offer.clock_source:
        kvm = machine.accelerator == "kvm"
        yield finding(
            "clock.source",
            f"this host's kernel counts time by {here.clock_source}, {offer.host}'s by {offer.clock_source}",
            offer.host,
            "See /sys/devices/system/clocksource/clocksource0 there; a kernel that gave up tsc had reason to.",
            severity=Severity.WARNS if kvm else Severity.NOTE,
        )


def _apart(here: HostFacts, offer: Offer) -> float:
    """How far the destination's clock is ahead at least: it was read somewhere between question and answer."""
    if not (offer.at_s and here.asked_at_s and here.answered_at_s):
        return 0.0
    return min(offer.at_s - here.asked_at_s, 0.0) + max(offer.at_s - here.answered_at_s, 0.0)


def about_certificates(
    machine: MachineFacts, here: HostFacts, offer: Offer, *, switch_s: float
) -> Iterator[Finding]:
    """Whether both hosts can prove who they are until the end."""
    now = here.answered_at_s
    needed_s = (machine.predicted_total_s or SHORTEST_MIGRATION_S) + switch_s + CERTIFICATE_MARGIN_S
    for host, expires_at_s in (
        (here.host, here.certificate_expires_at_s),
        (offer.host, offer.certificate_expires_at_s),
    ):
        left_s = expires_at_s - now
        if not expires_at_s or left_s >= max(needed_s, _DAY_S):
            continue
        yield finding(
            "certificate.expires",
            f"the certificate of {host} expires in {max(left_s, 0.0):.0f} s, this migration should have "
            f"{needed_s:.0f} s",
            host,
            "Issue a new one (vmferry certs issue --force); running services take it up by themselves.",
            severity=Severity.BLOCKS if left_s < needed_s else Severity.WARNS,
        )


def about_software(here: HostFacts, offer: Offer) -> Iterator[Finding]:
    """Whether both hosts run the same vmferry."""
    if here.software_version and here.software_version != offer.software_version:
        yield finding(
            "software.differs",
            f"this host runs vmferry {here.software_version}, {offer.host} runs {offer.software_version}",
            offer.host,
        )
