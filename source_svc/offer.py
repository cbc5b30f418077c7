"""A destination's answer as facts to be compared.

Promise: what an older destination does not say stays unknown; what a newer one says beyond is taken as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from google.protobuf.timestamp_pb2 import Timestamp

from vmferry.negotiation.facts import BackingOffer, KindOffer, Offer, TrackerFact
from vmferry.negotiation.findings import Finding, Severity
from vmferry.v1 import compatibility_pb2, handoff_pb2

# Older destinations send only what blocks.
_SEVERITIES: Final = {severity.value: severity for severity in Severity}


def offer_from_message(answer: handoff_pb2.NegotiateResponse, own: Sequence[Finding] = ()) -> Offer:
    """What the destination offers, and what it found wrong, behind what was found here about the machine's files."""
    offer = answer.offer
    told = {(found.id, found.object) for found in own}
    theirs = [_finding(item) for item in answer.items if (item.id, item.object) not in told]
    return Offer(
        host=offer.host,
        software_version=offer.software_version,
        protocol_versions=list(offer.protocol_versions),
        kinds=[_kind(kind) for kind in offer.kinds],
        available_memory_bytes=offer.available_memory_bytes,
        page_size_bytes=offer.page_size_bytes,
        encodings=list(offer.encodings),
        incoming_migrations=offer.incoming_migrations,
        max_incoming_migrations=offer.max_incoming_migrations,
        machine_names=list(offer.machine_names),
        held_machine_ids=list(offer.held_machine_ids),
        refusals=[*own, *theirs],
        draining=offer.draining,
        cpus=offer.cpus,
        kernel=offer.kernel,
        clock_source=offer.clock_source,
        at_s=_seconds(offer.time),
        certificate_expires_at_s=_seconds(offer.certificate_expire_time),
        trackers=[TrackerFact(found.kind, found.usable, found.reason) for found in offer.trackers],
        memory_backings=_backings(offer.memory_backings),
        paths=list(offer.paths),
        stream_encodings=list(offer.stream_encodings),
        cpuid={(word.leaf, word.subleaf, word.register): word.bits for word in answer.cpuid} or None,
    )


def _kind(kind: compatibility_pb2.MachineKindOffer) -> KindOffer:
    return KindOffer(
        kind.kind,
        kind.version,
        kind.oldest_state_version,
        kind.newest_state_version,
        binary=kind.binary,
        machine_types=tuple(kind.machine_types),
        accelerators=tuple(kind.accelerators),
    )


def _finding(item: compatibility_pb2.CompatibilityItem) -> Finding:
    severity = _SEVERITIES.get(item.severity, Severity.BLOCKS)
    return Finding(severity, item.id, item.message, item.object, item.remedy)


def _backings(messages: Iterable[compatibility_pb2.MemoryBackingOffer]) -> list[BackingOffer]:
    return [BackingOffer(one.name, one.page_size_bytes, one.available_bytes) for one in messages]


def _seconds(time: Timestamp) -> float:
    """Since the epoch; 0 if it was not said."""
    return time.seconds + time.nanos / 1e9
