"""How chunks are compressed while a migration goes on: measures, and asks the policy.

Promise: the policy is asked anew several times a second, for the first time as soon as something has crossed, so
that a link or a processor that changes is answered in mid-flight; while chunks travel raw, one is compressed now and
then to see what that would do; every change is an event of the span under which pages began to flow, with what it was
decided by. Several threads may make chunks.
"""

from __future__ import annotations

import contextvars
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from vmferry.machines.host import usable_cpus
from vmferry.rpc.connections import Carried, Connections, End
from vmferry.telemetry.tracing import span_event
from vmferry.transfer.compression import (
    RAW,
    Effort,
    Experience,
    Link,
    Method,
    Passed,
    Situation,
    after_first_look,
    choose,
    first,
)
from vmferry.transfer.traffic import Traffic

_LOOK_S: Final = 0.1
_SEEN_ENOUGH_BYTES: Final = 8 * 1024 * 1024
"""A look after less than this is by chance, as bytes are acknowledged a whole chunk at a time."""
_LONGEST_LOOK_S: Final = 0.5
_FIRST_LOOK_S: Final = 0.03
_FIRST_LOOK_BYTES: Final = 1024 * 1024
"""Enough for the first look, as until then nothing is known; kernels count every byte."""
_LEAST_FLOW_BYTES: Final = 128 * 1024
"""A connection that carried less in a look is none of the lanes, or says little."""
_PROBE_EVERY: Final = 64
"""While chunks travel raw, one of so many is compressed."""
_FULL_PROBE_EVERY: Final = 4
"""The same where the link limits: readers have the time, and what was found out beside other work may be wrong."""


@dataclass(frozen=True)
class _Reading:
    """What the counters said at one moment."""

    at_s: float
    acknowledged_bytes: int
    busy_s: float
    """How long something was on its way."""
    own_s: float
    """Processor time of this service."""
    carried: Mapping[End, Carried]
    """What the kernel says of this service's connections."""


