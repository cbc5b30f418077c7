"""Each finding about a machine, its processor, its memory, the hosts and their networks is told when it should be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from tests.unit.negotiation.samples import DAY_S, GIB, HERE, NOW_S, OFFER, QEMU, QEMU_OFFER, TRACKERS
from vmferry.negotiation.about_cpu import MOST_NAMED, about_cpu
from vmferry.negotiation.about_host import (
    about_certificates,
    about_clocks,
    about_kernels,
    about_memory,
    about_room,
    about_software,
)
from vmferry.negotiation.about_machine import about_kind, about_parts, about_state
from vmferry.negotiation.about_network import about_network
from vmferry.negotiation.facts import BackingOffer, Device, KindOffer, MachineFacts, Network, TrackerFact
from vmferry.negotiation.findings import Finding, Severity

NOTE, WARNS, BLOCKS = Severity.NOTE, Severity.WARNS, Severity.BLOCKS


def told(findings: Iterator[Finding]) -> list[tuple[str, Severity]]:
    """Names and severities; whatever is more than a note says what to do."""
    found = list(findings)
    assert all(one.object and one.message for one in found)
    assert all(one.remedy for one in found if one.severity > NOTE)
    return [(one.id, one.severity) for one in found]


@pytest.mark.parametrize(
    ("changes", "expected", "words"),
    [
        ({}, "", ""),
        ({"running": False, "alive": False}, "machine.dead", "has ended"),
        (
            {"running": False, "unreachable": "no answer within 10 s"},
            "machine.unreachable",
            "no answer within 10 s",
        ),
        ({"running": False, "status": "paused"}, "machine.not-running", "is paused"),
        ({"running": True, "status": "suspended"}, "machine.not-running", "is asleep"),
        ({"running": False, "status": "shutdown"}, "machine.not-running", "switched itself off"),
        ({"running": False, "status": "inmigrate"}, "machine.not-running", "still arriving"),
        ({"running": False, "status": "something new"}, "machine.not-running", "something new"),
        ({"running": False}, "machine.not-running", "is not running"),
        ({"running": False, "status": "io-error"}, "machine.failed", "disks failed"),
        ({"running": False, "status": "guest-panicked"}, "machine.failed", "panicked"),
        ({"running": False, "status": "internal-error"}, "machine.failed", "inside its hypervisor"),
    ],
)
def test_a_machine_that_does_not_run_is_told_as_what_it_is(
    changes: dict[str, Any], expected: str, words: str
) -> None:
    """Dead, unreachable, paused and broken are four findings with words of their own, one at a time."""
    found = list(about_state(replace(QEMU, **changes)))
    assert [one.id for one in found] == ([expected] if expected else [])
    assert all(words in one.message for one in found)


NIC = Device("nic0", "virtio-net-pci")
DESCRIBED = replace(QEMU, described_devices=("nic0",), found_devices=(NIC,))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"found_devices": (NIC, Device("rng", "virtio-rng-pci"))}, "device rng"),
        ({"found_devices": ()}, "nic0 is gone"),
        ({"found_vcpus": 3}, "3 processors instead of 2"),
        ({"found_memory_bytes": 2 * GIB}, "2048 MiB of memory instead of 1024"),
    ],
)
def test_what_was_plugged_by_hand_is_told(changes: dict[str, Any], words: str) -> None:
    """More or fewer devices, processors and memory than described block, and are named."""
    (found,) = about_parts(replace(DESCRIBED, **changes))
    assert (found.id, found.severity) == ("machine.differs", BLOCKS)
    assert words in found.message


def test_what_is_as_described_or_not_known_is_not_told() -> None:
    """Neither a machine that is what it should be, nor one that does not say, is called different."""
    same = replace(DESCRIBED, found_vcpus=QEMU.vcpus, found_memory_bytes=QEMU.memory_bytes)
    assert told(about_parts(same)) == []
    assert told(about_parts(replace(DESCRIBED, found_devices=None))) == []


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("vfio-pci", "device.vfio"),
        ("vhost-user-blk-pci", "device.vhost-user"),
        ("vhost-user-fs-pci", "device.vhost-user"),
        ("virtio-net-pci", ""),
    ],
)
def test_devices_that_write_memory_unseen_are_told_by_their_type(kind: str, expected: str) -> None:
    """Also when the description says them; the object is the device and its type."""
    machine = replace(QEMU, described_devices=("x",), found_devices=(Device("x", kind),))
    found = list(about_parts(machine))
    assert [(one.id, one.object) for one in found] == ([(expected, f"x ({kind})")] if expected else [])


def test_a_network_back_end_in_another_process_is_told() -> None:
    """A device that looks harmless may be served elsewhere."""
    machine = replace(DESCRIBED, foreign_backends=(Device("net0", "vhost-user"),))
    assert told(about_parts(machine)) == [("device.vhost-user", BLOCKS)]


@pytest.mark.parametrize(
    ("here", "there", "expected"),
    [
        ("8.2.1", "8.2.0", []),
        ("8.2.1", "8.1.0", [("hypervisor.older", WARNS)]),
        ("7.2.0", "10.0.2", []),
        ("10.0.2", "7.2.22", [("hypervisor.older", WARNS)]),
        ("7.2.0", "7.1.0", [("hypervisor.too-old", BLOCKS), ("hypervisor.older", WARNS)]),
        ("6.0.0", "7.2.0", [("hypervisor.too-old", BLOCKS)]),
        ("", "7.2.0", []),
    ],
)
def test_releases_of_the_hypervisor(here: str, there: str, expected: list[tuple[str, Severity]]) -> None:
    """Back to an older release warns, and one that is too old for vmferry blocks at either end."""
    kinds = (KindOffer("qemu", there, 3, 3, "/usr/bin/qemu"),)
    assert told(about_kind(replace(QEMU, hypervisor_version=here), replace(OFFER, kinds=kinds))) == expected


LEAF_1_ECX = (1, 0, "ECX")
HT = {(1, 0, "EDX"): 1 << 28}


@pytest.mark.parametrize(
    ("here", "there", "expected"),
    [
        (None, {LEAF_1_ECX: 1}, []),
        ({LEAF_1_ECX: 1}, None, []),
        ({LEAF_1_ECX: 1}, {LEAF_1_ECX: 1}, []),
        ({LEAF_1_ECX: 0b11}, {LEAF_1_ECX: 0b01}, ["cpu.features-missing"]),
        ({LEAF_1_ECX: 0b01}, {LEAF_1_ECX: 0b11}, ["cpu.features-extra"]),
        ({LEAF_1_ECX: 0b01}, {}, ["cpu.features-missing"]),
        ({LEAF_1_ECX: 0b01}, {LEAF_1_ECX: 0b10}, ["cpu.features-missing", "cpu.features-extra"]),
        (HT, {}, []),
    ],
)
def test_the_guest_must_not_lose_a_feature(
    here: dict[tuple[int, int, str], int] | None,
    there: dict[tuple[int, int, str], int] | None,
    expected: list[str],
) -> None:
    """What it sees must be there; more is a note; what a side does not tell, or counts processors by, is nothing."""
    found = told(about_cpu(replace(QEMU, cpuid=here), replace(OFFER, cpuid=there)))
    assert [name for name, _ in found] == expected
    assert all(severity is (BLOCKS if name.endswith("missing") else NOTE) for name, severity in found)


def test_lost_features_are_named() -> None:
    """By their usual name where they have one, by leaf, register and bit always, and not by the dozen."""
    here = {LEAF_1_ECX: 1 << 25, (0x40000001, 0, "EAX"): 1 << 3, (7, 2, "EDX"): 1}
    (found,) = about_cpu(replace(QEMU, cpuid=here), replace(OFFER, cpuid={}))
    assert "aes (CPUID 0x1 ECX bit 25)" in found.message
    assert "CPUID 0x40000001 EAX bit 3" in found.message
    assert "CPUID 0x7.2 EDX bit 0" in found.message
    (found,) = about_cpu(replace(QEMU, cpuid={LEAF_1_ECX: 0xFFFFFFFF}), replace(OFFER, cpuid={}))
    assert found.message.count("bit") == MOST_NAMED
    assert f"and {32 - MOST_NAMED} more" in found.message


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({"draining": True}, [("host.draining", BLOCKS)]),
        ({"cpus": 1}, [("host.cpus", WARNS)]),
        ({"cpus": 0}, []),
        ({"incoming_migrations": 2}, [("host.full", WARNS)]),
        ({"machine_names": ("web",)}, [("machine.name-taken", BLOCKS)]),
        ({"held_machine_ids": (QEMU.machine_id,)}, [("machine.already-there", BLOCKS)]),
    ],
)
def test_room_at_the_destination(changes: dict[str, Any], expected: list[tuple[str, Severity]]) -> None:
    """A host that is emptied, full, too small or not free of this very machine says so."""
    assert told(about_room(QEMU, replace(QEMU_OFFER, **changes))) == expected


HUGE = replace(QEMU, memory_backing="hugetlbfs", memory_page_bytes=2 << 20)


@pytest.mark.parametrize(
    ("machine", "backings", "expected"),
    [
        (QEMU, [], []),
        (QEMU, [BackingOffer("tmpfs", 4096, 2 * GIB)], []),
        (QEMU, [BackingOffer("memfd", 4096, 2 * GIB)], ["memory.backing"]),
        (QEMU, [BackingOffer("tmpfs", 65536, 2 * GIB)], ["memory.page-size"]),
        (HUGE, [], ["memory.backing"]),
        (HUGE, [BackingOffer("hugetlbfs", 2 << 20, GIB)], []),
        (HUGE, [BackingOffer("hugetlbfs", 2 << 20, GIB - 1)], ["memory.backing"]),
        (HUGE, [BackingOffer("hugetlbfs", 1 << 30, 4 * GIB)], ["memory.page-size"]),
        (replace(QEMU, memory_bytes=3 * GIB), [], ["memory.insufficient"]),
        (
            replace(QEMU, memory_bytes=3 * GIB, memory_backing="memfd"),
            [BackingOffer("memfd", 4096, 3 * GIB)],
            [],
        ),
        (replace(HUGE, memory_page_bytes=0), [BackingOffer("hugetlbfs", 1 << 30, GIB)], []),
        (replace(HUGE, memory_bytes=3 * GIB), [BackingOffer("hugetlbfs", 2 << 20, 3 * GIB)], []),
    ],
)
def test_memory_must_be_of_the_same_kind_and_enough(
    machine: MachineFacts, backings: list[BackingOffer], expected: list[str]
) -> None:
    """Kind, page size and amount are told apart; a host that lists none has tmpfs; huge pages count by themselves."""
    found = told(about_memory(machine, replace(OFFER, memory_backings=backings)))
    assert found == [(name, BLOCKS) for name in expected]


@pytest.mark.parametrize(
    ("here", "there", "expected"),
    [
        ("6.12.1", "6.12.1", []),
        ("6.12.1", "6.12.2", [("kernel.differs", NOTE)]),
        ("6.12.1", "6.18.0-rc1", [("kernel.differs", NOTE)]),
        ("6.12.1", "6.6.9", [("kernel.older", NOTE)]),
        ("", "6.6.9", []),
        ("6.12.1", "", []),
    ],
)
def test_kernels_are_compared(here: str, there: str, expected: list[tuple[str, Severity]]) -> None:
    """Another kernel is worth knowing; one that does not say what it is, is not guessed about."""
    assert told(about_kernels(replace(HERE, kernel=here), replace(OFFER, kernel=there))) == expected


def test_a_slow_way_back_is_told() -> None:
    """A destination that cannot track writes directly takes the machine in, and lets it go slowly or not at all."""
    assert told(about_kernels(HERE, replace(OFFER, trackers=TRACKERS))) == []
    slow = [
        TrackerFact("pagemap-scan", usable=False, reason="no"),
        TrackerFact("hash", usable=True, reason="ok"),
    ]
    for trackers in (slow, slow[:1]):
        offer = replace(OFFER, trackers=trackers)
        assert told(about_kernels(HERE, offer)) == [("tracker.way-back", WARNS)]


@pytest.mark.parametrize(
    ("at_s", "expected"),
    [
        (NOW_S, []),
        (NOW_S + 1.0, []),
        (NOW_S - 1.0, []),
        (NOW_S + 1.2, [("clock.skew", WARNS)]),
        (NOW_S - 1.2, [("clock.skew", WARNS)]),
        (0.0, []),
    ],
)
def test_clocks_that_are_apart_are_told(at_s: float, expected: list[tuple[str, Severity]]) -> None:
    """Only what the time of the call cannot explain counts, and a host that does not tell the time is not blamed."""
    found = list(about_clocks(QEMU, HERE, replace(OFFER, at_s=at_s)))
    assert told(iter(found)) == expected
    if found:
        assert ("ahead of" if at_s > NOW_S else "behind") in found[0].message


@pytest.mark.parametrize(
    ("accelerator", "there", "expected"),
    [("kvm", "hpet", [WARNS]), ("tcg", "hpet", [NOTE]), ("kvm", "tsc", []), ("kvm", "", [])],
)
def test_another_clock_source_matters_to_a_guest_that_reads_it(
    accelerator: str, there: str, expected: list[Severity]
) -> None:
    """A guest under KVM reads the host's counter; an emulated one has its own."""
    found = about_clocks(replace(QEMU, accelerator=accelerator), HERE, replace(OFFER, clock_source=there))
    assert told(found) == [("clock.source", severity) for severity in expected]


