"""Boards on disk: one file for each machine, which survives the services of the host.

Promise: a file is read whole as it was written or not at all. One that is damaged is put aside and named in the log;
the machine gets a new board whose document has a number above all that were ever shown, because those grow by one at
a time and the new one is the time of day.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from pathlib import Path

from vmferry.errors import VmferryError
from vmferry.events import records
from vmferry.events.states import Board, merged
from vmferry.machines.paths import write_whole
from vmferry.telemetry.logs import get_logger

_LOG = get_logger(__name__)
Stamp = tuple[int, int, int]


class BoardFiles:
    """The boards below one folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, machine_id: str) -> Path:
        """Where a machine's board lies."""
        return self._folder / f"{machine_id}.json"

    def machines(self) -> list[str]:
        """The machines that have one."""
        return sorted(path.stem for path in self._folder.glob("*.json"))

    def stamp(self, machine_id: str) -> Stamp | None:
        """What changes whenever the file is written; None if there is none."""
        try:
            found = self.path(machine_id).stat()
        except FileNotFoundError:
            return None
        return found.st_mtime_ns, found.st_ino, found.st_size

    def load(self, machine_id: str) -> Board:
        """A machine's board; a new one if it has none, or if it cannot be read."""
        path = self.path(machine_id)
        try:
            return records.from_text(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return Board()
        except (ValueError, OSError) as error:
            _LOG.error("a board of events is damaged, and begun anew", path=str(path), detail=str(error))
            with contextlib.suppress(OSError):
                path.replace(path.with_suffix(".damaged"))
            return Board(incarnation=int(time.time()))

    def store(self, machine_id: str, board: Board) -> None:
        """Write a machine's board.

        It is not synced: a crash of the host that could take it takes the guest's memory, too, and with it whatever
        the guest knew of earlier documents.
        """
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_whole(self.path(machine_id), records.to_text(board))

    def arriving(self, machine_id: str, data: bytes) -> Board | None:
        """What to keep if a machine comes that brings this board along; one that makes no sense is left out."""
        if not data:
            return None
        try:
            if len(data) > records.MAX_BYTES:
                raise ValueError(f"{len(data)} bytes are too many")  # noqa: TRY301 - as what cannot be read
            board = records.from_text(data.decode())
            # What is over ended in the switch that is going on: by this host's clock, that is now.
            past = tuple(
                dataclasses.replace(one, ended_s=time.time()) if one.why == ARRIVING else one
                for one in board.ended
            )
            return merged(self.load(machine_id), dataclasses.replace(board, ended=past))
        except (ValueError, VmferryError) as error:
            _lost(machine_id, error)
            return None

    def take(self, machine_id: str, board: Board | None) -> None:
        """Keep such a board, now that the machine has come."""
        try:
            if board is not None:
                self.store(machine_id, board)
        except OSError as error:
            _lost(machine_id, error)


def _lost(machine_id: str, error: Exception) -> None:
    # A migration does not fail because its guest may be told of an event twice.
    _LOG.error("the events of a machine could not be taken over", machine=machine_id, detail=str(error))


ARRIVING = "the machine moved"
"""Why an event ended that moved its machine."""
