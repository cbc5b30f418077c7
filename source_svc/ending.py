"""What puts an end to a migration from outside: its deadline.

Promise: a deadline is by this host's clock, and counts until the hand-off begins, never afterwards.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime

from vmferry.errors import TimedOutError, VmferryError
from vmferry.v1 import migration_pb2 as pb


def seconds_left(options: pb.MigrationOptions) -> float:
    """How long there is until the deadline, which must be set; 0 if it is over."""
    left = options.deadline.ToDatetime(tzinfo=UTC) - datetime.now(UTC)
    return max(0.0, left.total_seconds())


def check_deadline(options: pb.MigrationOptions) -> None:
    """Refuse to begin what had to be over by now.

    Raises:
        TimedOutError: its deadline has passed.
    """
    if options.HasField("deadline") and not seconds_left(options):
        raise deadline_passed(options)


def deadline_passed(options: pb.MigrationOptions) -> TimedOutError:
    """Why a migration was given up that was not handed off in time."""
    return TimedOutError(
        f"it was not handed off by its deadline, {options.deadline.ToJsonString()}",
        field="options.deadline",
        remedy="Start it again with a later deadline, or a higher priority.",
        limit="deadline",
    )


class Deadline:
    """The deadline of a migration that is under way, which may be changed."""

    def __init__(self, end: Callable[[VmferryError], None]) -> None:
        """``end`` is called with the reason when it passes."""
        self._end = end
        self._timer: asyncio.TimerHandle | None = None

    def keep(self, options: pb.MigrationOptions) -> None:
        """From now on this is the deadline, if there is one."""
        self.cancel()
        if options.HasField("deadline"):
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(seconds_left(options), lambda: self._end(deadline_passed(options)))

    def cancel(self) -> None:
        """It does not count any more."""
        if self._timer is not None:
            self._timer.cancel()
