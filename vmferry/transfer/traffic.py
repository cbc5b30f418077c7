"""What went over all lanes of an attempt so far."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Traffic:
    """Counts, and how long there was anything to count."""

    wire_bytes: int = 0
    """Sent, with all that is around the data; repeated ones once."""
    acknowledged_bytes: int = 0
    """Of these, what is known to have arrived."""
    data_bytes: int = 0
    zero_pages: int = 0
    """Found; whoever reads pages counts them."""
    reconnects: int = 0
    """How often a lane was reopened."""
    repeated_bytes: int = 0
    """Bytes sent again after a lane was reopened."""
    different_pages: int = 0
    _busy_s: float = 0.0
    _busy_since: float | None = None

    def began(self, now: float) -> None:
        """Something is on its way, after nothing was."""
        self._busy_since = now

    def ended(self, now: float) -> None:
        """All of it has arrived."""
        self._busy_s = self.busy_s(now)
        self._busy_since = None

    def busy_s(self, now: float) -> float:
        """How long so far something was on its way; any thread may ask."""
        since = self._busy_since
        return self._busy_s + (now - since if since is not None else 0.0)
