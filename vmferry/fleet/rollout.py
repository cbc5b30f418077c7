"""How far a fleet's update has come, and which host may begin next.

Promise: pure; what is believed follows from the journal alone, so whoever reads it goes on where another was killed.
A host is *down* from the moment it begins until it is done. Hosts that are down at the same time are of one update
domain, a new one begins only if nothing has failed, and a domain begins only when all before it are done::

    waiting ──begun──► updating ──done──► done
                          │  ▲
                    failed│  │retried, by a later run
                          ▼  │
                         failed
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TypeVar

from vmferry.fleet.plan import HostPlan, Plan

Value = TypeVar("Value")


class Kind(enum.StrEnum):
    """What a line of the journal says about a host."""

    BEGUN = "begun"
    STAYS = "stays"
    """A machine is to be updated in place."""
    LEAVING = "leaving"
    """A machine is about to be moved away."""
    LEFT = "left"
    """A machine has been moved away."""
    EMPTY = "empty"
    """Every machine that must not stay has left."""
    UPDATED = "updated"
    """The command has run."""
    RENEWING = "renewing"
    """A machine is about to be updated in place."""
    RENEWED = "renewed"
    """A machine was updated in place, or is not running any more."""
    RETURNED = "returned"
    """A machine is back."""
    DONE = "done"
    FAILED = "failed"
    RETRIED = "retried"


class Stage(enum.StrEnum):
    """How far a host has come."""

    WAITING = "waiting"
    UPDATING = "updating"
    FAILED = "failed"
    DONE = "done"


@dataclass(frozen=True)
class Entry:
    """One line of the journal."""

    host: str
    kind: Kind
    machine: str = ""
    target: str = ""
    """The host that a machine goes to."""
    request_id: str = ""
    """Of its update in place, so that another run repeats that one and begins no second."""
    note: str = ""


@dataclass(frozen=True)
class Away:
    """Where a machine of a host is while that is updated."""

    target: str
    """Empty while it is not known to have left."""
    request_id: str = ""


@dataclass(frozen=True)
class HostProgress:
    """How one host stands."""

    stage: Stage = Stage.WAITING
    away: Mapping[str, Away] = field(default_factory=lambda: MappingProxyType({}))
    """Machines that left, or were about to, and are not back."""
    stays: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """Machines that are to be updated in place and have not been; with the request, once there is one."""
    empty: bool = False
    updated: bool = False
    note: str = ""


@dataclass(frozen=True)
class Progress:
    """How the whole fleet stands."""

    hosts: Mapping[str, HostProgress] = field(default_factory=lambda: MappingProxyType({}))

    def of(self, name: str) -> HostProgress:
        """One host; waiting if nothing is known of it."""
        return self.hosts.get(name, HostProgress())

    @property
    def down(self) -> list[str]:
        """Hosts that have begun and are not done."""
        return [name for name, one in self.hosts.items() if one.stage in (Stage.UPDATING, Stage.FAILED)]

    @property
    def failed(self) -> list[str]:
        """Hosts at which the update came to a halt."""
        return [name for name, one in self.hosts.items() if one.stage is Stage.FAILED]


class InvalidEntryError(Exception):
    """A line of the journal that cannot follow on those before it."""


def folded(entries: Iterable[Entry]) -> Progress:
    """What a journal says.

    Raises:
        InvalidEntryError: one of its lines cannot be.
    """
    progress = Progress()
    for entry in entries:
        progress = evolve(progress, entry)
    return progress


def evolve(progress: Progress, entry: Entry) -> Progress:
    """How things stand after one more line."""
    before = progress.of(entry.host)
    wanted = {Kind.BEGUN: Stage.WAITING, Kind.RETRIED: Stage.FAILED}.get(entry.kind, Stage.UPDATING)
    if before.stage is not wanted:
        raise InvalidEntryError(f"{entry.host} is {before.stage}, and cannot be {entry.kind}")
    after = before
    match entry.kind:
        case Kind.BEGUN | Kind.RETRIED:
            after = replace(before, stage=Stage.UPDATING, note="")
        case Kind.LEAVING | Kind.LEFT:
            away = dict(before.away) | {entry.machine: Away(entry.target, entry.request_id)}
            after = replace(before, away=MappingProxyType(away), stays=_without(before.stays, entry.machine))
        case Kind.STAYS | Kind.RENEWING:
            stays = dict(before.stays) | {entry.machine: entry.request_id}
            after = replace(before, stays=MappingProxyType(stays), away=_without(before.away, entry.machine))
        case Kind.RENEWED:
            after = replace(before, stays=_without(before.stays, entry.machine))
        case Kind.EMPTY:
            after = replace(before, empty=True)
        case Kind.UPDATED:
            after = replace(before, updated=True)
        case Kind.RETURNED:
            after = replace(before, away=_without(before.away, entry.machine))
        case Kind.DONE:
            after = replace(before, stage=Stage.DONE)
        case Kind.FAILED:
            after = replace(before, stage=Stage.FAILED, note=entry.note)
    return Progress(MappingProxyType(dict(progress.hosts) | {entry.host: after}))


def _without(known: Mapping[str, Value], machine: str) -> Mapping[str, Value]:
    return MappingProxyType({name: one for name, one in known.items() if name != machine})


def may_begin(plan: Plan, progress: Progress) -> list[str]:
    """The hosts that may begin now, in order; none while anything has failed."""
    if progress.failed:
        return []
    for domain in plan.order:
        left = [host.name for host in domain if progress.of(host.name).stage is not Stage.DONE]
        if left:
            room = plan.update.parallel - len(progress.down)
            waiting = [name for name in left if progress.of(name).stage is Stage.WAITING]
            return waiting[: max(0, room)]
    return []


def finished(plan: Plan, progress: Progress) -> bool:
    """Whether every host is done."""
    return all(progress.of(host.name).stage is Stage.DONE for host in plan.hosts)


def targets(plan: Plan, progress: Progress, leaving: str, machine_sets: Iterable[str] = ()) -> list[str]:
    """Where a host's machines may go meanwhile, the best first."""
    return [name for tier in tiers(plan, progress, leaving, machine_sets) for name in tier]


def tiers(plan: Plan, progress: Progress, leaving: str, machine_sets: Iterable[str] = ()) -> list[list[str]]:
    """The same, with those together that are as good as each other.

    Hosts that are up, and rather those that carry no machines of the same availability sets, that have been updated
    already, and that are in another fault domain.
    """
    wanted = plan.sets_of(leaving) | frozenset(machine_sets)
    here = plan.host(leaving)

    def rank(host: HostPlan) -> tuple[bool, bool, bool]:
        return (
            bool(wanted & plan.sets_of(host.name)),
            progress.of(host.name).stage is not Stage.DONE,
            host.fault_domain == here.fault_domain,
        )

    up = [
        host
        for host in plan.hosts
        if host.name not in progress.down
        and host.name != leaving
        and host.update_domain != here.update_domain
    ]
    ranked = sorted(up, key=lambda host: (rank(host), host.name))
    return [[host.name for host in group] for _, group in itertools.groupby(ranked, key=rank)]
