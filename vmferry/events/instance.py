"""The instance document: what a guest can learn about its own machine.

Promise: every primitive is a string, and what is not known is an empty one, as Azure documents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

VERSIONS: Final = (
    "2017-03-01", "2017-04-02", "2017-08-01", "2017-10-01", "2017-12-01", "2018-02-01", "2018-04-02", "2018-10-01",
    "2019-02-01", "2019-03-11", "2019-04-30", "2019-06-01", "2019-06-04", "2019-08-01", "2019-08-15", "2019-11-01",
    "2020-06-01", "2020-07-15", "2020-09-01", "2020-10-01", "2020-12-01", "2021-01-01", "2021-02-01", "2021-03-01",
    "2021-05-01", "2021-08-01", "2021-10-01", "2021-11-01", "2021-11-15", "2021-12-13", "2023-07-01", "2023-11-15",
    "2024-03-15", "2024-07-17", "2025-04-07",
)  # fmt: skip
"""Versions of the instance document; all of them get the same."""

_UNKNOWN: Final = (
    "azEnvironment", "location", "offer", "osType", "placementGroupId", "publisher", "resourceGroupName",
    "resourceId", "sku", "subscriptionId", "tags", "version", "vmScaleSetName", "vmSize", "zone",
)  # fmt: skip


@dataclass(frozen=True)
class Instance:
    """One machine, as its guest may know it."""

    name: str
    """What the guest is called in events, on every host."""
    vm_id: str
    macs: Sequence[str] = ()
    availability_set: str = ""


def document(instance: Instance) -> Mapping[str, object]:
    """The whole instance document."""
    compute: dict[str, object] = dict.fromkeys(_UNKNOWN, "")
    compute |= {
        "name": instance.name,
        "vmId": instance.vm_id,
        "provider": "vmferry",
        "platformFaultDomain": "0",
        "platformUpdateDomain": "0",
        "availabilitySet": instance.availability_set,
    }
    interfaces = [
        {
            "ipv4": {"ipAddress": [], "subnet": []},
            "ipv6": {"ipAddress": []},
            "macAddress": mac.replace(":", "").upper(),
        }
        for mac in instance.macs
    ]
    return MappingProxyType({"compute": dict(sorted(compute.items())), "network": {"interface": interfaces}})
