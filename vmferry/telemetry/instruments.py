"""Every metric there is: its name, its unit, what it says, and what it is divided by.

Promise: no metric of ours exists that does not stand here, and its name in Prometheus follows from what stands here
by the rules of OpenTelemetry's specification: dots become underscores, the unit is written out, counters end in
``_total``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from vmferry.telemetry import semconv

_UNITS: Final = {"s": "seconds", "By": "bytes", "By/s": "bytes_per_second"}
_ODD: Final = re.compile(r"[^a-zA-Z0-9_]+")


class Kind(StrEnum):
    """How values of a metric behave; the names are those of Prometheus."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True)
class Instrument:
    """One metric."""

    name: str
    kind: Kind
    unit: str
    description: str
    attributes: tuple[str, ...] = ()
    """What it is divided by."""
    boundaries: tuple[float, ...] = ()
    """Of a histogram's buckets."""

    @property
    def prometheus(self) -> str:
        """Its name in Prometheus; a histogram's series have ``_bucket``, ``_sum`` or ``_count`` after it."""
        return prometheus_name(self.name, self.unit, self.kind)


def prometheus_name(name: str, unit: str, kind: Kind) -> str:
    """The name of a metric in Prometheus."""
    words = _UNITS.get(unit, "ratio" if unit == "1" and kind is Kind.GAUGE else "")
    plain = label_name(name)
    if words and not plain.endswith(f"_{words}"):
        plain = f"{plain}_{words}"
    return f"{plain}_total" if kind is Kind.COUNTER else plain


def label_name(attribute: str) -> str:
    """The name of an attribute in Prometheus."""
    return _ODD.sub("_", attribute)


_SHORT_S: Final = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0, 30.0)
_LONG_S: Final = (0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 900.0, 3600.0, 14400.0)
_PHASE_S: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0, 600.0, 3600.0)
_LAG_S: Final = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)
_OFF_S: Final = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_ROUNDS: Final = (1.0, 2.0, 3.0, 4.0, 5.0, 7.0, 10.0, 15.0, 20.0, 30.0, 50.0, 100.0)
_RATIO: Final = (0.25, 0.5, 0.67, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 4.0)
"""As far below one as above it."""

