"""How memory travels is chosen with a reason, and never against what the caller insists on."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.unit.negotiation.samples import OFFER, QEMU_OFFER, TRACKERS
from tests.unit.negotiation.samples import QEMU as MACHINE
from vmferry.negotiation.findings import Severity
from vmferry.negotiation.path import DIRECT, STREAM, PathFacts, PathWishes, choose_path
from vmferry.negotiation.report import TrackerFact, compare

FACTS = PathFacts(
    machine="web",
    kind="qemu",
    shared_memory=True,
    streams_live=True,
    tracker="pagemap-scan",
    tracker_problem="soft-dirty: this kernel lacks it",
    protocol_version=2,
    destination="spiffe://example.org/vmhost/b",
    receives=(DIRECT, STREAM),
)
UNSHARED = replace(FACTS, shared_memory=False)
UNTRACKED = replace(FACTS, tracker="")
HASHED = replace(FACTS, tracker="hash")


def older(facts: PathFacts) -> PathFacts:
    """The same with a destination of the release before."""
    return replace(facts, protocol_version=1, receives=())


ANYTHING = PathWishes()
BYTES = PathWishes(compare_bytes=True)

# name: facts, wishes, path, words of the reason, ids of the findings
TABLE: dict[str, tuple[PathFacts, PathWishes, str, str, list[str]]] = {
    "the better one": (FACTS, ANYTHING, DIRECT, "pagemap-scan tracks", []),
    "an earlier release": (older(FACTS), ANYTHING, DIRECT, "pagemap-scan", []),
    "slow tracker": (HASHED, ANYTHING, DIRECT, "comparing hashes", []),
    "slow tracker, insisted": (HASHED, PathWishes(STREAM), STREAM, "insists", ["path.stream"]),
    "no shared memory": (UNSHARED, ANYTHING, STREAM, "not shared memory", ["path.stream"]),
    "no tracker": (UNTRACKED, ANYTHING, STREAM, "no write tracker", ["path.stream"]),
    "stream, insisted": (FACTS, PathWishes(STREAM), STREAM, "the caller insists", ["path.stream"]),
    "direct, insisted": (FACTS, PathWishes(DIRECT), DIRECT, "the caller insists", []),
    "direct, impossible": (UNSHARED, PathWishes(DIRECT), "", "not shared memory", ["path.unavailable"]),
    "direct, no tracker": (UNTRACKED, PathWishes(DIRECT), "", "no write tracker", []),
    "stream, older host": (older(FACTS), PathWishes(STREAM), "", "take in", ["path.unavailable"]),
    "neither": (older(UNSHARED), ANYTHING, "", "take in", ["path.unavailable"]),
    "no tracker, older host": (older(UNTRACKED), ANYTHING, "", "no write tracker", []),
    "a kind without stream": (replace(FACTS, kind="microvm"), PathWishes(STREAM), "", "no migration stream",
                              ["path.unavailable"]),
    "the same, no tracker": (replace(UNTRACKED, kind="microvm"), ANYTHING, "", "no write tracker", []),
    "bytes, direct": (FACTS, BYTES, DIRECT, "pagemap-scan", []),
    "bytes, unshared": (UNSHARED, BYTES, STREAM, "not shared", ["path.stream", "verify.unavailable"]),
    "bytes, stream": (FACTS, PathWishes(STREAM, compare_bytes=True), STREAM, "insists",
                      ["path.stream", "verify.unavailable"]),
    "a tracker, insisted": (UNTRACKED, PathWishes(tracker="soft-dirty"), "", "no write tracker", []),
    "emulated": (
        replace(UNSHARED, streams_live=False), ANYTHING, STREAM, "not shared", ["path.stream", "path.not-live"]
    ),
    "only streams there": (replace(FACTS, receives=(STREAM,)), ANYTHING, STREAM, "directly", ["path.stream"]),
    "only streams there, insisted": (replace(FACTS, receives=(STREAM,)), PathWishes(DIRECT), "", "directly",
                                     ["path.unavailable"]),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_the_way_that_is_chosen(name: str) -> None:
    """Each combination gives exactly one way, or none, with its reason and its findings."""
    facts, wishes, path, words, findings = TABLE[name]
    choice = choose_path(facts, wishes)
    assert choice.path == path
    assert words in choice.reason
    assert [finding.id for finding in choice.findings] == findings
    blocking = [finding for finding in choice.findings if finding.severity is Severity.BLOCKS]
    assert all(finding.message and finding.object and finding.remedy for finding in blocking)


def test_a_report_names_the_way_and_needs_no_tracker_for_a_stream() -> None:
    """Where no tracker works a machine that streams still moves, and nothing about trackers blocks or warns."""
    offer = replace(QEMU_OFFER, protocol_versions=(2, 1), paths=(DIRECT, STREAM))
    report = compare(MACHINE, offer, [TrackerFact("hash", usable=False, reason="it may not read memory")])
    assert report.blocking == []
    assert (report.path, report.tracker, report.protocol_version) == (STREAM, "", 2)
    assert [finding.id for finding in report.findings] == ["encoding.chosen", "path.stream"]
    assert "it may not read memory" in report.path_reason


def test_an_earlier_release_is_sent_memory_as_before() -> None:
    """A destination that knows no ways is sent memory directly, in the version that it speaks."""
    report = compare(MACHINE, replace(QEMU_OFFER, protocol_versions=(1,)), TRACKERS)
    assert report.blocking == []
    assert (report.path, report.tracker, report.protocol_version) == (DIRECT, "pagemap-scan", 1)


def test_insisting_reaches_the_report() -> None:
    """What is insisted on and cannot be had blocks; so does comparing what cannot be compared."""
    offer = replace(QEMU_OFFER, protocol_versions=(2, 1), paths=(DIRECT, STREAM))
    assert compare(MACHINE, offer, TRACKERS, insist_on_path=STREAM).path == STREAM
    blocked = compare(MACHINE, offer, TRACKERS, insist_on_path=STREAM, compare_bytes=True).blocking
    assert [finding.id for finding in blocked] == ["verify.unavailable"]
    micro = compare(
        replace(MACHINE, kind="microvm", state_version=2, binary=""), OFFER, TRACKERS, insist_on_path=STREAM
    )
    assert "path.unavailable" in [finding.id for finding in micro.blocking]
