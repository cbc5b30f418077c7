"""A drain as a person reads it: one line for the whole, one for each machine, and below it what is in its way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Final

from vmferry.cli.output import harmless, label, milliseconds, size
from vmferry.v1 import drain_pb2 as dp

_WORDS: Final = {
    dp.DRAIN_STATE_NONE: "is not being emptied",
    dp.DRAIN_STATE_DRAINING: "is being emptied",
    dp.DRAIN_STATE_STUCK: "is not empty, and nothing that is left can move as things are",
    dp.DRAIN_STATE_DRAINED: "is empty",
}
_ORDER: Final = (
    dp.DRAINED_MACHINE_STATE_BLOCKED,
    dp.DRAINED_MACHINE_STATE_STAYS,
    dp.DRAINED_MACHINE_STATE_MOVING,
    dp.DRAINED_MACHINE_STATE_WAITING,
    dp.DRAINED_MACHINE_STATE_MOVED,
)


def headline(drain: dp.Drain) -> str:
    """How the whole stands, in one line."""
    counts = Counter(item.state for item in drain.machines)
    parts = [f"{counts[state]} {_state(state)}" for state in _ORDER if counts[state]]
    return f"{drain.host} {_WORDS.get(drain.state, 'stands otherwise')}" + (
        f": {', '.join(parts)}" if parts else ""
    )


def drain_lines(drain: dp.Drain) -> Iterator[str]:
    """All that is known of it."""
    yield headline(drain)
    yield f"newcomers   {'taken' if drain.takes_newcomers else 'not taken'}" + (
        f" ({drain.newcomers_note})" if drain.newcomers_note else ""
    )
    if drain.destinations:
        yield f"to          {', '.join(f'{one.host} at {one.address}' for one in drain.destinations)}"
    if drain.caller:
        yield f"asked by    {drain.caller}"
    if drain.state in (dp.DRAIN_STATE_DRAINING, dp.DRAIN_STATE_STUCK) and drain.HasField(
        "warrant_expire_time"
    ):
        yield f"allowed     until {drain.warrant_expire_time.ToDatetime():%Y-%m-%d %H:%M:%SZ}"
    if drain.HasField("problem"):
        yield f"held up by  {drain.problem.reason}: {harmless(drain.problem.message)}"
        yield f"            {harmless(drain.problem.remedy)}"
    for state in _ORDER:
        for item in sorted(drain.machines, key=lambda one: one.machine):
            if item.state == state:
                yield from _machine_lines(item)


def _machine_lines(item: dp.DrainedMachine) -> Iterator[str]:
    where = f" {'to' if item.state == dp.DRAINED_MACHINE_STATE_MOVING else 'at'} {item.destination.host}"
    placed = item.state in (dp.DRAINED_MACHINE_STATE_MOVING, dp.DRAINED_MACHINE_STATE_MOVED)
    cost = ""
    if item.state == dp.DRAINED_MACHINE_STATE_WAITING:
        how = "predicted" if item.cost_measured else "estimated"
        cost = f", {milliseconds(item.predicted_cost) / 1e3:.1f} s {how}"
    tries = f", attempt {item.attempts}" if item.attempts > 1 else ""
    name = item.machine or item.machine_id
    yield (
        f"  {harmless(name):<24} {_state(item.state):<8} {size(item.memory_bytes):>10}"
        f"{where if placed and item.destination.host else ''}{cost}{tries}"
    )
    if item.state == dp.DRAINED_MACHINE_STATE_MOVED:
        return
    for one in item.obstacles:
        towards = f"{one.destination}: " if one.destination else ""
        yield f"    {towards}{one.reason}{' (tried)' if one.tried else ''}: {harmless(one.message)}"
        if one.remedy:
            yield f"      {harmless(one.remedy)}"


def _state(state: dp.DrainedMachineState.ValueType) -> str:
    return label(dp.DrainedMachineState, state, "DRAINED_MACHINE_STATE_")
