"""Every finding that a compatibility report can hold: its stable name and how much it may matter.

Promise: vmferry tells no finding that is not listed here, and none with another severity; docs/compatibility.md has a
row for each. Names are never given another meaning. A destination of another release may tell more than is listed.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final


class Severity(enum.IntEnum):
    """How much a finding matters; the values are those of ``vmferry.v1.Severity``."""

    NOTE = 1
    WARNS = 2
    BLOCKS = 3


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    severity: Severity
    id: str
    message: str
    object: str
    remedy: str


_NOTE: Final = (Severity.NOTE,)
_WARNS: Final = (Severity.WARNS,)
_BLOCKS: Final = (Severity.BLOCKS,)

FINDINGS: Final[Mapping[str, tuple[Severity, ...]]] = {
    "accelerator.unavailable": _BLOCKS,
    "certificate.expires": (Severity.WARNS, Severity.BLOCKS),
    "clock.skew": _WARNS,
    "clock.source": (Severity.NOTE, Severity.WARNS),
    "cpu.features-extra": _NOTE,
    "cpu.features-missing": _BLOCKS,
    "device.vfio": _BLOCKS,
    "device.vhost-user": _BLOCKS,
    "disk.identity": _BLOCKS,
    "disk.image": _BLOCKS,
    "disk.no-access": _BLOCKS,
    "disk.not-shared": _BLOCKS,
    "disk.replaced": _BLOCKS,
    "disk.space": _WARNS,
    "encoding.chosen": _NOTE,
    "encoding.no-common": _BLOCKS,
    "encoding.unavailable": _BLOCKS,
    "file.differs": _BLOCKS,
    "file.missing": _BLOCKS,
    "file.not-regular": _BLOCKS,
    "file.outside-roots": _BLOCKS,
    "file.unverified": _WARNS,
    "host.cpus": _WARNS,
    "host.draining": _BLOCKS,
    "host.full": _WARNS,
    "hypervisor.not-allowed": _BLOCKS,
    "hypervisor.older": _WARNS,
    "hypervisor.too-old": _BLOCKS,
    "kernel.differs": _NOTE,
    "kernel.older": _NOTE,
    "machine.already-there": _BLOCKS,
    "machine.busy": _BLOCKS,
    "machine.dead": _BLOCKS,
    "machine.differs": _BLOCKS,
    "machine.failed": _BLOCKS,
    "machine.kind-unsupported": _BLOCKS,
    "machine.name-taken": _BLOCKS,
    "machine.not-migratable": _BLOCKS,
    "machine.not-owned": _BLOCKS,
    "machine.not-running": _BLOCKS,
    "machine.state-version": _BLOCKS,
    "machine.type-unsupported": _BLOCKS,
    "machine.unreachable": _BLOCKS,
    "machine.unresolved": _BLOCKS,
    "memory.backing": _BLOCKS,
    "memory.insufficient": _BLOCKS,
    "memory.page-size": _BLOCKS,
    "network.bridge": _WARNS,
    "network.down": _WARNS,
    "network.missing": _BLOCKS,
    "network.mtu": _BLOCKS,
    "network.not-allowed": _BLOCKS,
    "path.not-live": _WARNS,
    "path.stream": _NOTE,
    "path.unavailable": _BLOCKS,
    "prediction.unavailable": _NOTE,
    "protocol.no-common-version": _BLOCKS,
    "protocol.old": _WARNS,
    "software.differs": _NOTE,
    "tracker.hash": _NOTE,
    "tracker.none": _BLOCKS,
    "tracker.pagemap-scan": _NOTE,
    "tracker.slow": _WARNS,
    "tracker.soft-dirty": _NOTE,
    "tracker.unavailable": _BLOCKS,
    "tracker.way-back": _WARNS,
    "verify.unavailable": _BLOCKS,
}
"""Names, and how severe each may be."""


def finding(
    name: str, message: str, about: str, remedy: str = "", *, severity: Severity | None = None
) -> Finding:
    """A finding of this release.

    Args:
        name: its name in the catalogue.
        message: what was found, with both sides' values, as a sentence.
        about: what it was found on.
        remedy: what a person can type or do about it.
        severity: how much it matters; may be left out where there is no choice.
    """
    possible = FINDINGS[name]
    chosen = possible[0] if severity is None else severity
    assert chosen in possible, name
    assert severity is not None or len(possible) == 1, name
    assert remedy or chosen is Severity.NOTE, name
    return Finding(chosen, name, message, about, remedy)
