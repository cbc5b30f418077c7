"""Moments at which a test ends or holds a service: named places on the way of a migration.

Promise: without ``VMFERRY_FAILPOINTS`` in the environment, reaching a place does nothing at all. With it, such as
``source.recorded.handed-off=kill`` or ``dest.verified=stop@2``, the process sends itself SIGKILL or SIGSTOP, at the
second time it comes by in the latter case; nothing of the code around is asked or told. A name that does not exist is
refused when the service starts, so that no test waits for a place that was renamed.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from vmferry.errors import ConfigError

VARIABLE: Final = "VMFERRY_FAILPOINTS"

SOURCE: Final = (
    "source.recorded.begun",
    "source.accepted",
    "source.tracking",
    "source.round-sent",
    "source.paused",
    "source.last-round-sent",
    "source.state-saved",
    "source.recorded.sealed",
    "source.ready-heard",
    "source.recording.handed-off",
    "source.recorded.handed-off",
    "source.outcome-heard",
    "source.recorded.done",
    "source.released",
    "source.recording.aborted",
    "source.recorded.aborted",
    "source.resumed",
)
DESTINATION: Final = (
    "dest.recorded.accepted",
    "dest.copy-started",
    "dest.frame-taken",
    "dest.loaded",
    "dest.verified",
    "dest.recorded.prepared",
    "dest.recording.owned",
    "dest.recorded.owned",
    "dest.resumed",
    "dest.recorded.ran",
    "dest.released",
    "dest.recording.refused",
    "dest.recorded.refused",
    "dest.discarded",
)
"""In the order in which a migration comes by; the last ones of each only when it fails."""
UPDATE: Final = (
    "update.recorded.begun",
    "update.started",
    "update.paused",
    "update.state-saved",
    "update.loaded",
    "update.recorded.switched",
    "update.answered",
    "update.resumed",
    "update.adopted",
    "update.recorded.done",
    "update.recorded.undone",
    "update.new-ended",
    "update.given-back",
)
"""The same of an update in place, at the source service."""

_ACTIONS: Final = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


@dataclass
class _Failpoint:
    """What is to happen at one place."""

    number: signal.Signals
    passes_left: int


def parse(text: str) -> dict[str, _Failpoint]:
    """Read the variable's value.

    Raises:
        ConfigError: there is no such place or action.
    """
    found = {}
    for item in filter(None, text.split(";")):
        name, _, action = item.partition("=")
        action, _, times = action.partition("@")
        if name not in (*SOURCE, *DESTINATION, *UPDATE):
            raise ConfigError(f"there is no failpoint {name!r}", field=VARIABLE)
        if action not in _ACTIONS or not (times or "1").isdecimal():
            raise ConfigError(
                f"{item!r} is not NAME=kill or NAME=stop, with @TIMES if wanted", field=VARIABLE
            )
        found[name] = _Failpoint(_ACTIONS[action], int(times or 1))
    return found


_active: dict[str, _Failpoint] = {}


def activate(environment: Mapping[str, str]) -> None:
    """Take the failpoints of this process from its environment; called once, when a service starts."""
    _active.update(parse(environment.get(VARIABLE, "")))


def reach(name: str) -> None:
    """Note that the process has come to a place; it may not return."""
    if not _active or (found := _active.get(name)) is None:
        return
    found.passes_left -= 1
    if not found.passes_left:
        os.kill(os.getpid(), found.number)
