"""What the connections of this process have carried, by the kernel's own account.

Promise: only looked at, never touched: nothing is sent, and no option is set. What the kernel cannot tell, or what is
not Linux, is an empty answer. A connection counts as carrying while bytes that it sent are not acknowledged by the
other *kernel*, less the time in which that had no room for more: how busy the processors of either end are does not
matter, so that a short burst says how fast the way between them is.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_FOLDER: Final = Path("/proc/self/fd")
_FIELDS: Final = struct.Struct("120xQ40xQQ")
"""Of ``struct tcp_info``: bytes_acked, busy_time, rwnd_limited; what lies between them is skipped."""
_SEARCH_S: Final = 1.0
"""A connection that is reopened is found after so long."""
_INTERNET: Final = (socket.AF_INET, socket.AF_INET6)


@dataclass(frozen=True)
class Carried:
    """What one connection has carried since it was opened."""

    acked_bytes: int
    carrying_s: float


@dataclass(frozen=True)
class End:
    """Where a connection is."""

    own: str
    """With its port."""
    peer: str
    """Without it."""


class Connections:
    """Looks at the connections of this process now and then; used by one thread at a time."""

    def __init__(self) -> None:
        self._known: list[int] = []
        self._searched_s = float("-inf")

    def look(self) -> Mapping[End, Carried]:
        """All that there are to other hosts, or to this one."""
        now = time.monotonic()
        found = {}
        if now - self._searched_s < _SEARCH_S:
            found = {end: carried for end, carried in map(_ask, self._known) if end is not None}
        if len(found) < max(1, len(self._known)):
            self._searched_s = now
            asked = {number: _ask(number) for number in _numbers()}
            self._known = [number for number, (end, _) in asked.items() if end is not None]
            found = {end: carried for end, carried in asked.values() if end is not None}
        return found


def _numbers() -> list[int]:
    try:
        return [int(entry.name) for entry in _FOLDER.iterdir()]
    except OSError:
        return []


_NOTHING: Final = (None, Carried(0, 0.0))


def _ask(number: int) -> tuple[End | None, Carried]:
    """About one file descriptor, which may be anything, or closed by now."""
    try:
        connection = socket.socket(fileno=number)
    except OSError:
        return _NOTHING
    try:
        if connection.family not in _INTERNET or connection.type != socket.SOCK_STREAM:
            return _NOTHING
        own, peer = connection.getsockname(), connection.getpeername()
        told = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _FIELDS.size)
        acked_bytes, busy_us, waiting_us = _FIELDS.unpack(told)
    except (OSError, struct.error):
        return _NOTHING
    finally:
        connection.detach()  # it is somebody else's, and stays open
    return End(str(own), str(peer[0])), Carried(acked_bytes, (busy_us - waiting_us) / 1e6)
