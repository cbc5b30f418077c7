"""What a service lets be seen of itself, whoever looks: metrics, or the web page.

Promise: looking changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from vmferry.v1.machine_pb2 import Machine
from vmferry.v1.migration_pb2 import Migration


@dataclass(frozen=True)
class Arriving:
    """A machine that this host is receiving."""

    machine: str
    machine_id: str
    migration_id: str
    source: str
    """The host that it comes from."""
    memory_bytes: int
    reserved_bytes: int
    """Memory that has been taken for it."""
    prepared: bool
    """It is here completely, and waits for the source's word."""
    silent_s: float
    """Since when nothing came from the source."""


class View(Protocol):
    """A service, as it is seen."""

    async def machines(self) -> Sequence[Machine]:
        """All machines of this host, and blocked ones of which only journals are left."""

    async def migrations(self, *, limit: int) -> Sequence[Migration]:
        """The newest migrations away from this host."""

    def open_migrations(self) -> Sequence[Migration]:
        """Those that have not ended; safe to call from any thread."""

    def arrivals(self) -> Sequence[Arriving]:
        """What this host is receiving; safe to call from any thread."""
