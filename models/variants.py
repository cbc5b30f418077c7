"""The variants of the model: those that must keep their promises, and those that must break one.

A broken variant is the protocol without one guard; if its promise still held, the guard would be needless or the
model blind. Bounds are as small as the counter-example allows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from models.explore import SAFETY
from models.promises import at_rest, runs
from models.state import World
from models.world import Bounds

NEVER_SPLIT: Final = ("I1", "I1b", "I2")
"""What holds even where the latest state may be lost, or a person be needed."""


_A_FAULT: Final = Bounds()


@dataclass(frozen=True)
class Safe:
    """Bounds within which the promises hold."""

    what: str
    bounds: Bounds
    quick: Bounds
    promises: tuple[str, ...] = SAFETY
    live: bool = True
    """Whether the guest can always run again without a person."""
    goal: Callable[[World], bool] = runs
    """What has to stay within reach, if ``live``."""


@dataclass(frozen=True)
class Broken:
    """A guard, and the promise that breaks without it."""

    guard: str
    breaks: str
    bounds: Bounds = _A_FAULT
    goal: Callable[[World], bool] = runs


SAFE: Final = (
    Safe("two hosts, crashes, deaths and kills", Bounds(faults=3), Bounds(faults=1)),
    Safe("three hosts", Bounds(hosts=3, faults=1), Bounds(hosts=3, faults=0)),
    Safe("three attempts", Bounds(attempts=3, faults=0), Bounds(faults=0)),
    Safe(
        "a source without memory gives up waiting",
        Bounds(faults=2, waits_end=True),
        Bounds(faults=1, waits_end=True),
        NEVER_SPLIT,
    ),
    Safe(
        "a host comes back without its journals",
        Bounds(faults=2, journals_lost=True),
        Bounds(faults=1, attempts=1, journals_lost=True),
        live=False,
    ),
    Safe(
        "a journal's last record rots, or is torn",
        Bounds(faults=1, records_rot=True),
        Bounds(faults=1, attempts=1, records_rot=True),
        NEVER_SPLIT,
        live=False,
    ),
    Safe(
        "an operator forces one host and keeps the other one off",
        Bounds(faults=2, operator=True),
        Bounds(faults=1, attempts=1, operator=True),
        live=False,
    ),
    Safe(
        "an operator forces one host while the other one runs",
        Bounds(faults=2, attempts=1, unfenced="either"),
        Bounds(faults=1, attempts=1, unfenced="either"),
        ("I5",),
        goal=at_rest,
    ),
    Safe(
        "the same, and the machine may come back or is sent there again",
        Bounds(faults=0, unfenced="either"),
        Bounds(faults=0, unfenced="source"),
        ("I5",),
        goal=at_rest,
    ),
    Safe(
        "a source is forced, and the machine is sent on to a third host",
        Bounds(hosts=3, faults=0, unfenced="source"),
        Bounds(hosts=3, attempts=1, faults=1, unfenced="source"),
        ("I5",),
        goal=at_rest,
    ),
)

_NO_FAULT: Final = Bounds(faults=0)
_ROT: Final = Bounds(faults=1, records_rot=True)
_OPERATOR: Final = Bounds(faults=1, attempts=1, operator=True)
_UNFENCED: Final = Bounds(faults=0, attempts=1, unfenced="either")
_SENT_ON: Final = Bounds(hosts=3, faults=0, unfenced="source")
_WAITS: Final = Bounds(faults=1, attempts=1, waits_end=True)

BROKEN: Final = (
    Broken("silence means nothing", "I1", _NO_FAULT),
    Broken("HANDED_OFF before Go", "I1b", _NO_FAULT),
    Broken("HANDED_OFF on disk", "I1b", _WAITS),
    Broken("ABORTED on disk", "I2"),
    Broken("OWNED on disk", "I2"),
    Broken("REFUSED on disk", "I1b", _NO_FAULT),
    Broken("ask before closing without memory", "I3"),
    Broken("ask without closing", "I3"),
    Broken("what a process knew dies with it", "I3"),
    Broken("rescue of a lost seal", "L1"),
    Broken("memory stays until it runs elsewhere", "I3"),
    Broken("only the journal that said ready", "I2", Bounds(faults=1, journals_lost=True)),
    Broken("messages name their attempt", "I1", _NO_FAULT),
    Broken("order of attempts", "I3"),
    Broken("never a copy that arrived since", "I3"),
    Broken("no right without a copy", "I2"),
    Broken("silence takes nothing", "I1b", _NO_FAULT),
    Broken("silence drops nothing", "I3"),
    Broken("the gate looks for open attempts", "I1", _NO_FAULT),
    Broken("no time limit after HANDED_OFF", "I1b", _WAITS),
    Broken(
        "no time limit behind a torn end",
        "I1b",
        Bounds(faults=2, attempts=1, waits_end=True, records_rot=True),
    ),
    Broken("ask behind a torn end", "I1b", _ROT),
    Broken("no hand-off behind a torn end", "I2", _ROT),
    Broken("no refusal behind a torn end", "I2", Bounds(faults=2, records_rot=True)),
    Broken("the other host is off", "I1b", _OPERATOR),
    Broken("forced without the memory", "I2", _OPERATOR),
    Broken("nothing to resume before the right is forced", "I2", _OPERATOR),
    Broken("a later right stops an earlier one", "L1", _UNFENCED, at_rest),
    Broken("a source stops, too", "L1", _UNFENCED, at_rest),
    Broken("what came back since is kept", "L1", Bounds(faults=0, unfenced="either"), at_rest),
    Broken("first it is known where it goes", "I5", _SENT_ON),
)
