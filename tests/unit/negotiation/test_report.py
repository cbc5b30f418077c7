"""The compatibility report is whole, stable and truthful."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.unit.negotiation.samples import GIB, MACHINE, OFFER, QEMU, QEMU_KIND, QEMU_OFFER, TRACKERS
from vmferry.negotiation.encodings import ENCODINGS
from vmferry.negotiation.findings import Finding, Severity
from vmferry.negotiation.report import about_protocol, compare

REFUSAL = Finding(Severity.BLOCKS, "disk.not-shared", "the disk is local", "qemu.disks[0].path", "share it")

BLOCKING = {
    "protocol.no-common-version": (MACHINE, replace(OFFER, protocol_versions=(7, 8))),
    "memory.page-size": (MACHINE, replace(OFFER, page_size_bytes=65536)),
    "encoding.no-common": (MACHINE, replace(OFFER, encodings=("lzma",))),
    "machine.not-owned": (replace(MACHINE, owned=False), OFFER),
    "machine.busy": (replace(MACHINE, migrating=True), OFFER),
    "machine.not-running": (replace(MACHINE, running=False), OFFER),
    "machine.kind-unsupported": (MACHINE, replace(OFFER, kinds=())),
    "machine.state-version": (replace(MACHINE, state_version=3), OFFER),
    "memory.insufficient": (MACHINE, replace(OFFER, available_memory_bytes=GIB - 1)),
    "machine.already-there": (MACHINE, replace(OFFER, held_machine_ids=(MACHINE.machine_id,))),
    "machine.name-taken": (MACHINE, replace(OFFER, machine_names=("web",))),
    "machine.not-migratable": (replace(QEMU, blockers=("VFIO device",)), QEMU_OFFER),
    "disk.not-shared": (QEMU, replace(QEMU_OFFER, refusals=(REFUSAL,))),
}


def test_nothing_blocks_a_fitting_machine() -> None:
    """A machine that fits is compatible, with the best usable tracker, and notes about the others."""
    report = compare(MACHINE, OFFER, TRACKERS)
    assert report.blocking == []
    assert (report.protocol_version, report.tracker) == (2, "pagemap-scan")
    assert [(found.severity, found.id) for found in report.findings] == [
        (Severity.NOTE, "encoding.chosen"),
        (Severity.NOTE, "tracker.soft-dirty"),
    ]


@pytest.mark.parametrize("expected", BLOCKING)
def test_each_mismatch_blocks_by_its_own_name(expected: str) -> None:
    """Each mismatch gives exactly its own blocking finding, with a remedy and the object concerned."""
    machine, offer = BLOCKING[expected]
    blocking = compare(machine, offer, TRACKERS).blocking
    assert [finding.id for finding in blocking] == [expected]
    assert blocking[0].remedy
    assert blocking[0].object
    assert blocking[0].message


@pytest.mark.parametrize(
    ("there", "told"),
    [("8.2.0", []), ("9.0.0", []), ("8.1.5", ["hypervisor.older"]), ("7.2.22", ["hypervisor.older"])],
)
def test_an_older_hypervisor_is_told(there: str, told: list[str]) -> None:
    """A release that is older by its first two numbers warns; a newer one, or another patch of the same, does not."""
    offer = replace(OFFER, kinds=(replace(QEMU_KIND, version=there),))
    report = compare(QEMU, offer, TRACKERS)
    assert report.blocking == []
    assert [found.id for found in report.findings if found.severity is Severity.WARNS] == told


def test_another_binary_of_the_same_kind_is_not_the_machines() -> None:
    """A machine that names a binary needs that one; the destination's own words about it are not repeated."""
    refusal = replace(REFUSAL, id="machine.kind-unsupported")
    offer = replace(OFFER, kinds=(replace(QEMU_KIND, binary="/opt/qemu"),), refusals=(refusal,))
    assert [found.id for found in compare(QEMU, offer, TRACKERS).blocking] == ["machine.kind-unsupported"]


