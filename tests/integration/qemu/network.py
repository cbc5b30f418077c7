"""A network of namespaces: two hosts with a bridge each, a switch between them, and this process at a third port.

::

    host a: tap0 ─ br0 ─┐
    host b: tap0 ─ br0 ─┴─ switch ── this process
"""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.integration.services import Place
from tests.support import require

TAP = "tap0"
GUEST = "198.18.77.10"
_CLIENT = "198.18.77.3"
_HOSTS = {"a": "198.18.77.1", "b": "198.18.77.2"}
_PREFIX = 24


def ip(*command: str) -> None:
    """Run ``ip``; what it complains about is the failure."""
    subprocess.run(["ip", *command], check=True, capture_output=True, text=True)


@contextlib.contextmanager
def switched_hosts() -> Iterator[dict[str, Place]]:
    """The places of hosts a and b; everything is removed at the end."""
    require(os.geteuid() == 0, "only root can make network namespaces")
    require(Path("/dev/net/tun").exists(), "no /dev/net/tun")
    mark = secrets.token_hex(3)
    switch, places = f"vf-{mark}-s", {name: Place(_HOSTS[name], f"vf-{mark}-{name}") for name in _HOSTS}
    spaces = [switch, *(place.namespace for place in places.values())]
    with contextlib.ExitStack() as stack:
        for space in spaces:
            ip("netns", "add", space)
            stack.callback(ip, "netns", "del", space)
        _bridge(switch)
        for name, place in places.items():
            _bridge(place.namespace)
            ip("-n", place.namespace, "tuntap", "add", TAP, "mode", "tap")
            ip(
                "link",
                "add",
                "up0",
                "netns",
                place.namespace,
                "type",
                "veth",
                "peer",
                f"to-{name}",
                "netns",
                switch,
            )
            ip("-n", place.namespace, "address", "add", f"{place.address}/{_PREFIX}", "dev", "br0")
            for port in (TAP, "up0"):
                _plug_in(place.namespace, port)
            _plug_in(switch, f"to-{name}")
        # Its other end goes with the namespace of the switch.
        client = f"vf-{mark}"
        ip("link", "add", client, "type", "veth", "peer", "to-client", "netns", switch)
        _plug_in(switch, "to-client")
        ip("address", "add", f"{_CLIENT}/{_PREFIX}", "dev", client)
        ip("link", "set", client, "up")
        yield places


def _bridge(namespace: str) -> None:
    ip("-n", namespace, "link", "add", "br0", "type", "bridge", "forward_delay", "0")
    ip("-n", namespace, "link", "set", "br0", "up")


def _plug_in(namespace: str, port: str) -> None:
    ip("-n", namespace, "link", "set", port, "master", "br0")
    ip("-n", namespace, "link", "set", port, "up")
