"""A machine and a destination that fit each other, for tests to spoil one thing of."""

from __future__ import annotations

from vmferry.negotiation.facts import HostFacts, KindOffer, MachineFacts, Offer, TrackerFact

GIB = 1 << 30
DAY_S = 24 * 3600.0
NOW_S = 1_800_000_000.0

MACHINE = MachineFacts(
    name="web",
    machine_id="7d1c0b1e-0000-4000-8000-000000000001",
    kind="microvm",
    state_version=2,
    memory_bytes=GIB,
    vcpus=1,
    running=True,
    owned=True,
    migrating=False,
)
OFFER = Offer(
    host="spiffe://example.org/vmhost/b",
    software_version="0.1.0",
    protocol_versions=(2, 1),
    kinds=(KindOffer("microvm", "unicorn 2.1.4", 1, 2),),
    available_memory_bytes=2 * GIB,
    page_size_bytes=4096,
    encodings=("none",),
    incoming_migrations=0,
    max_incoming_migrations=2,
    machine_names=(),
    held_machine_ids=(),
    cpus=2,
    kernel="6.12.1",
    clock_source="tsc",
    at_s=NOW_S,
    certificate_expires_at_s=NOW_S + 30 * DAY_S,
)
TRACKERS = [
    TrackerFact("pagemap-scan", usable=True, reason="saw one write"),
    TrackerFact("soft-dirty", usable=False, reason="this kernel lacks it"),
    TrackerFact("hash", usable=True, reason="compares contents"),
]
HERE = HostFacts(
    host="spiffe://example.org/vmhost/a",
    software_version="0.1.0",
    kernel="6.12.1",
    clock_source="tsc",
    certificate_expires_at_s=NOW_S + 30 * DAY_S,
    asked_at_s=NOW_S - 0.1,
    answered_at_s=NOW_S + 0.1,
)
"""The source, which was answered within 0.2 s."""

QEMU = MachineFacts(
    name="web",
    machine_id=MACHINE.machine_id,
    kind="qemu",
    state_version=3,
    memory_bytes=GIB,
    vcpus=2,
    running=True,
    owned=True,
    migrating=False,
    binary="/usr/bin/qemu",
    hypervisor_version="8.2.1",
    accelerator="tcg",
)
QEMU_KIND = KindOffer("qemu", "8.2.0", 3, 3, "/usr/bin/qemu", ("pc-q35-8.2",), ("tcg",))
QEMU_OFFER = Offer(**{**vars(OFFER), "kinds": (*OFFER.kinds, QEMU_KIND)})
