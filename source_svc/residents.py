"""The machines that are on this host, as often as somebody looks.

Promise: looking costs next to nothing while nothing changes: a folder's names and times, and no description is read.
A machine that goes on in another process is here all the time, also when one has ended and the next is not known.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Final

from vmferry.machines.directory import MachineDirectory, MachineRecord

LOOK_S: Final = 0.2
"""How soon a machine that has come, or has gone, is noticed."""


class Residents:
    """What the last look found."""

    def __init__(self, directory: MachineDirectory, *, between: Callable[[str], bool]) -> None:
        """``between`` says whether a machine is on its way from one process to another."""
        self._directory = directory
        self._between = between
        self._seen: object = None
        self.records: Mapping[str, MachineRecord] = {}
        """By identity; those whose process has ended for good are left out."""

    def look(self) -> bool:
        """Look again; true if something is not as it was."""
        seen = self._times()
        gone = [one for one in self.records.values() if one.process is None or not one.process.alive()]
        if seen == self._seen and not gone:
            return False
        self._seen = seen
        alive = self._alive()
        missing = self.records.keys() - alive.keys()
        between = {machine_id for machine_id in missing if self._between(machine_id)}
        if missing - between:  # or on its way until a moment ago, and its new process known since
            alive = self._alive()
        self.records = {machine_id: self.records[machine_id] for machine_id in between} | alive
        return True

    def _alive(self) -> dict[str, MachineRecord]:
        return {one.spec.uuid: one for one in self._directory.list() if one.alive}

    def _times(self) -> object:
        try:
            with os.scandir(self._directory.root) as entries:
                return sorted(
                    (entry.name, entry.stat(follow_symlinks=False).st_mtime_ns) for entry in entries
                )
        except FileNotFoundError:  # nothing was ever here, or one goes right now
            return None
