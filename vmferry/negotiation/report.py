"""The compatibility report: every finding about moving one machine to one host, the blocking ones first.

Promise: :func:`compare` returns the whole list, never just the first finding; the ids are stable; a migration is
started only if nothing blocks. Pure: facts in, findings out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vmferry.negotiation.findings import Finding, Severity
from vmferry.negotiation.path import STREAM, PathFacts, PathWishes, choose_path

__all__ = ["Finding", "KindOffer", "MachineFacts", "Offer", "Report", "Severity", "TrackerFact", "compare"]

PROTOCOL_VERSIONS = (2, 1)
"""What this release speaks, newest first."""
PAGE_SIZE_BYTES = 4096
ENCODINGS = ("none",)
_MIB = 1024 * 1024


@dataclass(frozen=True)
class KindOffer:
    """A machine kind a host can run."""

    kind: str
    version: str
    oldest_state_version: int
    newest_state_version: int
    binary: str = ""
    machine_types: Sequence[str] = ()
    accelerators: Sequence[str] = ()


@dataclass(frozen=True)
class MachineFacts:
    """What the source knows about the machine."""

    name: str
    machine_id: str
    kind: str
    state_version: int
    memory_bytes: int
    vcpus: int
    running: bool
    owned: bool
    migrating: bool
    binary: str = ""
    """The hypervisor that its description names, if it names one."""
    hypervisor_version: str = ""
    """Of its running process, for kinds whose hosts have different ones."""
    blockers: Sequence[str] = ()
    """Why its hypervisor would not let it go, in its own words."""
    shared_memory: bool = True
    """Whether its memory is a shared mapping that can be read from outside of its hypervisor."""
    streams_live: bool = True
    """Whether its hypervisor sees every write of the guest while it streams memory."""


@dataclass(frozen=True)
class TrackerFact:
    """What a probe found about one write tracker at the source."""

    kind: str
    usable: bool
    reason: str


@dataclass(frozen=True)
class Offer:
    """What the destination offers."""

    host: str
    software_version: str
    protocol_versions: Sequence[int]
    kinds: Sequence[KindOffer]
    available_memory_bytes: int
    page_size_bytes: int
    encodings: Sequence[str]
    incoming_migrations: int
    max_incoming_migrations: int
    machine_names: Sequence[str]
    held_machine_ids: Sequence[str]
    refusals: Sequence[Finding] = ()
    """What it found wrong with the machine's description."""
    paths: Sequence[str] = ()
    """Ways for memory to travel that it can receive; empty means the direct one."""


@dataclass(frozen=True)
class Report:
    """The whole list and what was chosen."""

    findings: Sequence[Finding]
    protocol_version: int
    tracker: str
    path: str = ""
    path_reason: str = ""

    @property
    def blocking(self) -> list[Finding]:
        """The findings that forbid the migration."""
        return [finding for finding in self.findings if finding.severity is Severity.BLOCKS]


def compare(
    machine: MachineFacts,
    offer: Offer,
    trackers: Sequence[TrackerFact],
    *,
    insist_on_tracker: str = "",
    insist_on_path: str = "",
    compare_bytes: bool = False,
) -> Report:
    """Everything that is to be said about moving ``machine`` to the host of ``offer``."""
    common = [version for version in PROTOCOL_VERSIONS if version in offer.protocol_versions]
    tracker = _choose(trackers, insist_on_tracker)
    wishes = PathWishes(insist_on_path, insist_on_tracker, compare_bytes)
    way = choose_path(_path_facts(machine, offer, trackers, tracker, max(common, default=0)), wishes)
    findings = [
        *_about_protocol(common, offer),
        *_about_machine(machine),
        *_about_kind(machine, offer),
        *_about_host(machine, offer),
        *way.findings,
        *(_about_trackers(tracker, trackers, insist_on_tracker) if way.path != STREAM else ()),
    ]
    told = {finding.id for finding in findings}
    findings += [finding for finding in offer.refusals if finding.id not in told]
    findings.sort(key=lambda finding: -finding.severity)
    used = tracker if way.path != STREAM else ""
    return Report(tuple(findings), max(common, default=0), used, way.path, way.reason)


def _path_facts(
    machine: MachineFacts, offer: Offer, trackers: Sequence[TrackerFact], tracker: str, version: int
) -> PathFacts:
    return PathFacts(
        machine=machine.name,
        kind=machine.kind,
        shared_memory=machine.shared_memory,
        streams_live=machine.streams_live,
        tracker=tracker,
        tracker_problem="; ".join(f"{found.kind}: {found.reason}" for found in trackers if not found.usable),
        protocol_version=version,
        destination=offer.host,
        receives=offer.paths,
    )


def _choose(trackers: Sequence[TrackerFact], insist: str) -> str:
    usable = [tracker.kind for tracker in trackers if tracker.usable]
    if insist:
        return insist if insist in usable else ""
    return usable[0] if usable else ""


def _about_protocol(common: Sequence[int], offer: Offer) -> Iterator[Finding]:
    if not common:
        yield Finding(
            Severity.BLOCKS,
            "protocol.no-common-version",
            f"this host speaks {list(PROTOCOL_VERSIONS)}, {offer.host} speaks {list(offer.protocol_versions)}",
            offer.host,
            "Update the older host; neighbouring releases share a version.",
        )
    if offer.page_size_bytes != PAGE_SIZE_BYTES:
        yield Finding(
            Severity.BLOCKS,
            "memory.page-size",
            f"pages have {PAGE_SIZE_BYTES} bytes here and {offer.page_size_bytes} at {offer.host}",
            offer.host,
            "Choose a destination with the same page size.",
        )
    if not set(ENCODINGS) & set(offer.encodings):
        yield Finding(
            Severity.BLOCKS,
            "encoding.no-common",
            f"no encoding in common with {offer.host}",
            offer.host,
            "Update the older host.",
        )


