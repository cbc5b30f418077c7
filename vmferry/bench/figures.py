"""What one migration cost, and what several of them say together.

Promise: pure. Only migrations that completed with a right guest count in a median; how many others there were, and
why, stands beside it. A ratio is the peer's median divided by ours, so that more than 1 speaks for us.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

OURS: Final = "ours"


@dataclass(frozen=True)
class Crossing:
    """One migration; times in milliseconds, what is not known is ``None``."""

    who: str
    """``ours``, or the name of a peer's variant."""
    outcome: str
    """``completed``, or what went wrong."""
    guest_ok: bool | None = None
    """Whether the guest found everything as it had left it, and all of it was looked at."""
    prepare_ms: float | None = None
    """Until the destination was ready for memory: what it takes to start a hypervisor there that has its memory."""
    total_ms: float | None = None
    """From then until the guest ran at the destination, as the mover reports it."""
    whole_ms: float | None = None
    """From the order until everything was done, both of the above and the cleaning up at the source."""
    downtime_ms: float | None = None
    """As reported."""
    guest_gap_ms: float | None = None
    """The longest time between two ticks of the guest, from the order to the end."""
    switch_gap_ms: float | None = None
    """The time between the last tick here and the first one there."""
    usual_gap_ms: float | None = None
    """The longest time between two ticks in the second before."""
    wire_bytes: int | None = None
    """What crossed, both ways, with all headers."""
    sent_bytes: int | None = None
    """What of it was memory and state, as reported."""
    cpu_s: float | None = None
    """Processor time of both ends, the guest's included, from the order to the end."""
    slow_down: float | None = None
    """The part of its work that the guest did not get done from the order to the end."""
    rounds: int | None = None
    services_peak_mib: float | None = None

    @property
    def counts(self) -> bool:
        """Whether it belongs in a median."""
        return self.outcome == "completed" and self.guest_ok is True

    @property
    def verdict(self) -> str:
        """In a word, how it was."""
        if self.outcome != "completed":
            return self.outcome
        return "right" if self.guest_ok else "guest damaged"


FIGURES: Final = (
    "total_ms", "whole_ms", "prepare_ms", "downtime_ms", "guest_gap_ms", "switch_gap_ms", "usual_gap_ms",
    "wire_bytes", "sent_bytes", "cpu_s", "slow_down", "rounds", "services_peak_mib",
)  # fmt: skip
"""The numbers of a crossing."""
RATIOS: Final = {
    "total": "total_ms",
    "whole": "whole_ms",
    "downtime": "downtime_ms",
    "guest_gap": "guest_gap_ms",
    "wire_bytes": "wire_bytes",
    "cpu": "cpu_s",
}


@dataclass(frozen=True)
class Spread:
    """A median and how far the others were from it."""

    min: float
    median: float
    max: float

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread | None:
        """Of those that are known; ``None`` if none is."""
        known = [value for value in values if value is not None]
        if not known:
            return None
        return cls(min(known), round(statistics.median(known), 3), max(known))


def spreads(crossings: Sequence[Crossing]) -> dict[str, Spread | None]:
    """All figures of those that count."""
    counting = [crossing for crossing in crossings if crossing.counts]
    return {figure: Spread.of(getattr(crossing, figure) for crossing in counting) for figure in FIGURES}


def ratios(ours: Sequence[Crossing], peer: Sequence[Crossing]) -> dict[str, float | None]:
    """The peer's medians divided by ours."""
    mine, theirs = spreads(ours), spreads(peer)
    found: dict[str, float | None] = {}
    for name, figure in RATIOS.items():
        above, below = theirs[figure], mine[figure]
        found[name] = round(above.median / below.median, 3) if above and below and below.median else None
    return found


def of(crossings: Sequence[Crossing], who: str) -> list[Crossing]:
    """Those of one of them."""
    return [crossing for crossing in crossings if crossing.who == who]


def summary(crossings: Sequence[Crossing]) -> dict[str, Any]:
    """What a document says of one of them."""
    verdicts = [crossing.verdict for crossing in crossings]
    return {
        "runs": len(crossings),
        "right": sum(crossing.counts for crossing in crossings),
        "others": [verdict for verdict in verdicts if verdict != "right"],
    } | {figure: asdict(spread) if spread else None for figure, spread in spreads(crossings).items()}


def document(crossings: Sequence[Crossing], peers: Sequence[str]) -> dict[str, Any]:
    """What a document says of a row: ours, each peer, and the ratios; a peer that is alone stands at the top."""
    ours = of(crossings, OURS)
    each = {
        name: {"figures": summary(of(crossings, name)), "ratio": ratios(ours, of(crossings, name))}
        for name in peers
    }
    found: dict[str, Any] = {"ours": summary(ours)}
    if len(peers) == 1:
        found |= {"peer": each[peers[0]]["figures"], "ratio": each[peers[0]]["ratio"]}
    return found | {"peers": each, "crossings": [asdict(crossing) for crossing in crossings]}