class Compression:
    """Chooses for one migration."""

    def __init__(
        self,
        allowed: Sequence[Method],
        *,
        readers: int,
        traffic: Callable[[], Traffic],
        link_bytes_per_s: float = 0.0,
        connections: Callable[[], Mapping[End, Carried]] | None = None,
    ) -> None:
        """Begin with what is known.

        Args:
            allowed: methods that may be used, the quickest first.
            readers: chunks that are made at a time.
            traffic: what went over the lanes so far.
            link_bytes_per_s: what the link was measured to carry; 0 if it was not.
            connections: what the connections of this service have carried; asks the kernel if not given.
        """
        self._lock = threading.Lock()
        self._context = contextvars.copy_context()
        self._connections = connections or Connections().look
        self._allowed = allowed
        self._traffic = traffic
        self._experience = Experience()
        self._link = Link(link_bytes_per_s)
        self._situation = Situation(self._link.bytes_per_s, readers, cores=usable_cpus())
        self._current = first(allowed, self._experience, self._situation)
        self._looked = False
        self._probe = next((method for method in allowed if method.encoding == "zstd"), allowed[-1])
        self._since_probe = _PROBE_EVERY
        self._encoded_s = self._blocked_s = self._data_bytes = 0.0
        self._last = self._read({})  # there are no lanes yet

    @property
    def current(self) -> Method:
        """What is used now."""
        return self._current

    def start(self) -> None:
        """Pages begin to flow again: what happened since is not about the lanes."""
        with self._lock:
            self._context = contextvars.copy_context()
            self._restart(self._read(self._connections()))

    def next(self) -> Method:
        """The method for the next chunk."""
        with self._lock:
            return self._next()

    def _next(self) -> Method:
        if self._current != RAW or self._probe == RAW:
            return self._current
        self._since_probe += 1
        if self._since_probe <= (_FULL_PROBE_EVERY if self._link.full else _PROBE_EVERY):
            return RAW
        self._since_probe = 0
        return self._probe

    def add(self, effort: Effort, *, blocked_s: float) -> None:
        """Note how a chunk was made, and how long it waited for a lane; look around now and then."""
        with self._lock:
            self._experience.add(effort)
            self._encoded_s += effort.read_s + effort.encode_s
            self._blocked_s += blocked_s
            self._data_bytes += effort.data_bytes
            if self._is_time():
                self._look()

    def _is_time(self) -> bool:
        passed_s = time.monotonic() - self._last.at_s
        if passed_s < (_LOOK_S if self._looked else _FIRST_LOOK_S):
            return False
        enough = _SEEN_ENOUGH_BYTES if self._looked else _FIRST_LOOK_BYTES
        passed_bytes = self._traffic().acknowledged_bytes - self._last.acknowledged_bytes
        return passed_s >= _LONGEST_LOOK_S or passed_bytes >= enough

    def _look(self) -> None:
        now, last, readers = self._read(self._connections()), self._last, self._situation.readers
        seconds = now.at_s - last.at_s
        wire_bytes = now.acknowledged_bytes - last.acknowledged_bytes
        own_s = now.own_s - last.own_s
        blocked = self._blocked_s / (seconds * readers)
        carried_bytes, carrying_s = _carried(last.carried, now.carried, seconds)
        passed = Passed(seconds, wire_bytes, now.busy_s - last.busy_s, blocked, carried_bytes, carrying_s)
        self._link.add(passed, self._experience.share)
        handle_s = self._situation.handle_s_per_byte
        if self._data_bytes >= _SEEN_ENOUGH_BYTES:  # otherwise it is what a service uses at rest
            sending_s = self._situation.send_s_per_byte * wire_bytes
            handle_s = (handle_s + max(0.0, own_s - self._encoded_s - sending_s) / self._data_bytes) / 2
        self._situation = replace(
            self._situation,
            link_bytes_per_s=self._link.bytes_per_s,
            cores=max(own_s / seconds, self._experience.share * usable_cpus()),
            handle_s_per_byte=handle_s,
        )
        self._restart(now)
        self._choose(choose if self._looked else after_first_look)
        self._looked = True

    def _choose(self, policy: Callable[[Sequence[Method], Experience, Situation, Method], Method]) -> None:
        chosen = policy(self._allowed, self._experience, self._situation, self._current)
        if chosen == self._current:
            return
        self._current = chosen
        facts = {
            "link_bytes_per_s": round(self._link.bytes_per_s),
            "ratio": round(self._experience.ratio(chosen), 2),
            "cores": round(self._situation.cores, 2),
            "share": round(self._experience.share, 2),
        }
        self._context.run(span_event, "compression", method=str(chosen), **facts)

    def _restart(self, reading: _Reading) -> None:
        self._last = reading
        self._encoded_s = self._blocked_s = self._data_bytes = 0.0

    def _read(self, carried: Mapping[End, Carried]) -> _Reading:
        now, traffic = time.monotonic(), self._traffic()
        return _Reading(
            now,
            traffic.acknowledged_bytes,
            traffic.busy_s(now),
            time.process_time(),
            carried,
        )


def _carried(
    before: Mapping[End, Carried], now: Mapping[End, Carried], seconds: float
) -> tuple[float, float]:
    """Bytes, and seconds in which at least one of several connections carried something; nothing if it is unclear.

    What others send to the same host crosses the same way. Of connections to several hosts it is not known which
    are the lanes.
    """
    flows: dict[str, list[tuple[int, float]]] = {}
    for end in now.keys() & before.keys():
        sent = now[end].acked_bytes - before[end].acked_bytes
        if sent >= _LEAST_FLOW_BYTES:
            flows.setdefault(end.peer, []).append((sent, now[end].carrying_s - before[end].carrying_s))
    if len(flows) != 1:
        return 0.0, 0.0
    (lanes,) = flows.values()
    # The kernel says of each how long it was busy, not when; they are taken to be so by chance.
    idle = math.prod(1 - min(1.0, max(0.0, busy_s / seconds)) for _, busy_s in lanes)
    return float(sum(sent for sent, _ in lanes)), (1 - idle) * seconds
