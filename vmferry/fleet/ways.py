"""Which way a machine goes while its host is updated: it stays and is updated in place, or it leaves and comes back.

Promise: pure; a machine stays only if the plan allows it and nothing stands in its way but what the plan's command
may well mend, and then it is asked about once more behind the command.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from vmferry.fleet.plan import Plan

BUSY: Final = "update.machine-busy"
_MENDED: Final = frozenset(
    {
        BUSY,
        "update.accelerator",
        "update.hypervisor-not-allowed",
        "update.hypervisor-unusable",
        "update.machine-type",
    }
)
"""What may be otherwise once the command has installed a hypervisor and its configuration, or a while has passed."""


@dataclass(frozen=True)
class Obstacle:
    """One reason why a machine cannot be updated in place."""

    id: str
    message: str


@dataclass(frozen=True)
class Way:
    """The way of one machine, and why."""

    in_place: bool
    why: str


def way(plan: Plan, obstacles: Sequence[Obstacle], *, commanded: bool) -> Way:
    """The way of a machine.

    Args:
        plan: the plan.
        obstacles: what its host says stands in the way of an update in place.
        commanded: the plan's command has run on that host.
    """
    if not plan.in_place:
        return Way(
            in_place=False, why="the plan does not say in_place = true, and its command may end machines"
        )
    why = "; ".join(f"{one.id}: {one.message}" for one in obstacles)
    if not why:
        return Way(in_place=True, why="nothing stands in the way")
    if plan.update.command and not commanded and all(one.id in _MENDED for one in obstacles):
        return Way(in_place=True, why=f"looked at again behind the command: {why}")
    return Way(in_place=False, why=why)