@pytest.mark.parametrize(
    ("takes", "wish", "blocked", "encodings"),
    [
        ((), "auto", [], ("none",)),
        ((), "none", [], ("none",)),
        ((), "zstd", ["encoding.unavailable"], ("none",)),
        (("zstd", "lz4", "none"), "auto", [], ("zstd", "lz4", "none")),
        (("zstd", "lz4", "none"), "lz4", [], ("lz4", "none")),
        (("lz4", "none"), "zstd", ["encoding.unavailable"], ("none",)),
    ],
)
def test_a_stream_travels_as_the_destination_takes_streams(
    takes: tuple[str, ...], wish: str, blocked: list[str], encodings: tuple[str, ...]
) -> None:
    """What it takes pages as says nothing about streams: one of an older release takes these as they are."""
    offer = replace(
        OFFER, kinds=(QEMU_KIND,), encodings=ENCODINGS, paths=("direct", "stream"), stream_encodings=takes
    )
    report = compare(QEMU, offer, TRACKERS, insist_on_path="stream", insist_on_encoding=wish)
    assert report.path == "stream"
    assert [found.id for found in report.blocking] == blocked
    assert tuple(report.encodings) == encodings


def test_a_full_destination_only_warns() -> None:
    """A migration waits for room, so a destination without any does not make it impossible."""
    report = compare(MACHINE, replace(OFFER, incoming_migrations=2), TRACKERS)
    assert report.blocking == []
    assert [found.id for found in report.findings if found.severity is Severity.WARNS] == ["host.full"]


def test_all_mismatches_are_named_at_once() -> None:
    """The report never stops at the first finding."""
    worst = replace(MACHINE, owned=False, migrating=True, running=False, memory_bytes=9 * GIB)
    offer = replace(OFFER, protocol_versions=(), encodings=(), machine_names=("web",), incoming_migrations=5)
    found = {finding.id for finding in compare(worst, offer, []).blocking}
    assert found == {
        "protocol.no-common-version",
        "encoding.no-common",
        "machine.not-owned",
        "machine.busy",
        "machine.not-running",
        "memory.insufficient",
        "machine.name-taken",
        "tracker.none",
    }


def test_the_blocking_findings_come_first() -> None:
    """Whoever reads from the top sees what must be removed before what is merely worth knowing."""
    severities = [
        found.severity for found in compare(replace(MACHINE, running=False), OFFER, TRACKERS).findings
    ]
    assert severities == sorted(severities, reverse=True)


def test_a_tracker_that_is_insisted_on_and_missing_blocks() -> None:
    """Insisting on a tracker never falls back silently to another."""
    report = compare(MACHINE, OFFER, TRACKERS, insist_on_tracker="soft-dirty")
    assert [found.id for found in report.blocking] == ["tracker.unavailable"]
    assert "this kernel lacks it" in report.blocking[0].message
    assert report.tracker == ""


def test_the_slow_tracker_warns() -> None:
    """Falling back to comparing contents is said, not hidden."""
    report = compare(MACHINE, OFFER, [TRACKERS[1], TRACKERS[2]])
    assert report.tracker == "hash"
    assert [found.id for found in report.findings if found.severity is Severity.WARNS] == ["tracker.slow"]


def test_an_older_protocol_is_told_with_what_it_costs() -> None:
    """With only an older version in common, both sides' versions and what is lost are named; a newer peer is fine."""
    offer = replace(OFFER, protocol_versions=(1,))
    (told,) = about_protocol((2, 1), offer)
    assert (told.id, told.severity) == ("protocol.old", Severity.WARNS)
    assert "version 2 and version 1" in told.message
    assert "cannot be read from outside" in told.message
    assert list(about_protocol((2, 1), replace(offer, protocol_versions=(3, 2)))) == []
    assert list(about_protocol((1,), replace(offer, protocol_versions=(2, 1)))) == []


def test_what_the_destination_warns_of_does_not_block() -> None:
    """The severity that the destination gives to its own findings stays."""
    warning = Finding(Severity.WARNS, "network.bridge", "another bridge", "qemu.nics[0].tap", "plug it")
    report = compare(MACHINE, replace(OFFER, refusals=(warning, warning)), TRACKERS)
    assert report.blocking == []
    assert [found for found in report.findings if found.severity is Severity.WARNS] == [warning, warning]