@pytest.mark.parametrize(
    ("left_s", "predicted_s", "expected"),
    [
        (30 * DAY_S, 0.0, []),
        (DAY_S - 1, 0.0, [WARNS]),
        (126.0, 0.0, [WARNS]),
        (124.0, 0.0, [BLOCKS]),
        (126.0, 120.0, [BLOCKS]),
        (-5.0, 0.0, [BLOCKS]),
        (2 * DAY_S, 3 * DAY_S, [BLOCKS]),
    ],
)
def test_certificates_must_last(left_s: float, predicted_s: float, expected: list[Severity]) -> None:
    """Either host's must outlive migration, switch and a minute; within a day of its end it warns."""
    machine, end = replace(QEMU, predicted_total_s=predicted_s), HERE.answered_at_s + left_s
    wanted = [("certificate.expires", severity) for severity in expected]
    ours, theirs = replace(HERE, certificate_expires_at_s=end), replace(OFFER, certificate_expires_at_s=end)
    for here, offer in ((ours, OFFER), (HERE, theirs)):
        found = list(about_certificates(machine, here, offer, switch_s=5.0))
        assert told(iter(found))[: len(wanted)] == wanted
    unknown = replace(HERE, certificate_expires_at_s=0.0)
    assert (
        told(about_certificates(machine, unknown, replace(OFFER, certificate_expires_at_s=0.0), switch_s=5))
        == []
    )


