"""The compatibility report: every finding about moving one machine to one host, the blocking ones first.

Promise: :func:`compare` returns the whole list, never just the first finding; the ids are stable; a migration is
started only if nothing blocks. Pure: facts in, findings out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vmferry.negotiation.about_cpu import about_cpu
from vmferry.negotiation.about_host import (
    about_certificates,
    about_clocks,
    about_kernels,
    about_memory,
    about_room,
    about_software,
)
from vmferry.negotiation.about_machine import about_kind, about_parts, about_state
from vmferry.negotiation.encodings import AUTO, about_encodings, agreed, offered
from vmferry.negotiation.facts import (
    PAGE_SIZE_BYTES,
    HostFacts,
    KindOffer,
    MachineFacts,
    Offer,
    TrackerFact,
)
from vmferry.negotiation.findings import Finding, Severity, finding
from vmferry.negotiation.path import STREAM, PathFacts, PathWishes, choose_path

PROTOCOL_VERSIONS = (2, 1)
"""What this release speaks, newest first."""
LOST_BELOW = {2: "a machine whose memory cannot be read from outside cannot be moved"}
"""What cannot be done with a destination that does not speak a version yet."""

__all__ = [
    "PAGE_SIZE_BYTES",
    "PROTOCOL_VERSIONS",
    "Finding",
    "HostFacts",
    "KindOffer",
    "MachineFacts",
    "Offer",
    "Report",
    "Severity",
    "TrackerFact",
    "compare",
]


@dataclass(frozen=True)
class Report:
    """The whole list and what was chosen."""

    findings: Sequence[Finding]
    protocol_version: int
    tracker: str
    path: str = ""
    path_reason: str = ""
    encodings: Sequence[str] = ()
    """What memory may travel as."""
    room_bytes: int = 0
    """Memory of the machine's kind that the destination would give to newcomers."""

    @property
    def blocking(self) -> list[Finding]:
        """The findings that forbid the migration."""
        return [found for found in self.findings if found.severity is Severity.BLOCKS]


def compare(
    machine: MachineFacts,
    offer: Offer,
    trackers: Sequence[TrackerFact],
    *,
    here: HostFacts | None = None,
    insist_on_tracker: str = "",
    insist_on_path: str = "",
    insist_on_encoding: str = AUTO,
    compare_bytes: bool = False,
    switch_timeout_s: float = 0.0,
) -> Report:
    """Everything that is to be said about moving ``machine`` to the host of ``offer``."""
    here = here or HostFacts()
    common = [version for version in PROTOCOL_VERSIONS if version in offer.protocol_versions]
    tracker = _choose(trackers, insist_on_tracker)
    wishes = PathWishes(insist_on_path, insist_on_tracker, compare_bytes)
    way = choose_path(_path_facts(machine, offer, trackers, tracker, max(common, default=0)), wishes)
    findings = [
        *about_protocol(PROTOCOL_VERSIONS, offer),
        *about_encodings(offer, insist_on_encoding, stream=way.path == STREAM),
        *about_state(machine),
        *about_parts(machine),
        *about_kind(machine, offer),
        *about_cpu(machine, offer),
        *about_room(machine, offer),
        *about_memory(machine, offer),
        *way.findings,
        *(_about_trackers(tracker, trackers, insist_on_tracker) if way.path != STREAM else ()),
        *about_kernels(here, offer),
        *about_clocks(machine, here, offer),
        *about_certificates(machine, here, offer, switch_s=switch_timeout_s),
        *about_software(here, offer),
    ]
    told = {found.id for found in findings}
    findings += [found for found in offer.refusals if found.id not in told]
    findings.sort(key=lambda found: -found.severity)
    used = tracker if way.path != STREAM else ""
    encodings = agreed(offered(offer, stream=way.path == STREAM), insist_on_encoding)
    kinds = [one for one in offer.backings if one.name == machine.memory_backing]
    fitting = [one for one in kinds if machine.memory_page_bytes in (0, one.page_size_bytes)]
    room = max((one.available_bytes for one in fitting), default=0)
    return Report(tuple(findings), max(common, default=0), used, way.path, way.reason, encodings, room)


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


def about_protocol(spoken: Sequence[int], offer: Offer) -> Iterator[Finding]:
    """Whether the hosts understand each other, and what is lost if only an older version is common.

    Args:
        spoken: what this host speaks, newest first.
        offer: the destination's.
    """
    common = [version for version in spoken if version in offer.protocol_versions]
    if not common:
        yield finding(
            "protocol.no-common-version",
            f"this host speaks {_listed(spoken)}, {offer.host} speaks {_listed(offer.protocol_versions)}",
            offer.host,
            "Update the older host; neighbouring releases share a version.",
        )
    elif max(common) < max(spoken):
        lost = [what for version, what in LOST_BELOW.items() if max(common) < version <= max(spoken)]
        yield finding(
            "protocol.old",
            f"this host speaks {_listed(spoken)}, {offer.host} only {_listed(offer.protocol_versions)}"
            + "".join(f"; {what}" for what in lost),
            offer.host,
            "Update the destination; until then everything else works as before.",
        )


def _listed(versions: Sequence[int]) -> str:
    return " and ".join(f"version {version}" for version in versions) or "none"


def _about_trackers(chosen: str, trackers: Sequence[TrackerFact], insist: str) -> Iterator[Finding]:
    if insist and not chosen:
        reason = next(
            (tracker.reason for tracker in trackers if tracker.kind == insist), "there is no such tracker"
        )
        yield finding(
            "tracker.unavailable",
            f"tracker {insist}: {reason}",
            insist,
            "Leave the choice to vmferry (without --tracker).",
        )
    elif not chosen:
        yield finding(
            "tracker.none",
            "no write tracker works here: "
            + "; ".join(f"{found.kind}: {found.reason}" for found in trackers),
            "tracker",
            "See 'vmferry probe' for what was tried.",
        )
    elif chosen == "hash":
        yield finding(
            "tracker.slow",
            "writes are found by comparing hashes of all memory, which costs time in every round and in the pause",
            chosen,
            "A kernel from 6.7 on tracks writes directly; see 'vmferry probe'.",
        )
    yield from (
        finding(f"tracker.{found.kind}", found.reason, found.kind)
        for found in trackers
        if not found.usable and found.kind != insist
    )
