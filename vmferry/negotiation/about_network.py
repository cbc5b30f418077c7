"""Findings about a network interface: the source's against the destination's of the same name."""

from __future__ import annotations

from collections.abc import Iterator

from vmferry.negotiation.facts import Network
from vmferry.negotiation.findings import Finding, finding


def about_network(field: str, here: Network | None, there: Network) -> Iterator[Finding]:
    """What the guest would notice of its new interface.

    Args:
        field: the field of the description that names it.
        here: the source's, if it told.
        there: the destination's.
    """
    if not there.up:
        yield finding(
            "network.down",
            f"{there.tap} is switched off at the destination: the guest would be cut off until somebody switches "
            "it on",
            field,
            f"ip link set {there.tap} up",
        )
    if here is None:
        return
    if here.mtu_bytes > there.mtu_bytes:
        yield finding(
            "network.mtu",
            f"{here.tap} carries packets of {here.mtu_bytes} bytes here, and of {there.mtu_bytes} at the "
            "destination: larger ones would be lost without a word",
            field,
            f"ip link set {there.tap} mtu {here.mtu_bytes}",
        )
    if here.bridge != there.bridge:
        yield finding(
            "network.bridge",
            f"{here.tap} is plugged into {here.bridge or 'no bridge'} here, and into "
            f"{there.bridge or 'no bridge'} at the destination",
            field,
            f"ip link set {there.tap} master {here.bridge}"
            if here.bridge
            else f"ip link set {there.tap} nomaster",
        )
