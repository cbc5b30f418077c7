"""The journal of a fleet's update: one line for each step, on disk before what follows from it.

Promise: a line that was cut short by the end of its writer is left out when it is read, and removed before the next
one is written; a journal of another plan is refused; two runs cannot write one journal.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from vmferry.errors import ConfigError
from vmferry.fleet.plan import Plan
from vmferry.fleet.rollout import Entry, InvalidEntryError, Kind, Progress, evolve, folded

_FORMAT = 1


class Journal:
    """One that is open for writing, in a ``with`` block.

    Raises:
        ConfigError: it cannot be opened, is in use, is damaged, or belongs to another plan.
    """

    def __init__(self, path: Path, plan: Plan) -> None:
        self._path = path
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise _unusable(path, error.strerror or str(error)) from error
        try:
            self._lock()
            text, whole = read(path, plan)
            self.progress: Progress = text
            os.ftruncate(self._fd, whole)
            os.lseek(self._fd, 0, os.SEEK_END)
            if not whole:
                self._append({"format": _FORMAT, "plan": plan.digest})
                _sync_folder(path.parent)
        except BaseException:
            os.close(self._fd)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)

    def write(self, entry: Entry) -> None:
        """Add a line; it is on disk when this returns."""
        progress = evolve(self.progress, entry)
        said = {key: value for key, value in dataclasses.asdict(entry).items() if value}
        self._append(said)
        self.progress = progress

    def _append(self, said: dict[str, object]) -> None:
        data = json.dumps(said).encode() + b"\n"
        written = os.write(self._fd, data)
        if written != len(data):
            raise _unusable(self._path, "a line could not be written whole")
        os.fsync(self._fd)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise _unusable(self._path, "another update is using it") from error


def read(path: Path, plan: Plan) -> tuple[Progress, int]:
    """What a journal says, and how many of its bytes are whole lines; nothing and 0 if there is none.

    Raises:
        ConfigError: it is damaged, or belongs to another plan.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return Progress(), 0
    except OSError as error:
        raise _unusable(path, error.strerror or str(error)) from error
    whole = data.rfind(b"\n") + 1
    lines = data[:whole].splitlines()
    if not lines:
        return Progress(), 0
    try:
        head = json.loads(lines[0])
        if head["format"] != _FORMAT:
            raise _unusable(path, f"its format {head['format']!r} is not known here")
        if head["plan"] != plan.digest:
            raise _unusable(path, "it belongs to another plan, or the plan was changed since")
        return folded(_entries(lines[1:])), whole
    except (ValueError, KeyError, TypeError, InvalidEntryError) as error:
        raise _unusable(path, f"it is damaged: {error!r}") from error


def _entries(lines: list[bytes]) -> Iterator[Entry]:
    for line in lines:
        said = json.loads(line)
        yield Entry(**(said | {"kind": Kind(said["kind"])}))


def _unusable(path: Path, why: str) -> ConfigError:
    return ConfigError(
        f"the journal {path} cannot be used: {why}",
        field="--journal",
        remedy="Name another file to begin anew; look at the hosts first, an update of them may be half done.",
    )


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
