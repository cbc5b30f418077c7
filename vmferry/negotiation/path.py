"""How guest memory travels: read and written by vmferry, or in the hypervisor's own stream.

Promise: the way is chosen before anything starts, with the reason as a sentence; what a caller insists on is done or
refused by name, never replaced; a host of an earlier release is sent only what it can take in. Pure: facts in,
choice out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from vmferry.negotiation.findings import Finding, finding

DIRECT: Final = "direct"
"""vmferry reads memory here and writes it there; only device state goes through the hypervisor."""
STREAM: Final = "stream"
"""The hypervisor's own migration, carried inside our lanes."""
PATHS: Final = (DIRECT, STREAM)
STREAM_SINCE_PROTOCOL: Final = 2
STREAMING_KINDS: Final = ("qemu",)
HASH: Final = "hash"


@dataclass(frozen=True)
class PathFacts:
    """What decides about the way."""

    machine: str
    kind: str
    shared_memory: bool
    """Whether guest memory is a shared mapping that can be read from outside of the hypervisor."""
    streams_live: bool
    """Whether its hypervisor sees every write of the guest while it streams memory."""
    tracker: str
    """The write tracker that would be used; empty if none works, or not the one that is insisted on."""
    tracker_problem: str
    """Why there is none."""
    protocol_version: int
    """What both hosts speak; 0 if there is nothing in common."""
    destination: str
    receives: Sequence[str]
    """What the destination says it can receive; earlier releases say nothing, and mean the direct way."""


@dataclass(frozen=True)
class PathWishes:
    """What the caller asks for."""

    path: str = ""
    """The way that the caller insists on, if any."""
    tracker: str = ""
    """The write tracker that the caller insists on, if any."""
    compare_bytes: bool = False
    """Whether all memory is to be compared byte for byte."""


@dataclass(frozen=True)
class PathChoice:
    """The way, and what is to be said about it."""

    path: str
    """``direct`` or ``stream``; empty if neither is possible."""
    reason: str
    findings: Sequence[Finding] = ()


def choose_path(facts: PathFacts, wishes: PathWishes) -> PathChoice:
    """The better way that works, or the one that the caller insists on."""
    problems = {DIRECT: _against_direct(facts), STREAM: _against_stream(facts)}
    wanted = wishes.path or _better(facts, wishes, problems)
    if problem := problems[wanted]:
        # A missing tracker has a finding of its own.
        told = wanted == DIRECT and facts.shared_memory and not facts.tracker
        return PathChoice("", problem, () if told else (_unavailable(facts, wanted, problem, wishes),))
    if wanted == DIRECT:
        return PathChoice(DIRECT, _why_direct(facts, wishes))
    reason = f"{_why_stream(wishes, problems)}; {facts.kind} sends it in a stream of its own"
    findings = [finding("path.stream", reason, facts.machine)]
    findings += [_paused(facts)] if not facts.streams_live else []
    findings += [_no_comparison(facts)] if wishes.compare_bytes else []
    return PathChoice(STREAM, reason, tuple(findings))


def path_problem(path: str, kind: str, version: int, *, shared: bool) -> str:
    """What is wrong with the way that a source has chosen; empty if nothing is."""
    if path == STREAM:
        if kind not in STREAMING_KINDS:
            return f"a machine of kind {kind} has no migration stream of its own"
        return "" if version >= STREAM_SINCE_PROTOCOL else f"version {version} knows no streams"
    if path not in ("", DIRECT):
        return f"path must be one of {', '.join(PATHS)}"
    return "" if shared else "this machine's memory cannot be written from outside of its hypervisor"


def _better(facts: PathFacts, wishes: PathWishes, problems: dict[str, str]) -> str:
    """The direct way wherever it works; the stream only instead of nothing."""
    if not problems[DIRECT] or (wishes.tracker and facts.shared_memory):
        return DIRECT  # a tracker that is insisted on is never done without silently
    missing_tracker = facts.shared_memory and not facts.tracker
    return DIRECT if problems[STREAM] and missing_tracker else STREAM


def _against_direct(facts: PathFacts) -> str:
    if not facts.shared_memory:
        return f"the memory of {facts.machine} is not shared memory, so it cannot be read from outside"
    if not facts.tracker:
        return f"no write tracker works here: {facts.tracker_problem}"
    if facts.receives and DIRECT not in facts.receives:
        return f"{facts.destination} does not take memory in directly"
    return ""


def _against_stream(facts: PathFacts) -> str:
    if facts.kind not in STREAMING_KINDS:
        return f"a machine of kind {facts.kind} has no migration stream of its own"
    if STREAM not in facts.receives or facts.protocol_version < STREAM_SINCE_PROTOCOL:
        return f"{facts.destination} does not take in a hypervisor's stream"
    return ""


def _why_direct(facts: PathFacts, wishes: PathWishes) -> str:
    if wishes.path:
        return "the caller insists on it"
    if facts.tracker == HASH and not wishes.tracker:
        return (
            "memory is shared and can be read from outside; written pages are found by comparing hashes, which is "
            "slower than a hypervisor's own stream but keeps the digest of every page and the comparison of bytes"
        )
    return f"memory is shared and can be read from outside, and {facts.tracker} tracks its writes"


def _why_stream(wishes: PathWishes, problems: dict[str, str]) -> str:
    return "the caller insists on it" if wishes.path else problems[DIRECT]


def _unavailable(facts: PathFacts, wanted: str, problem: str, wishes: PathWishes) -> Finding:
    if wishes.path:
        remedy = "Leave the choice to vmferry."
    else:  # neither way is possible
        problem = f"{_against_direct(facts)}, and {problem}"
        remedy = "Update the destination, or run the machine with memory in a shared file."
    return finding("path.unavailable", problem, wanted, remedy)


def _paused(facts: PathFacts) -> Finding:
    return finding(
        "path.not-live",
        f"the hypervisor of {facts.machine} emulates the processor and loses track of writes while it streams; "
        "the guest is paused while all its memory is sent",
        facts.machine,
        "Expect a pause of that length, or bound it by downtime_limit; KVM, or memory in a shared file, avoids it.",
    )


def _no_comparison(facts: PathFacts) -> Finding:
    return finding(
        "verify.unavailable",
        f"the memory of {facts.machine} travels in its hypervisor's own stream and cannot be compared byte for byte",
        "verify",
        "Ask for the digest only, or for the direct path if the machine's memory is in a shared file.",
    )
