"""The states of a source, and an operator who wants the guest back."""

from __future__ import annotations

from typing import Final

from tests.unit.handoff.samples import ADMIN, DIGEST, attempt
from vmferry.handoff.source import Begun, ForceReclaim, HandedOff, Quiet, Sealed, SourceState

MINE: Final = attempt()
STATES: Final[dict[str, SourceState]] = {
    "quiet": Quiet(),
    "begun": Begun(MINE),
    "sealed": Sealed(MINE, DIGEST),
    "handed-off": HandedOff(MINE, DIGEST),
}


def force(
    *,
    operator: str = ADMIN,
    evidence: str = "power is off",
    memory: bool = True,
    with_memory: bool | None = None,
    moved_on: bool = False,
) -> ForceReclaim:
    """An operator wants the guest back."""
    return ForceReclaim(
        operator,
        evidence,
        memory_intact=memory,
        with_memory=memory if with_memory is None else with_memory,
        moved_on=moved_on,
    )
