"""The network interfaces of this host that machines are plugged into, as the kernel tells of them."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from vmferry.negotiation.facts import Network

_INTERFACES: Final = Path("/sys/class/net")
_UP: Final = 1
"""IFF_UP: switched on by an administrator, whether or not anything is plugged in."""


def tap(name: str) -> Network | None:
    """A tap interface of this host; ``None`` if there is none of this name, or it is something else."""
    folder = _INTERFACES / name
    try:
        if not (folder / "tun_flags").exists():
            return None
        master = folder / "master"
        return Network(
            tap=name,
            bridge=master.readlink().name if master.is_symlink() else "",
            mtu_bytes=int((folder / "mtu").read_text(encoding="ascii")),
            up=bool(int((folder / "flags").read_text(encoding="ascii"), 16) & _UP),
        )
    except (OSError, ValueError):  # it went away meanwhile
        return None
