"""What puts an end to a migration from outside, as errors: its deadline; and the one answer that does not end it.

Promise: a deadline is by this host's clock, and counts until the hand-off begins, never afterwards.
"""

from __future__ import annotations

from datetime import UTC, datetime

from vmferry.errors import TimedOutError, TooManyMigrationsError
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


def has_no_room(error: BaseException) -> bool:
    """Whether a destination takes in as many migrations as it may, and may have room later."""
    return isinstance(error, TooManyMigrationsError) and error.metadata.get("limit") == "max_incoming"
