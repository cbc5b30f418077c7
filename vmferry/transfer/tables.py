"""The table of what a machine's pages hold, as a service keeps it.

Promise: however large the machine, the service needs no more than 12 MiB of memory for it; the rest lies on the disk
of the host. Where that has no room, the table takes memory after all, and the log says so.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from vmferry.memory.digest import PageTable
from vmferry.memory.shelf import Shelf
from vmferry.telemetry.logs import get_logger

_LOG: Final = get_logger(__name__)


def page_table(page_count: int, state_dir: Path) -> PageTable:
    """One that notes every page as zero."""

    def refused(error: OSError) -> None:
        _LOG.warning(
            "digests of pages are kept in memory, as the disk does not take them",
            folder=str(state_dir),
            detail=error.strerror,
        )

    return PageTable(page_count, Shelf(state_dir, refused))
