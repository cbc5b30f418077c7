"""How far the clocks of the hosts in a trace are apart, by the calls between them.

A server's span lies inside its client's: it cannot begin before the call was made, nor end after the call was over.

    client's clock   c0 |-------------------------| c1        s0 - offset >= c0,  so  offset <= s0 - c0
    server's clock        s0 |----------------| s1            s1 - offset <= c1,  so  offset >= s1 - c1

Promise: an offset that is given fits every call it was taken from, and its error says how far off it may be as long
as the clocks did not jump meanwhile. A host that no call connects with the others has no offset, rather than a
guessed one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from vmferry.telemetry.spans import SpanRecord


@dataclass(frozen=True)
class Clock:
    """A host's clock beside that of the reference."""

    host: str
    reference: str
    offset_ns: int
    """How far it is ahead."""
    error_ns: int
    """How far off that may be, to either side."""
    calls: int
    """Calls that it was taken from; 0 for the reference itself."""

    def sentence(self) -> str:
        """What is said below a drawing."""
        ahead = "ahead of" if self.offset_ns >= 0 else "behind"
        offset_ms, error_ms = abs(self.offset_ns) / 1e6, self.error_ns / 1e6
        return (
            f"The clock of {self.host} is {offset_ms:,.3f} ms {ahead} that of {self.reference}, "
            f"\N{PLUS-MINUS SIGN} {error_ms:,.3f} ms by {self.calls} calls; its spans are shifted by that."
        )


@dataclass(frozen=True)
class _Bounds:
    """Where the offset of a server's clock to its client's lies."""

    low: int
    high: int
    calls: int = 1

    def meets(self, other: _Bounds) -> bool:
        return self.low <= other.high and other.low <= self.high

    def reversed(self) -> _Bounds:
        return _Bounds(-self.high, -self.low, self.calls)

    def within(self, other: _Bounds) -> _Bounds:
        return _Bounds(max(self.low, other.low), min(self.high, other.high), self.calls + other.calls)


def estimate_clocks(spans: Sequence[SpanRecord]) -> dict[str, Clock]:
    """The clocks of all hosts that calls connect with the reference, which is the host that sent the machine."""
    if not spans:
        return {}
    names = {span.name: span.host for span in spans}
    reference = names.get("migrate", min(spans, key=lambda span: span.start_ns).host)
    known = {reference: Clock(reference, reference, 0, 0, 0)}
    between = _between(spans)
    reached = [reference]
    while reached:
        here = reached.pop(0)
        for (client, server), bounds in between.items():
            if client == here and server not in known:
                known[server] = _beyond(known[here], server, bounds)
                reached.append(server)
            elif server == here and client not in known:
                known[client] = _beyond(known[here], client, bounds.reversed())
                reached.append(client)
    return known


def align(spans: Iterable[SpanRecord], clocks: dict[str, Clock]) -> list[SpanRecord]:
    """The spans on one axis: the reference's. Those of hosts without an offset stay where their clock has them."""
    found = []
    for span in spans:
        shift = clocks[span.host].offset_ns if span.host in clocks else 0
        found.append(replace(span, start_ns=span.start_ns - shift, end_ns=span.end_ns - shift))
    return found


def _beyond(near: Clock, host: str, bounds: _Bounds) -> Clock:
    middle, half = (bounds.low + bounds.high) // 2, (bounds.high - bounds.low + 1) // 2
    return Clock(host, near.reference, near.offset_ns + middle, near.error_ns + half, bounds.calls)


def _between(spans: Sequence[SpanRecord]) -> dict[tuple[str, str], _Bounds]:
    """What all calls of one host to another allow, the tightest first.

    A call that does not fit the tighter ones counts for nothing: its client may have given up before its server did.
    """
    by_id = {span.span_id: span for span in spans}
    allowed: dict[tuple[str, str], list[_Bounds]] = {}
    for server in spans:
        client = by_id.get(server.parent_id)
        if client is None or client.host == server.host or client.name != server.name:
            continue
        bounds = _Bounds(server.end_ns - client.end_ns, server.start_ns - client.start_ns)
        if bounds.low <= bounds.high and not client.failed:
            allowed.setdefault((client.host, server.host), []).append(bounds)
    found = {}
    for hosts, several in allowed.items():
        best, *others = sorted(several, key=lambda one: one.high - one.low)
        for other in others:
            if best.meets(other):
                best = best.within(other)
        found[hosts] = best
    return found
