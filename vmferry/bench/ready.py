"""Waiting until hosts have the memory ready that they keep for newcomers, so that every migration finds the same."""

from __future__ import annotations

import asyncio
import time
from typing import Final

from vmferry.cli.demo_hosts import Shore
from vmferry.errors import TimedOutError
from vmferry.machines.readymemory import filling_files, ready_files

_POLL_S: Final = 0.05
_QUIET_S: Final = 1.5
"""Longer than a host takes to begin with a file that it has memory for."""
_LIMIT_S: Final = 120.0


async def settled(here: Shore, there: Shore) -> None:
    """Return when the host to go to has all that it is to keep, and no host is busy with filling.

    The host that the guest is on may lack memory for what it is to keep: both are one computer.

    Raises:
        TimedOutError: the memory cannot be had in time.
    """
    deadline = time.monotonic() + _LIMIT_S
    quiet_since = time.monotonic()
    while time.monotonic() < deadline:
        states = [await asyncio.to_thread(_state, shore) for shore in (here, there)]
        if any(filling for _, filling in states):
            quiet_since = time.monotonic()
        (here_full, _), (there_full, _) = states
        if there_full and (here_full or time.monotonic() - quiet_since > _QUIET_S):
            return
        await asyncio.sleep(_POLL_S)
    raise TimedOutError(f"host {there.host.name} has not got its memory ready within {_LIMIT_S:.0f} s")


def _state(shore: Shore) -> tuple[bool, bool]:
    """Whether a host has all files that it is to keep, and whether it is filling one."""
    config = shore.host.config
    return ready_files(config.ram_dir) == sorted(config.ready_memory_mib), filling_files(config.ram_dir) > 0
