"""One service per role and journal directory: two of them could not both know what is written.

Promise: as long as one is held, no other process gets it; it is let go of when its process ends, however it ends.
"""

from __future__ import annotations

from pathlib import Path

from vmferry.errors import ConfigError
from vmferry.handoff.disk import Disk, damaging


class RoleLock:
    """Held by the one service of a role."""

    def __init__(self, path: Path, role: str, disk: Disk) -> None:
        try:
            with damaging("lock", path):
                self._lock = disk.lock(path, wait=False)
        except BlockingIOError as error:
            raise ConfigError(
                f"another {role} service runs on {path.parent}",
                field="state_dir",
                remedy="Stop the other one first.",
            ) from error

    def close(self) -> None:
        """Let another process have the role; safe to call twice."""
        self._lock.close()
