"""What a network between two services can suffer: each fault strikes at once, lasts, and can be healed.

Promise: while a fault lasts, connections that are made meet it just as those that stood when it struck.
"""

from __future__ import annotations

import enum

from tests.integration.proxy import Proxy

TRICKLE = 300.0
"""Bytes a second at which a call takes about as long as it is waited for, and a TLS handshake much longer."""


class Fault(enum.StrEnum):
    """A fault; *up* is what the source says, *down* what the destination answers."""

    LOST_UP = "lost-up"
    LOST_DOWN = "lost-down"
    LOST = "lost"
    LATE_UP = "late-up"
    LATE_DOWN = "late-down"
    CUT = "cut"
    BLIP = "blip"
    CLOSED_UP = "closed-up"
    CLOSED_DOWN = "closed-down"
    SLOW_UP = "slow-up"
    SLOW_DOWN = "slow-down"

    @property
    def total(self) -> bool:
        """Nothing at all comes through, in neither direction, until it is healed."""
        return self in {Fault.LOST, Fault.CUT}

    @property
    def lasts(self) -> bool:
        """It does not heal by itself."""
        return self is not Fault.BLIP

    def strike(self, link: Proxy) -> None:
        """Let the network suffer it from now on."""
        match self:
            case Fault.LOST_UP | Fault.LOST_DOWN | Fault.LOST:
                link.lose(up=self is not Fault.LOST_DOWN, down=self is not Fault.LOST_UP)
            case Fault.LATE_UP | Fault.LATE_DOWN:
                link.silence(up=self is Fault.LATE_UP, down=self is Fault.LATE_DOWN)
            case Fault.CUT:
                link.cut_off()
            case Fault.BLIP:
                link.reset_all()
            case Fault.CLOSED_UP | Fault.CLOSED_DOWN:
                link.half_close(up=self is Fault.CLOSED_UP, down=self is Fault.CLOSED_DOWN)
            case Fault.SLOW_UP | Fault.SLOW_DOWN:
                link.throttle(TRICKLE, up=self is Fault.SLOW_UP, down=self is Fault.SLOW_DOWN)

    def heal(self, link: Proxy) -> None:
        """End it; what was only delayed comes now."""
        if self in {Fault.LATE_UP, Fault.LATE_DOWN}:
            link.let_go()
        else:
            link.heal()
