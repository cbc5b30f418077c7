"""Where the two hosts of a comparison are, and what has crossed between them.

::

    no limit:   [ hosts a and b, over loopback ] ─ this process
    N Mbit/s:   [ host a ]─ data, shaped both ways ─[ host b ]      this process ─ a, this process ─ b

In brackets: network namespaces of their own, so that nothing but migrations is counted on ``data`` or loopback.
Promise: what is made here is removed again. Without root there is only the computer's own loopback, and what others
send there counts, too.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vmferry.bench.commands import COMMAND_S, run
from vmferry.cli.demo_hosts import HERE, Place
from vmferry.errors import InvalidArgumentError

NETWORK: Final = "198.18"
"""For measuring between networks (RFC 2544), and so in nobody's way."""

_DATA: Final = {"a": f"{NETWORK}.76.1", "b": f"{NETWORK}.76.2"}
_LATENCY_MS: Final = 50
_MIN_BURST_BYTES: Final = 128 * 1024
"""More than the largest segment that TCP hands down at once."""
_BURST_S: Final = 0.002
_ALL_TRAFFIC: Final = Path("/proc/net/dev")


@dataclass(frozen=True)
class Network:
    """Places for hosts a and b."""

    places: Mapping[str, Place]
    counters: tuple[tuple[str, str], ...]
    """Namespace and interface at which everything that crosses is sent."""
    link_mbit: int | None = None

    @property
    def name(self) -> str:
        """What it is called in a table."""
        return f"{self.link_mbit} Mbit/s" if self.link_mbit else "loopback"

    @property
    def own(self) -> bool:
        """Whether only migrations are counted."""
        return all(namespace for namespace, _ in self.counters)

    def wire_bytes(self) -> int:
        """What was sent so far, with all headers."""
        return sum(_sent(namespace, interface) for namespace, interface in self.counters)


@contextlib.contextmanager
def opened(link_mbit: int | None) -> Iterator[Network]:
    """A network that exists until the end.

    Raises:
        InvalidArgumentError: it takes rights or programs that are not there.
    """
    if link_mbit and not _may():
        raise InvalidArgumentError(
            "a link of a given rate needs root, the right to make network namespaces, and ip and tc",
            field="--link-mbit",
            remedy="Be root (in a container: with NET_ADMIN and SYS_ADMIN); on Debian: apt install iproute2.",
        )
    mark = secrets.token_hex(2)
    with contextlib.ExitStack() as undo:
        if link_mbit:
            yield _shaped(undo, mark, link_mbit)
        elif _may():
            yield _loopback(undo, mark)
        else:
            yield Network({"a": HERE, "b": HERE}, (("", "lo"),))


def _may() -> bool:
    """Whether namespaces can be made; root in a container may lack the right."""
    if os.geteuid() != 0 or not all(shutil.which(tool) for tool in ("ip", "tc", "unshare")):
        return False
    tried = subprocess.run(
        ["unshare", "--net", "--mount", "true"],  # noqa: S607 - wherever the system has it
        check=False,
        capture_output=True,
        timeout=COMMAND_S,
    )
    return tried.returncode == 0


def _loopback(undo: contextlib.ExitStack, mark: str) -> Network:
    namespace, address = _namespace(undo, mark, 1)
    place = Place(
        listen="0.0.0.0",  # noqa: S104 - in a network of its own
        reached_at=address,
        within=("ip", "netns", "exec", namespace),
    )
    return Network({"a": place, "b": place}, ((namespace, "lo"),))


def _shaped(undo: contextlib.ExitStack, mark: str, link_mbit: int) -> Network:
    spaces, places = {}, {}
    for number, name in enumerate(_DATA, start=1):
        spaces[name], address = _namespace(undo, mark, number)
        places[name] = Place(
            listen="0.0.0.0",  # noqa: S104 - in a network of its own
            reached_at=address,
            data_at=_DATA[name],
            within=("ip", "netns", "exec", spaces[name]),
        )
    _ip("link", "add", "data", "netns", spaces["a"], "type", "veth", "peer", "data", "netns", spaces["b"])
    burst = max(_MIN_BURST_BYTES, int(link_mbit * 1e6 / 8 * _BURST_S))
    for name, space in spaces.items():
        _ip("-n", space, "address", "add", f"{_DATA[name]}/24", "dev", "data")
        _ip("-n", space, "link", "set", "data", "up")
        shape = f"tbf rate {link_mbit}mbit burst {burst}b latency {_LATENCY_MS}ms"
        _run("tc", "-n", space, "qdisc", "add", "dev", "data", "root", *shape.split())
    return Network(places, tuple((space, "data") for space in spaces.values()), link_mbit)


def _namespace(undo: contextlib.ExitStack, mark: str, number: int) -> tuple[str, str]:
    """A namespace that this process reaches at an address."""
    name, outside = f"vfb-{mark}-{number}", f"vfb{mark}{number}"
    _ip("netns", "add", name)
    undo.callback(_ip, "netns", "del", name)
    # Each run has a network of its own, as several may be under way.
    network = f"{NETWORK}.{80 + number}.{int(mark[:2], 16) // 4 * 4}".rsplit(".", 1)
    base, low = network[0], int(network[1])
    _ip("link", "add", outside, "type", "veth", "peer", "orders", "netns", name)
    undo.callback(_remove_link, outside)
    _ip("address", "add", f"{base}.{low + 1}/30", "dev", outside)
    _ip("link", "set", outside, "up")
    _ip("-n", name, "address", "add", f"{base}.{low + 2}/30", "dev", "orders")
    for interface in ("orders", "lo"):
        _ip("-n", name, "link", "set", interface, "up")
    return name, f"{base}.{low + 2}"


def _remove_link(name: str) -> None:
    # It goes with its other end, as soon as the kernel gets around to removing the namespace.
    subprocess.run(  # noqa: S603 - fixed program, arguments made here
        ["ip", "link", "del", name],  # noqa: S607 - wherever the system has it
        check=False,
        capture_output=True,
        timeout=COMMAND_S,
    )


def _sent(namespace: str, interface: str) -> int:
    if not namespace:
        line = next(line for line in _ALL_TRAFFIC.read_text().splitlines() if f"{interface}:" in line)
        return int(line.split(":", 1)[1].split()[8])
    (found,) = json.loads(
        _run("ip", "-n", namespace, "-json", "-statistics", "link", "show", "dev", interface)
    )
    return int(found["stats64"]["tx"]["bytes"])


def _ip(*command: str) -> str:
    return _run("ip", *command)


def _run(*command: str) -> str:
    return run(*command, option="--link-mbit")
