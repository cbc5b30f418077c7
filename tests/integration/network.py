"""A network of namespaces: two hosts with a bridge each, a switch between them, and this process at a third port.

::

    host a: tap0 ─ br0 ─┐
    host b: tap0 ─ br0 ─┴─ switch ── this process

Promise: the wires between hosts and switch can be cut, silenced, slowed and their connections broken by the kernel
itself, without anything between this process and the other hosts; namespaces and devices vanish at the end, however
it comes.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.integration.services import Place
from tests.support import require

TAP = "tap0"
UPLINK = "up0"
_HOSTS = {"a": 1, "b": 2}
_CLIENT, _GUEST = 3, 10
"""Last parts of addresses."""
_PREFIX = 24


def run(*command: str, check: bool = True) -> str:
    """Run a command; what it complains about is the failure. Returns what it says."""
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=20)
    assert not check or done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout


def ip(*command: str) -> None:
    """Run ``ip``."""
    run("ip", *command)


def tc(namespace: str, device: str, *queue: str) -> None:
    """Have a device of a namespace queue like this."""
    run("tc", "-n", namespace, "qdisc", "replace", "dev", device, *queue)


class Wire:
    """The cable between a host and the switch; what a test does to it is real, and undone by :meth:`heal`."""

    def __init__(self, switch: str, name: str, place: Place) -> None:
        self.place = place
        self._switch = switch
        self._port = f"to-{name}"
        self._mbit: int | None = None

    def unplug(self) -> None:
        """Pull it out; nothing goes either way, and only this host could notice."""
        ip("-n", self._switch, "link", "set", self._port, "down")

    def swallow(self, *, to_host: bool = True, from_host: bool = True) -> None:
        """Lose everything in a direction without a sign: a black hole."""
        for end, wanted in zip(self._ends, (to_host, from_host), strict=True):
            if wanted:
                tc(*end, "root", "blackhole")

    def swallow_from_port(self, port: int) -> None:
        """Lose what one connection brings to the host, and nothing of others: one path of several is dead."""
        namespace, device = self._ends[0]
        for part in (
            "qdisc replace dev {} root handle 1: htb default 1",
            "class replace dev {} parent 1: classid 1:1 htb rate 10gbit",
            "class replace dev {} parent 1: classid 1:2 htb rate 10gbit",
            "qdisc replace dev {} parent 1:2 blackhole",
            f"filter replace dev {{}} parent 1: protocol ip prio 1 u32 match ip sport {port} 0xffff flowid 1:2",
        ):
            run("tc", "-n", namespace, *part.format(device).split())

    def shape(self, mbit: int | None) -> None:
        """Let no more through than so many Mbit/s, either way; None: as much as there is."""
        self._mbit = mbit
        if mbit is not None:
            self.throttle(mbit)
            return
        for end in self._ends:
            run("tc", "-n", end[0], "qdisc", "del", "dev", end[1], "root", check=False)

    def throttle(self, mbit: int) -> None:
        """The same until it is healed."""
        for end in self._ends:
            # Such a queue holds 50 ms: more would only delay whatever else is on its way.
            tc(*end, "root", "tbf", "rate", f"{mbit}mbit", "burst", "64kb", "latency", "50ms")

    def reset(self, port: int | None = None) -> None:
        """Have the host's kernel break its TCP connections, or the one from this port: both ends see a reset."""
        chosen = ("dport", "=", f":{port}") if port else ()
        run(*self.place.command("ss", "-K", "-t", "src", self.place.address, *chosen))

    def ports(self, peer: Place) -> list[int]:
        """Where a peer's connections to this host come from; those with most to send first, as lanes are."""
        said = run(*peer.command("ss", "-H", "-t", "-n", "state", "established", "dst", self.place.address))
        found = [
            (int(line.split()[1]), int(line.split()[2].rpartition(":")[2])) for line in said.splitlines()
        ]
        return [port for _, port in sorted(found, reverse=True)]

    def heal(self) -> None:
        """Plug it in, and lose nothing any more; what :meth:`shape` has set stays."""
        ip("-n", self._switch, "link", "set", self._port, "up")
        self.shape(self._mbit)

    @property
    def _ends(self) -> tuple[tuple[str, str], tuple[str, str]]:
        """Where packets to the host, and from it, are queued: namespace and device."""
        return (self._switch, self._port), (self.place.namespace, UPLINK)


@dataclass(frozen=True)
class Network:
    """Where the hosts are, and the wires to them."""

    places: dict[str, Place]
    wires: dict[str, Wire]
    guest: str
    """An address for a guest."""


@contextlib.contextmanager
def switched_hosts(*, taps: bool = True) -> Iterator[Network]:
    """Hosts a and b, with a tap each or without; everything is removed at the end."""
    require(os.geteuid() == 0, "only root can make network namespaces")
    require(not taps or Path("/dev/net/tun").exists(), "no /dev/net/tun")
    mark = secrets.token_hex(3)
    net = _unused_net()
    switch = f"vf-{mark}-s"
    places = {name: Place(f"{net}.{number}", f"vf-{mark}-{name}") for name, number in _HOSTS.items()}
    spaces = [switch, *(place.namespace for place in places.values())]
    with contextlib.ExitStack() as stack:
        for space in spaces:
            ip("netns", "add", space)
            stack.callback(ip, "netns", "del", space)
        _bridge(switch)
        for name, place in places.items():
            _bridge(place.namespace)
            _connect(UPLINK, place.namespace, f"to-{name}", switch)
            ip("-n", place.namespace, "address", "add", f"{place.address}/{_PREFIX}", "dev", "br0")
            _plug_in(place.namespace, UPLINK)
            _plug_in(switch, f"to-{name}")
            if taps:
                ip("-n", place.namespace, "tuntap", "add", TAP, "mode", "tap")
                _plug_in(place.namespace, TAP)
        # Its other end goes with the namespace of the switch.
        client = f"vf-{mark}"
        ip("link", "add", client, "type", "veth", "peer", "to-client", "netns", switch)
        _plug_in(switch, "to-client")
        ip("address", "add", f"{net}.{_CLIENT}/{_PREFIX}", "dev", client)
        ip("link", "set", client, "up")
        wires = {name: Wire(switch, name, place) for name, place in places.items()}
        yield Network(places, wires, f"{net}.{_GUEST}")


def _unused_net() -> str:
    """The first parts of addresses, from the range for tests of networks, that no other test has at the moment."""
    taken = run("ip", "-o", "-4", "address")
    nets = (f"198.{18 + secrets.randbelow(2)}.{secrets.randbelow(256)}" for _ in range(1000))
    return next(net for net in nets if f" {net}." not in taken)


def _connect(end: str, namespace: str, other: str, its_namespace: str) -> None:
    ip("link", "add", end, "netns", namespace, "type", "veth", "peer", other, "netns", its_namespace)


def _bridge(namespace: str) -> None:
    ip("-n", namespace, "link", "add", "br0", "type", "bridge", "forward_delay", "0")
    ip("-n", namespace, "link", "set", "br0", "up")


def _plug_in(namespace: str, port: str) -> None:
    ip("-n", namespace, "link", "set", port, "master", "br0")
    ip("-n", namespace, "link", "set", port, "up")