MIGRATIONS: Final = Instrument(
    "vmferry.migrations",
    Kind.COUNTER,
    "{migration}",
    "Migrations away from this host that have ended.",
    (semconv.OUTCOME, semconv.REASON),
)
MIGRATIONS_OPEN: Final = Instrument(
    "vmferry.migrations.open",
    Kind.GAUGE,
    "{migration}",
    "Migrations away from this host that have not ended.",
    (semconv.PHASE,),
)
MIGRATIONS_QUEUED: Final = Instrument(
    "vmferry.migrations.queued",
    Kind.GAUGE,
    "{migration}",
    "Migrations that wait for room here or at their destination, by that; none to a host is no series.",
    (semconv.DESTINATION,),
)
DURATION: Final = Instrument(
    "vmferry.migration.duration",
    Kind.HISTOGRAM,
    "s",
    "Time from accepting a migration to its end.",
    (semconv.OUTCOME,),
    _LONG_S,
)
PHASE_DURATION: Final = Instrument(
    "vmferry.migration.phase.duration",
    Kind.HISTOGRAM,
    "s",
    "Time that a migration spent in a phase.",
    (semconv.PHASE,),
    _PHASE_S,
)
DOWNTIME: Final = Instrument(
    "vmferry.migration.downtime",
    Kind.HISTOGRAM,
    "s",
    "The guest's whole pause in a completed migration, measured at the source.",
    (semconv.PATH,),
    _SHORT_S,
)
ROUNDS: Final = Instrument(
    "vmferry.migration.rounds",
    Kind.HISTOGRAM,
    "{round}",
    "Rounds over memory that a completed migration needed.",
    (),
    _ROUNDS,
)
MEMORY_SENT: Final = Instrument(
    "vmferry.migration.memory",
    Kind.COUNTER,
    "By",
    "Page contents sent, counting a page every time.",
)
WIRE_SENT: Final = Instrument(
    "vmferry.migration.wire",
    Kind.COUNTER,
    "By",
    "Bytes of the messages on the lanes, after compression.",
)
REPEATED: Final = Instrument(
    "vmferry.migration.repeated",
    Kind.COUNTER,
    "By",
    "Bytes sent again because a connection broke before they were acknowledged.",
)
RECONNECTS: Final = Instrument(
    "vmferry.lane.reconnects",
    Kind.COUNTER,
    "{reconnect}",
    "Lanes that were reopened after their connection had broken.",
)
RETRIES: Final = Instrument(
    "vmferry.call.retries",
    Kind.COUNTER,
    "{call}",
    "Control calls to a destination that had to be repeated.",
    (semconv.CALL,),
)
DIRTY_RATE: Final = Instrument(
    "vmferry.migration.dirty_rate",
    Kind.GAUGE,
    "By/s",
    "Rate at which the guest of an open migration writes memory.",
    (semconv.MACHINE,),
)
SEND_RATE: Final = Instrument(
    "vmferry.migration.send_rate",
    Kind.GAUGE,
    "By/s",
    "Rate at which the memory of an open migration is sent.",
    (semconv.MACHINE,),
)
REMAINING: Final = Instrument(
    "vmferry.migration.remaining",
    Kind.GAUGE,
    "By",
    "What is left of the current round of an open migration.",
    (semconv.MACHINE,),
)
EXPECTED_DOWNTIME: Final = Instrument(
    "vmferry.migration.expected_downtime",
    Kind.GAUGE,
    "s",
    "The pause that a switch now would cause in an open migration.",
    (semconv.MACHINE,),
)
ARRIVALS: Final = Instrument(
    "vmferry.arrivals",
    Kind.COUNTER,
    "{machine}",
    "Attempts to bring a machine to this host: owned, refused after they had begun, or turned away at once.",
    (semconv.OUTCOME, semconv.REASON),
)
ARRIVALS_OPEN: Final = Instrument(
    "vmferry.arrivals.open",
    Kind.GAUGE,
    "{machine}",
    "Machines that this host is receiving.",
)
RECEIVED: Final = Instrument(
    "vmferry.arrival.memory",
    Kind.COUNTER,
    "By",
    "Page contents and streamed memory taken in from sources, after decompression.",
)
DRAIN_STATE: Final = Instrument(
    "vmferry.drain.state",
    Kind.GAUGE,
    "{host}",
    "1 for how the emptying of this host stands, 0 for how it does not.",
    (semconv.STATE,),
)
DRAIN_MACHINES: Final = Instrument(
    "vmferry.drain.machines",
    Kind.GAUGE,
    "{machine}",
    "Machines of the newest drain of this host, by how they stand.",
    (semconv.STATE,),
)
DRAIN_MOVES: Final = Instrument(
    "vmferry.drain.moves",
    Kind.COUNTER,
    "{migration}",
    "Migrations during a drain of this host that have ended.",
    (semconv.OUTCOME, semconv.REASON),
)
DRAIN_DURATION: Final = Instrument(
    "vmferry.drain.duration",
    Kind.HISTOGRAM,
    "s",
    "Time from asking for a drain until this host was empty for the first time, or the drain was undone before.",
    (semconv.OUTCOME,),
    _LONG_S,
)
BLOCKED: Final = Instrument(
    semconv.MACHINES_BLOCKED,
    Kind.GAUGE,
    "{machine}",
    "Machines that nobody may run, or that nobody runs, until something is done about it.",
    (semconv.REASON,),
)
TOTAL_ERROR: Final = Instrument(
    semconv.PREDICTION_TOTAL_ERROR,
    Kind.HISTOGRAM,
    "1",
    "Length of a completed migration, divided by what was predicted.",
    (semconv.MACHINE_KIND,),
    _RATIO,
)
DOWNTIME_ERROR: Final = Instrument(
    semconv.PREDICTION_DOWNTIME_ERROR,
    Kind.HISTOGRAM,
    "1",
    "Pause of the guest in a completed migration, divided by what was predicted.",
    (semconv.MACHINE_KIND,),
    _RATIO,
)
CLOCK_BEFORE: Final = Instrument(
    "vmferry.guest.clock.offset_before",
    Kind.HISTOGRAM,
    "s",
    "How far a guest's clock was off its host's after a pause, either way, before anything was done about it.",
    (semconv.METHOD,),
    _OFF_S,
)
CLOCK_AFTER: Final = Instrument(
    "vmferry.guest.clock.offset_after",
    Kind.HISTOGRAM,
    "s",
    "How far it was off afterwards, by what put it right.",
    (semconv.METHOD,),
    _OFF_S,
)
LOOP_LAG: Final = Instrument(
    "vmferry.event_loop.lag",
    Kind.HISTOGRAM,
    "s",
    "How much later than asked for the service's event loop came to a timer.",
    (),
    _LAG_S,
)
CERTIFICATE_EXPIRY: Final = Instrument(
    "vmferry.certificate.expiry_timestamp",
    Kind.GAUGE,
    "s",
    "When the first certificate on the path from this host's to its authority expires, in Unix time.",
)

INSTRUMENTS: Final = tuple(value for value in dict(globals()).values() if isinstance(value, Instrument))
"""All of them."""
