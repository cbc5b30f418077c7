"""How long a transfer waits: for progress while its lanes are connected, for a connection while they are not. Pure.

Promise: a stall is time in which every lane has a connection and nothing is acknowledged; time without a connection
is counted for each lane by itself and never as a stall. Silence that ends in the loss of a connection was its
beginning. Only progress makes up for lost time, so that lanes which come and go and carry nothing do not go on for
ever.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """How long a transfer waits."""

    stall_s: float
    reconnect_s: float


@dataclass(frozen=True)
class Connections:
    """How the lanes of an attempt are connected at one moment."""

    standing: int
    """Lanes that have a connection."""
    whole: bool
    """Whether all have one."""
    all_lost_s: float | None
    """For how long none has one; ``None`` while one has."""
    reconnect_left_s: float
    """How much longer a lane that has none is reopened."""
    broken_s: float
    """For how long, since the beginning, not all had one."""


class Patience:
    """The clocks of all lanes of a transfer; none of them has a connection at first."""

    def __init__(self, lanes: int, limits: Limits, now: float) -> None:
        self.limits = limits
        self.all_lost_since: float | None = now
        """Since when no lane has a connection."""
        self._lost = dict.fromkeys(range(lanes), now)
        self._spent = [0.0] * lanes
        """What earlier breaks have cost each lane since it carried something."""
        self._lanes = lanes
        self._progressed_at = now
        self._broken_since: float | None = None
        self._broken_s = 0.0

    @property
    def connected(self) -> int:
        """Lanes that have a connection."""
        return self._lanes - len(self._lost)

    def connections(self, now: float) -> Connections:
        """How the lanes are connected."""
        left_s = self.reconnect_left_s(now)
        return Connections(
            standing=self.connected,
            whole=left_s is None,
            all_lost_s=None if self.all_lost_since is None else now - self.all_lost_since,
            reconnect_left_s=max(0.0, left_s or 0.0),
            broken_s=self._broken_s + (now - self._broken_since if self._broken_since is not None else 0.0),
        )

    def lost(self, lane: int, now: float) -> bool:
        """A lane has no connection; whether it had one until now."""
        if lane in self._lost:
            return False
        if not self._lost:
            self._spent[lane] += now - self._progressed_at
            self._broken_since = now
        self._lost[lane] = now
        if not self.connected:
            self.all_lost_since = now
        return True

    def back(self, lane: int, now: float) -> float:
        """A lane has a connection again; returns how long it had none."""
        since = self._lost.pop(lane, now)
        self._spent[lane] += now - since
        self._progressed_at = now
        self.all_lost_since = None
        if not self._lost and self._broken_since is not None:
            self._broken_s += now - self._broken_since
            self._broken_since = None
        return now - since

    def progressed(self, lane: int, now: float) -> None:
        """Something that a lane carried was acknowledged, or it has nothing to carry."""
        self._progressed_at = now
        self._spent[lane] = 0.0

    def idle(self, now: float) -> None:
        """Nothing waits to be acknowledged."""
        if not self._lost:
            self._progressed_at = now

    def stalled(self, now: float) -> bool:
        """Whether all lanes have been connected and silent for too long."""
        return not self._lost and now - self._progressed_at > self.limits.stall_s

    def reconnect_left_s(self, now: float) -> float | None:
        """How much longer the lane that is worst off is reopened; ``None`` if all have a connection."""
        spent = [self._spent[lane] + now - since for lane, since in self._lost.items()]
        return self.limits.reconnect_s - max(spent) if spent else None
