"""How chunks are compressed while a migration goes on: measures, and asks the policy.

Promise: the policy is asked anew several times a second, so that a link or a processor that changes is answered
in mid-flight; while chunks travel raw, one is compressed now and then to see what that would do; every change is an
event of the span, with what it was decided by.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from vmferry.machines.host import usable_cpus
from vmferry.telemetry.tracing import span_event
from vmferry.transfer.compression import RAW, Effort, Experience, Link, Method, Passed, Situation, choose
from vmferry.transfer.traffic import Traffic

_LOOK_S: Final = 0.1
_SEEN_ENOUGH_BYTES: Final = 8 * 1024 * 1024
"""A look after less than this is by chance, as bytes are acknowledged a whole chunk at a time."""
_LONGEST_LOOK_S: Final = 0.5
_PROBE_EVERY: Final = 64
"""While chunks travel raw, one of so many is compressed."""


@dataclass(frozen=True)
class _Reading:
    """What the counters said at one moment."""

    at_s: float
    acknowledged_bytes: int
    busy_s: float
    """How long something was on its way."""
    own_s: float
    """Processor time of this service."""


class Compression:
    """Chooses for one migration."""

    def __init__(
        self,
        allowed: Sequence[Method],
        *,
        readers: int,
        traffic: Callable[[], Traffic],
        link_bytes_per_s: float = 0.0,
    ) -> None:
        """Begin with what is known.

        Args:
            allowed: methods that may be used, the quickest first.
            readers: chunks that are made at a time.
            traffic: what went over the lanes so far.
            link_bytes_per_s: what the link was measured to carry; 0 if it was not.
        """
        self._allowed = allowed
        self._traffic = traffic
        self._experience = Experience()
        self._link = Link(link_bytes_per_s)
        self._situation = Situation(self._link.bytes_per_s, readers, cores=usable_cpus())
        self._current = choose(allowed, self._experience, self._situation, allowed[0])
        self._probe = next((method for method in allowed if method.encoding == "zstd"), allowed[-1])
        self._since_probe = _PROBE_EVERY
        self._encoded_s = 0.0
        self._blocked_s = 0.0
        self._last = self._read()

    @property
    def current(self) -> Method:
        """What is used now."""
        return self._current

    def start(self) -> None:
        """Pages begin to flow again: what happened since is not about the lanes."""
        self._restart(self._read())

    def next(self) -> Method:
        """The method for the next chunk."""
        if self._current != RAW or self._probe == RAW:
            return self._current
        self._since_probe += 1
        if self._since_probe <= _PROBE_EVERY:
            return RAW
        self._since_probe = 0
        return self._probe

    def add(self, effort: Effort, *, blocked_s: float) -> None:
        """Note how a chunk was made, and how long it waited for a lane; look around now and then."""
        self._experience.add(effort)
        self._encoded_s += effort.read_s + effort.encode_s
        self._blocked_s += blocked_s
        passed_s = time.monotonic() - self._last.at_s
        if passed_s >= _LOOK_S and (
            passed_s >= _LONGEST_LOOK_S
            or self._traffic().acknowledged_bytes - self._last.acknowledged_bytes >= _SEEN_ENOUGH_BYTES
        ):
            self._look()

    def _look(self) -> None:
        now, last, readers = self._read(), self._last, self._situation.readers
        seconds = now.at_s - last.at_s
        wire_bytes = now.acknowledged_bytes - last.acknowledged_bytes
        own_cores = (now.own_s - last.own_s) / seconds
        blocked = self._blocked_s / (seconds * readers)
        self._link.add(Passed(seconds, wire_bytes, now.busy_s - last.busy_s, blocked), self._experience.share)
        send_s = self._situation.send_s_per_byte
        if wire_bytes >= _SEEN_ENOUGH_BYTES:  # otherwise it is what a service uses at rest
            fresh = max(0.0, now.own_s - last.own_s - self._encoded_s) / wire_bytes
            send_s = (send_s + fresh) / 2
        self._situation = replace(
            self._situation,
            link_bytes_per_s=self._link.bytes_per_s,
            cores=max(own_cores, self._experience.share * usable_cpus()),
            send_s_per_byte=send_s,
        )
        self._restart(now)
        chosen = choose(self._allowed, self._experience, self._situation, self._current)
        if chosen != self._current:
            self._current = chosen
            span_event(
                "compression",
                method=str(chosen),
                link_bytes_per_s=round(self._link.bytes_per_s),
                ratio=round(self._experience.ratio(chosen), 2),
                cores=round(self._situation.cores, 2),
                share=round(self._experience.share, 2),
            )

    def _restart(self, reading: _Reading) -> None:
        self._last = reading
        self._encoded_s = self._blocked_s = 0.0

    def _read(self) -> _Reading:
        now, traffic = time.monotonic(), self._traffic()
        return _Reading(now, traffic.acknowledged_bytes, traffic.busy_s(now), time.process_time())
