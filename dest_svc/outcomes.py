"""How attempts to bring a machine here come out, as metrics count them: with a reason, of a fixed set.

Promise: each attempt that was accepted is counted once when it comes out, ``owned`` or ``refused``; one that was not
even accepted is counted as ``turned_away`` each time it asks. Whatever the other host says, there are no more reasons
than the catalogue of errors has, and those below.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Final

from vmferry.errors import (
    HashMismatchError,
    HostDrainingError,
    InsufficientMemoryError,
    MachineDeadError,
    ServiceStoppingError,
    TicketInvalidError,
    TimedOutError,
    TooManyMigrationsError,
    VmferryError,
    catalogue,
)
from vmferry.handoff import destination
from vmferry.handoff.states import RecordKind
from vmferry.telemetry.metrics import count_arrival

TURNED_AWAY: Final = "turned_away"
COPY_LOST: Final = "COPY_LOST"
"""The copy could not be used, for a reason that has no name of its own."""
CLOSED_BY_SOURCE: Final = "CLOSED_BY_SOURCE"
"""The source gave the migration up, for a reason that is not known here."""
NEVER_BEGUN: Final = "NEVER_BEGUN"
"""The source asked about an attempt that never came here, and it is closed for good."""
NEWER_ATTEMPT: Final = "NEWER_ATTEMPT"
_COUNTED: Final = (RecordKind.OWNED, RecordKind.REFUSED)
_AT_ZERO: Final = {
    "owned": ("",),
    "refused": (
        *(COPY_LOST, CLOSED_BY_SOURCE, NEVER_BEGUN, NEWER_ATTEMPT),
        *(HashMismatchError.reason, InsufficientMemoryError.reason, MachineDeadError.reason),
        *(ServiceStoppingError.reason, TimedOutError.reason),
    ),
    TURNED_AWAY: (
        *(HostDrainingError.reason, InsufficientMemoryError.reason, TooManyMigrationsError.reason),
        TicketInvalidError.reason,
    ),
}


def begin_at_zero() -> None:
    """Let the usual series exist before their first event, so that the first one is seen as an increase."""
    for outcome, reasons in _AT_ZERO.items():
        for reason in reasons:
            count_arrival(outcome, reason, times=0)


def count_record(kind: RecordKind, event: destination.DestinationEvent, reason: str) -> None:
    """A record is on disk: count it if it ends an attempt.

    Args:
        kind: of the record.
        event: what it was written because of.
        reason: what is known better than the event.
    """
    if kind in _COUNTED:
        count_arrival(kind.name.lower(), "" if kind is RecordKind.OWNED else reason or reason_of(event))


def reason_of(event: destination.DestinationEvent) -> str:
    """Why an attempt is refused because of an event."""
    match event:
        case destination.CloseAsked(reason=why):  # "NOT_CONVERGING: the guest writes ..."
            name = why.partition(":")[0]
            return name if name in catalogue() else CLOSED_BY_SOURCE
        case destination.Stalled():
            return TimedOutError.reason
        case destination.StatusAsked():
            return NEVER_BEGUN
        case destination.BeginAsked():
            return NEWER_ATTEMPT
        case _:
            return COPY_LOST


def reason_of_error(error: BaseException) -> str:
    """Why an attempt is refused because something failed here."""
    if isinstance(error, TimeoutError):
        return TimedOutError.reason
    return error.reason if isinstance(error, VmferryError) else COPY_LOST


@contextlib.contextmanager
def turned_away() -> Iterator[None]:
    """Count what is refused meanwhile, before there is anything to be closed."""
    try:
        yield
    except VmferryError as error:
        count_arrival(TURNED_AWAY, error.reason)
        raise
