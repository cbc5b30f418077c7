"""Why an arrival failed, as metrics count it: a fixed set of reasons, whatever the other host says."""

from __future__ import annotations

import pytest

from dest_svc import outcomes
from vmferry.errors import InsufficientMemoryError
from vmferry.handoff import destination
from vmferry.handoff.states import Attempt

ATTEMPT = Attempt(
    "6d0c3f5e-7a38-4a51-9a57-0f3e6a1c9b11",
    b"m" * 16,
    1,
    1,
    "spiffe://t/vmhost/a",
    "spiffe://t/vmhost/b",
    "one",
)


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        (destination.CloseAsked(ATTEMPT, "NOT_CONVERGING: the guest writes too fast"), "NOT_CONVERGING"),
        (destination.CloseAsked(ATTEMPT, "WHATEVER_SOMEBODY_SAYS: x"), outcomes.CLOSED_BY_SOURCE),
        (destination.CloseAsked(ATTEMPT, ""), outcomes.CLOSED_BY_SOURCE),
        (destination.Stalled(), "TIMED_OUT"),
        (destination.StatusAsked(ATTEMPT), outcomes.NEVER_BEGUN),
        (destination.CopyLost("gone", tail_certain=True), outcomes.COPY_LOST),
    ],
)
def test_every_end_has_a_reason(event: destination.DestinationEvent, reason: str) -> None:
    """By what happened; a source's word counts only where the catalogue of errors knows it."""
    assert outcomes.reason_of(event) == reason


def test_a_failure_here_has_the_reason_of_its_error() -> None:
    """Of the catalogue, or that the copy was lost."""
    assert outcomes.reason_of_error(InsufficientMemoryError("too little")) == "INSUFFICIENT_MEMORY"
    assert outcomes.reason_of_error(TimeoutError()) == "TIMED_OUT"
    assert outcomes.reason_of_error(OSError()) == outcomes.COPY_LOST
