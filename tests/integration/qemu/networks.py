"""Tap interfaces and bridges of tests, and a host that has others of the same names.

Promise: what is made here is removed again; names begin with ``vfplan``, and what a killed run left is removed first.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator

from tests.integration.services import Service

BRIDGE = "vfplanbr"
OTHER = "vfplan"


@contextlib.contextmanager
def tap_interfaces(*names: str) -> Iterator[None]:
    """Taps that are switched on and plugged into a bridge of their own."""
    with contextlib.ExitStack() as undo:
        _made(undo, f"ip link add {BRIDGE} type bridge", f"ip link del {BRIDGE}")
        for name in names:
            _made(undo, f"ip tuntap add {name} mode tap", f"ip link del {name}")
            run(f"ip link set {name} master {BRIDGE} up")
        yield


@contextlib.contextmanager
def other_interfaces(service: Service, *commands: str) -> Iterator[None]:
    """Have a service see the interfaces of another network, made by these commands, from its next start on.

    Its connections stay where they are: only what the kernel tells of interfaces under /sys is of the other network.
    """
    with contextlib.ExitStack() as undo:
        _made(undo, f"ip netns add {OTHER}", f"ip netns del {OTHER}")
        for command in commands:
            run(f"ip netns exec {OTHER} {command}")
        mount = f"nsenter --net=/run/netns/{OTHER} mount -t sysfs sysfs /sys"
        service.within = ("unshare", "--mount", "sh", "-c", f'{mount} && exec "$@"', "sh")
        undo.callback(setattr, service, "within", ())
        yield


def run(command: str) -> None:
    """Run a command that must succeed."""
    subprocess.run(command.split(), check=True, capture_output=True, timeout=20)


def _made(undo: contextlib.ExitStack, make: str, remove: str) -> None:
    # What a run that was killed left behind is in the way.
    subprocess.run(remove.split(), check=False, capture_output=True, timeout=20)
    run(make)
    undo.callback(run, remove)
