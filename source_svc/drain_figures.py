"""What a drain leaves in metrics and in a trace of its own.

Promise: a drain is one trace, also if its service is started anew meanwhile: below the call that asked for it are a
span ``move`` for each migration that ended meanwhile, which names that migration's own trace, and a span ``drain``
over the whole. It is counted once: when the host is empty for the first time, or when the drain was undone before.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Final

from source_svc.figures import outcome_name
from vmferry.telemetry import instruments, metrics
from vmferry.telemetry.tracing import past_phase
from vmferry.v1 import drain_pb2 as dp
from vmferry.v1 import migration_pb2 as pb

EMPTIED: Final = "emptied"
UNDONE: Final = "undone"
_STATES: Final = {value: _name for _name, value in dp.DrainState.items() if value}
_MACHINE_STATES: Final = {value: _name for _name, value in dp.DrainedMachineState.items() if value}


def observe_drain(shown: Callable[[], dp.Drain]) -> Callable[[], None]:
    """Have the drain measured whenever metrics are exported, and its counters begin; returns what ends that."""
    metrics.count_drain_move("completed", times=0)

    def state() -> Mapping[str, float]:
        now = shown().state
        return {
            name.removeprefix("DRAIN_STATE_").lower(): float(value == now) for value, name in _STATES.items()
        }

    def machines() -> Mapping[str, float]:
        found = Counter(item.state for item in shown().machines)
        return {
            name.removeprefix("DRAINED_MACHINE_STATE_").lower(): found[value]
            for value, name in _MACHINE_STATES.items()
        }

    ends = (
        metrics.observe(instruments.DRAIN_STATE, state),
        metrics.observe(instruments.DRAIN_MACHINES, machines),
    )

    def end() -> None:
        for one in ends:
            one()

    return end


def move_ended(record: dp.DrainRecord, item: dp.DrainedMachine, migration: pb.Migration) -> None:
    """A migration of a machine that is to go has ended."""
    outcome = outcome_name(migration.outcome)
    metrics.count_drain_move(outcome, migration.reason.reason)
    if record.traceparent:
        past_phase(
            "move",
            migration.create_time.ToNanoseconds(),
            parent=record.traceparent,
            machine=item.machine,
            destination=migration.destination.host,
            migration_id=migration.id,
            migration_trace=migration.trace_id,
            outcome=outcome,
            reason=migration.reason.reason,
        )


def drain_ended(record: dp.DrainRecord, outcome: str) -> None:
    """The host is empty, or need not be any more."""
    if record.counted:
        return
    record.counted = True
    start_ns = record.drain.create_time.ToNanoseconds()
    metrics.record_drain(outcome, max(0.0, time.time() - start_ns / 1e9))
    if record.traceparent:
        states = Counter(item.state for item in record.drain.machines)
        past_phase(
            "drain",
            start_ns,
            parent=record.traceparent,
            outcome=outcome,
            moved=states[dp.DRAINED_MACHINE_STATE_MOVED],
            left=sum(states.values()) - states[dp.DRAINED_MACHINE_STATE_MOVED],
        )
