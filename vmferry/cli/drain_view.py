"""A drain as a person reads it: one line for the whole, one for each machine, and below it what is in its way.

Promise: at each moment it says what is going on, what comes next, and what may be done about it.
"""

from __future__ import annotations

import re
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


_MAY: Final = {
    dp.DRAIN_STATE_DRAINING: "vmferry undrain {host} stops it: what is under way ends as it will, the rest stays",
    dp.DRAIN_STATE_STUCK: "do what is said below, or name further hosts (vmferry drain {host} --to ...), or give it "
    "up (vmferry undrain {host})",
    dp.DRAIN_STATE_DRAINED: "switch the host off, or update it; vmferry undrain {host} lets machines in again",
}
_NUMBER: Final = re.compile(r"[0-9]+")


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
    if drain.trace_id:
        yield f"trace       {drain.trace_id}"
    if drain.HasField("problem"):
        yield f"held up by  {drain.problem.reason}: {harmless(drain.problem.message)}"
        yield f"            {harmless(drain.problem.remedy)}"
    if drain.activity:
        yield f"now         {harmless(drain.activity)}"
    if may := what_may_be_done(drain):
        yield f"you may     {may}"
    for state in _ORDER:
        for item in sorted(drain.machines, key=lambda one: (one.turn, natural(one.machine))):
            if item.state == state:
                yield from _machine_lines(item)


def what_may_be_done(drain: dp.Drain) -> str:
    """What an operator may do about it; empty if there is nothing."""
    return _MAY.get(drain.state, "").format(host=drain.host.rpartition("/")[2])


def natural(name: str) -> list[tuple[int, str]]:
    """A key by which ``web-2`` stands before ``web-10``."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split("([0-9]+)", name)]


def changes(before: dp.Drain, after: dp.Drain) -> Iterator[str]:
    """What has happened between two looks, a line each."""
    known = {item.machine_id: item for item in before.machines}
    moved = sum(item.state == dp.DRAINED_MACHINE_STATE_MOVED for item in after.machines)
    for item in after.machines:
        old = known.get(item.machine_id, dp.DrainedMachine(state=dp.DRAINED_MACHINE_STATE_WAITING))
        told = (
            item.state == dp.DRAINED_MACHINE_STATE_STAYS
            and item.obstacles
            and item.obstacles == old.obstacles
        )
        if item.state != old.state and not told:
            yield f"  {harmless(item.machine or item.machine_id)}: {_happened(old, item)}" + (
                f" ({moved} of {len(after.machines)})" if item.state == dp.DRAINED_MACHINE_STATE_MOVED else ""
            )
    if before.state != after.state:
        yield headline(after)
    # Which of many is next, and how far a measurement has come, is for a screen and not for a scroll of lines.
    if after.activity and _NUMBER.sub("", before.activity) != _NUMBER.sub("", after.activity):
        yield f"  {harmless(after.activity)}"


def _happened(old: dp.DrainedMachine, new: dp.DrainedMachine) -> str:
    host = new.destination.host.rpartition("/")[2]
    if new.state == dp.DRAINED_MACHINE_STATE_MOVING:
        return f"moving to {host}"
    if new.state == dp.DRAINED_MACHINE_STATE_MOVED:
        return f"has moved to {host}" if host else "has moved"
    what = "came back" if old.state == dp.DRAINED_MACHINE_STATE_MOVING else _state(new.state)
    if not new.obstacles:
        return what
    why = new.obstacles[-1]
    where = f" at {why.destination.rpartition('/')[2]}" if why.destination else ""
    return f"{what}: {why.reason}{where}: {harmless(why.message)}"


def _machine_lines(item: dp.DrainedMachine) -> Iterator[str]:
    where = f" {'to' if item.state == dp.DRAINED_MACHINE_STATE_MOVING else 'at'} {item.destination.host}"
    placed = item.state in (dp.DRAINED_MACHINE_STATE_MOVING, dp.DRAINED_MACHINE_STATE_MOVED)
    cost = ""
    if item.state == dp.DRAINED_MACHINE_STATE_WAITING:
        how = "predicted" if item.cost_measured else "estimated"
        cost = f", {milliseconds(item.predicted_cost) / 1e3:.1f} s {how}"
        cost += f", number {item.turn} to go" if item.turn else ""
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