def test_another_release_of_vmferry_is_worth_knowing() -> None:
    """It is a note with both versions."""
    (found,) = about_software(HERE, replace(OFFER, software_version="0.2.0"))
    assert (found.id, found.severity) == ("software.differs", NOTE)
    assert "0.1.0" in found.message
    assert "0.2.0" in found.message
    assert list(about_software(HERE, OFFER)) == []


TAP = Network("tap0", "br0", 1500)


@pytest.mark.parametrize(
    ("here", "there", "expected"),
    [
        (TAP, TAP, []),
        (None, TAP, []),
        (TAP, replace(TAP, mtu_bytes=9000), []),
        (TAP, replace(TAP, mtu_bytes=1400), [("network.mtu", BLOCKS)]),
        (TAP, replace(TAP, bridge="br1"), [("network.bridge", WARNS)]),
        (TAP, replace(TAP, bridge=""), [("network.bridge", WARNS)]),
        (replace(TAP, bridge=""), TAP, [("network.bridge", WARNS)]),
        (None, replace(TAP, up=False), [("network.down", WARNS)]),
        (
            TAP,
            Network("tap0", "", 1400, up=False),
            [("network.down", WARNS), ("network.mtu", BLOCKS), ("network.bridge", WARNS)],
        ),
    ],
)
def test_networks_are_compared(
    here: Network | None, there: Network, expected: list[tuple[str, Severity]]
) -> None:
    """Bridge, packet size and being switched on are each told, with the command that mends it."""
    found = list(about_network("qemu.nics[0].tap", here, there))
    assert told(iter(found)) == expected
    assert all(one.remedy.startswith("ip link set tap0 ") for one in found)
