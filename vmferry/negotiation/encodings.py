"""What memory may travel as: the encodings this release speaks, and what a caller may wish. Pure.

Promise: only what both ends speak is ever agreed on, and raw contents always may be sent; an encoding that is
insisted on and cannot be had blocks, it is never replaced.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from vmferry.negotiation.facts import Offer
from vmferry.negotiation.findings import Finding, finding

NONE, LZ4, ZSTD = "none", "lz4", "zstd"
ENCODINGS = (ZSTD, LZ4, NONE)
"""What this release sends and takes, the preferred first."""
AUTO = "auto"
COMPRESSIONS = (AUTO, NONE, LZ4, ZSTD)
"""What a caller may wish for; by default, what pays is chosen for each chunk."""


def agreed(offered: Sequence[str], wish: str = AUTO) -> tuple[str, ...]:
    """What may be used; a chunk that does not compress travels raw, whatever was wished."""
    wished = ENCODINGS if wish in ("", AUTO) else (wish, NONE)
    return tuple(encoding for encoding in ENCODINGS if encoding in offered and encoding in wished)


def offered(offer: Offer, *, stream: bool) -> Sequence[str]:
    """What a destination takes memory as; one of an older release takes a hypervisor's stream only as it is."""
    return offer.stream_encodings or (NONE,) if stream else offer.encodings


def about_encodings(offer: Offer, wish: str = AUTO, *, stream: bool = False) -> Iterator[Finding]:
    """What is to be said about the encodings that both hosts have.

    Args:
        offer: the destination's.
        wish: what the caller insists on, or "auto".
        stream: whether memory travels in the hypervisor's own stream instead of as pages.
    """
    takes = offered(offer, stream=stream)
    common = agreed(takes, wish)
    theirs = ", ".join(takes) or "nothing"
    what = "a hypervisor's stream" if stream else "memory"
    if NONE not in common:
        yield finding(
            "encoding.no-common",
            f"this host sends memory as {', '.join(ENCODINGS)}, {offer.host} takes {theirs}",
            offer.host,
            "Update the older host.",
        )
    elif wish not in ("", AUTO, *common):
        yield finding(
            "encoding.unavailable",
            f"{what} is to travel as {wish}, {offer.host} takes {theirs}",
            wish,
            "Leave the choice to vmferry (without --compression), or update the destination.",
        )
    else:
        yield finding("encoding.chosen", f"memory may travel as: {', '.join(common)}", ", ".join(common))