def _about_machine(machine: MachineFacts) -> Iterator[Finding]:
    if not machine.owned:
        yield Finding(
            Severity.BLOCKS,
            "machine.not-owned",
            f"this host has no right to send {machine.name} away",
            machine.name,
            "Call the host that owns the machine.",
        )
    if machine.migrating:
        yield Finding(
            Severity.BLOCKS,
            "machine.busy",
            f"{machine.name} already has an open migration",
            machine.name,
            "Wait for it to end, or cancel it.",
        )
    if not machine.running:
        yield Finding(
            Severity.BLOCKS,
            "machine.not-running",
            f"{machine.name} is not running",
            machine.name,
            "Only a running machine is migrated live; start or resume it first.",
        )
    for blocker in machine.blockers:
        yield Finding(
            Severity.BLOCKS,
            "machine.not-migratable",
            f"the hypervisor of {machine.name} says: {blocker}",
            machine.name,
            "Remove the device that forbids it, or shut the machine down and start it elsewhere.",
        )


def _about_kind(machine: MachineFacts, offer: Offer) -> Iterator[Finding]:
    same = [kind for kind in offer.kinds if kind.kind == machine.kind]
    kind = next((kind for kind in same if kind.binary == machine.binary), None)
    if kind is None:
        yield Finding(
            Severity.BLOCKS,
            "machine.kind-unsupported",
            f"{offer.host} cannot run machines of kind {machine.kind}",
            machine.kind,
            "Choose a destination that can, or install the hypervisor there.",
        )
    elif not kind.oldest_state_version <= machine.state_version <= kind.newest_state_version:
        yield Finding(
            Severity.BLOCKS,
            "machine.state-version",
            f"the device state has version {machine.state_version}, {offer.host} loads "
            f"{kind.oldest_state_version} to {kind.newest_state_version}",
            machine.kind,
            "Update the destination first; machines move from older to newer software.",
        )
    elif machine.hypervisor_version and _release(kind.version) < _release(machine.hypervisor_version):
        yield Finding(
            Severity.WARNS,
            "hypervisor.older",
            f"{machine.name} runs on {machine.kind} {machine.hypervisor_version}, {offer.host} has {kind.version}; "
            "the machine type is known there, but going back a release is tested by nobody",
            machine.kind,
            "Update the destination first; machines move from older to newer software.",
        )


def _release(version: str) -> tuple[int, ...]:
    """Major and minor number, by which releases of a hypervisor compare."""
    return tuple(int(number) for number in version.split(".")[:2] if number.isdecimal())


def _about_host(machine: MachineFacts, offer: Offer) -> Iterator[Finding]:
    if machine.memory_bytes > offer.available_memory_bytes:
        yield Finding(
            Severity.BLOCKS,
            "memory.insufficient",
            f"{machine.name} needs {machine.memory_bytes // _MIB} MiB, {offer.host} has "
            f"{offer.available_memory_bytes // _MIB} MiB to give",
            offer.host,
            "Free memory on the destination or choose another one.",
        )
    if machine.machine_id in offer.held_machine_ids:
        yield Finding(
            Severity.BLOCKS,
            "machine.already-there",
            f"{offer.host} owns this machine already, or is sending it away",
            machine.machine_id,
            "Nothing to do, or wait for the destination to finish its own migration of it.",
        )
    if machine.name in offer.machine_names:
        yield Finding(
            Severity.BLOCKS,
            "machine.name-taken",
            f"{offer.host} has a machine named {machine.name} already",
            machine.name,
            "Rename or stop the other machine.",
        )
    if offer.incoming_migrations >= offer.max_incoming_migrations:
        yield Finding(
            Severity.BLOCKS,
            "host.full",
            f"{offer.host} takes in {offer.max_incoming_migrations} migrations at a time and has as many",
            offer.host,
            "Wait for one to end, or raise max_incoming there.",
        )


def _about_trackers(chosen: str, trackers: Sequence[TrackerFact], insist: str) -> Iterator[Finding]:
    if insist and not chosen:
        found = next(
            (tracker.reason for tracker in trackers if tracker.kind == insist), "there is no such tracker"
        )
        yield Finding(
            Severity.BLOCKS,
            "tracker.unavailable",
            f"tracker {insist}: {found}",
            insist,
            "Leave the choice to vmferry.",
        )
    elif not chosen:
        yield Finding(
            Severity.BLOCKS,
            "tracker.none",
            "no write tracker works here: "
            + "; ".join(f"{found.kind}: {found.reason}" for found in trackers),
            "tracker",
            "See 'vmferry probe' for what was tried.",
        )
    elif chosen == "hash":
        yield Finding(
            Severity.WARNS,
            "tracker.slow",
            "writes are found by comparing hashes of all memory, which costs time in every round and in the pause",
            chosen,
            "A kernel from 6.7 on tracks writes directly; see 'vmferry probe'.",
        )
    yield from (
        Finding(Severity.NOTE, f"tracker.{found.kind}", found.reason, found.kind, "")
        for found in trackers
        if not found.usable and found.kind != insist
    )
