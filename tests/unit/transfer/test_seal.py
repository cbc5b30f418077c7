"""The seal covers everything that is handed over."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vmferry.handoff.states import Attempt
from vmferry.transfer.seal import seal_digest

ATTEMPT = Attempt("m", b"i" * 16, 1, 1, "s", "d", "x", "y")
PARTS = {"memory_root": b"r" * 16, "device_state": b"state", "spec_digest": b"p" * 32}


@pytest.mark.parametrize("part", PARTS)
def test_the_seal_depends_on_every_part(part: str) -> None:
    """No part may differ unnoticed."""
    assert seal_digest(ATTEMPT, **PARTS) != seal_digest(ATTEMPT, **(PARTS | {part: PARTS[part] + b"!"}))


@pytest.mark.parametrize(
    "other",
    [
        replace(ATTEMPT, machine_id="n"),
        replace(ATTEMPT, migration_id=b"j" * 16),
        replace(ATTEMPT, number=2),
        replace(ATTEMPT, epoch_from=2),
    ],
)
def test_the_seal_is_of_one_attempt(other: Attempt) -> None:
    """The same memory sealed for another attempt has another digest."""
    assert seal_digest(ATTEMPT, **PARTS) != seal_digest(other, **PARTS)
