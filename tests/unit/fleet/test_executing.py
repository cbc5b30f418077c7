"""The update of a fleet over hosts that fail at random, and a run that is killed at any step and begun again."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.fleet.fleet_plans import host, plans
from vmferry.errors import PeerUnreachableError
from vmferry.fleet import rollout
from vmferry.fleet.executing import Update
from vmferry.fleet.hosts import HostFailedError, Hosts, Left, Resident
from vmferry.fleet.journal import Journal
from vmferry.fleet.plan import Plan, SetPlan, UpdatePlan
from vmferry.fleet.rollout import Entry, Kind, Progress, Stage
from vmferry.fleet.ways import Obstacle


class KilledError(Exception):
    """The run ends here and now."""


@dataclass
class Kept:
    """A journal that is kept whatever becomes of its writer."""

    world: Fleet
    entries: list[Entry] = field(default_factory=list)
    progress: Progress = field(default_factory=Progress)

    def write(self, entry: Entry) -> None:
        self.world.may_be_killed()
        self.progress = rollout.evolve(self.progress, entry)
        self.entries.append(entry)
        self.world.check()
        self.world.may_be_killed()


@dataclass
class Fleet:
    """Hosts that really keep account of their machines, and fail and are killed as chance has it."""

    plan: Plan
    choose: random.Random
    failures: float
    kills: float
    where: dict[str, str] = field(default_factory=dict)
    home: dict[str, str] = field(default_factory=dict)
    fixed: set[str] = field(default_factory=set)
    """Machines that can never be updated in place."""
    software: dict[str, int] = field(default_factory=dict)
    process: dict[str, int] = field(default_factory=dict)
    """The version of the software that runs a machine."""
    closed: set[str] = field(default_factory=set)
    """Hosts that take no newcomers."""
    touched: set[str] = field(default_factory=set)
    """Hosts that something was done to and that are not done."""

    def __post_init__(self) -> None:
        self.journal = Kept(self)
        for one in self.plan.hosts:
            for number in range(self.choose.randint(0, 3)):
                machine = f"{one.name}-m{number}"
                self.where[machine] = self.home[machine] = one.name
                self.process[machine] = 0
                if self.choose.random() < 0.4:
                    self.fixed.add(machine)
        self.software = {one.name: 0 for one in self.plan.hosts}

    def may_be_killed(self) -> None:
        if self.choose.random() < self.kills:
            raise KilledError

    async def step(self, name: str, *, touches: bool = False) -> None:
        """Whatever is done takes a moment, may fail, and may be the last thing that is done."""
        await asyncio.sleep(0)
        self.may_be_killed()
        if touches:
            self.touched.add(name)
            self.check()
        if self.choose.random() < self.failures:
            raise self.choose.choice([HostFailedError, PeerUnreachableError])("random")

    def check(self) -> None:
        """No two domains of one availability set are touched at once, nor is anything behind a host that failed."""
        progress = self.journal.progress
        self.touched = {name for name in self.touched if progress.of(name).stage is not Stage.DONE}
        assert self.touched <= set(progress.down), (
            "something is done to a host that has not begun, or is done"
        )
        for one in self.plan.sets:
            domains = {self.plan.host(name).update_domain for name in one.hosts if name in self.touched}
            assert len(domains) <= 1, (one, self.touched)
        assert len({self.plan.host(name).update_domain for name in self.touched}) <= 1
        assert len(progress.down) <= self.plan.update.parallel

    # Hosts

    async def machines(self, name: str) -> list[Resident]:
        await self.step(name)
        return [Resident(machine, machine) for machine, at in self.where.items() if at == name]

    async def obstacles(self, name: str, machine: str) -> list[Obstacle]:
        await self.step(name)
        assert self.where[machine] == name
        if machine in self.fixed:
            return [Obstacle("update.memory-not-shared", "its memory is its own")]
        if self.software[name] == 0:
            return [Obstacle("update.hypervisor-unusable", "not installed yet")]
        return []

    async def renew(self, name: str, machine: str, request_id: str) -> str:
        await self.step(name, touches=True)
        assert request_id
        assert self.where[machine] == name
        if self.choose.random() < self.failures:
            return "undone"
        self.process[machine] = self.software[name]
        self.may_be_killed()
        return ""

    async def drain(
        self, name: str, machines: Sequence[str], to: Sequence[str], patience_s: float, left: Left
    ) -> Mapping[str, str]:
        await self.step(name, touches=True)
        assert not set(to) & {name}
        self.closed.add(name)
        stays: dict[str, str] = {}
        for machine in machines:
            await self.step(name, touches=True)
            may = [one for one in to if one not in self.closed]
            if not may or self.choose.random() < self.failures:
                stays[machine] = "nobody takes it"
                continue
            self.arrive(machine, self.choose.choice(may))
            self.may_be_killed()
            left(machine, self.where[machine] if self.choose.random() < 0.8 else "")
        assert patience_s >= 0
        return stays

    def arrive(self, machine: str, name: str) -> None:
        """It runs there, in a process of what is installed there."""
        assert name not in self.closed
        self.where[machine] = name
        self.process[machine] = self.software[name]

    async def undrain(self, name: str) -> None:
        await self.step(name)
        self.closed.discard(name)

    async def owner(self, machine: str, first: Sequence[str]) -> str:
        await self.step(self.where[machine])
        assert all(one in self.software or one == "elsewhere" for one in first)
        return self.where[machine]

    async def bring(self, machine: str, source: str, to: str) -> None:
        await self.step(to, touches=True)
        assert self.where[machine] == source
        self.arrive(machine, to)
        self.may_be_killed()

    async def command(self, name: str) -> None:
        await self.step(name, touches=True)
        stay = [machine for machine, at in self.where.items() if at == name]
        assert not set(stay) & self.fixed, "the command runs with machines that cannot stay"
        assert self.plan.in_place or not stay
        self.software[name] = 1
        self.may_be_killed()

    async def wait_healthy(self, name: str) -> str:
        return await self.unhealthy(name)

    async def unhealthy(self, _name: str) -> str:
        await asyncio.sleep(0)
        self.may_be_killed()
        return "sick" if self.choose.random() < self.failures else ""


def run(fleet: Fleet) -> int:
    """Run it until it is done, as an operator does who mends what failed; returns how often that took."""
    for runs in range(1, 4000):
        if runs == 400:  # everything is mended in the end
            fleet.failures = fleet.kills = 0.0
        update = Update(fleet.plan, cast("Journal", fleet.journal), cast("Hosts", fleet), lambda _: None)
        try:
            why = asyncio.run(update.run())
        except KilledError:
            continue
        fleet.check()
        if not why and rollout.finished(fleet.plan, fleet.journal.progress):
            return runs
    pytest.fail("it did not come to its end")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(plans(), st.integers(0, 2**32))
def test_whatever_fails_and_wherever_it_is_killed(plan: Plan, seed: int) -> None:
    """Never two domains of a set at once, by what is really done; all hosts are updated and all machines home.

    Every machine runs in what its host has installed, whichever way it went; every host takes newcomers again.
    """
    for failures, kills in ((0.1, 0.0), (0.0, 0.1), (0.03, 0.03), (0.1, 0.1)):
        fleet = Fleet(plan, random.Random(seed), failures, kills)
        if len({one.update_domain for one in plan.hosts}) < 2 and (fleet.fixed or not plan.in_place):
            continue  # there is nowhere to go; see the next test
        run(fleet)
        assert fleet.where == fleet.home
        assert set(fleet.software.values()) == {1}
        assert all(fleet.process[machine] == 1 for machine in fleet.home)
        assert not fleet.closed
        updated = [one.host for one in fleet.journal.entries if one.kind is Kind.UPDATED]
        assert sorted(updated) == sorted(one.name for one in plan.hosts)


def test_a_machine_with_nowhere_to_go_halts_it_and_one_that_can_stay_does_not() -> None:
    """A fleet of one domain can only be updated beneath its machines."""
    alone = Plan((host("h0", 0),), update=UpdatePlan(command=("true",), in_place=True))
    for fixed in (True, False):
        fleet = Fleet(alone, random.Random(1), 0.0, 0.0)
        fleet.where = fleet.home = {"m": "h0"}
        fleet.process = {"m": 0}
        fleet.fixed = {"m"} if fixed else set()
        update = Update(alone, cast("Journal", fleet.journal), cast("Hosts", fleet), lambda _: None)
        why = asyncio.run(update.run())
        assert ("cannot be moved away: no other host is up" in why) is fixed
        assert fleet.software["h0"] == (0 if fixed else 1)


def test_one_that_cannot_stay_after_all_leaves_behind_the_command() -> None:
    """The new hypervisor turns out not to take it: it goes away, and comes back into what is there now."""
    plan = Plan(
        (host("h0", 0), host("h1", 1)),
        (SetPlan("s", ("h0", "h1")),),
        update=UpdatePlan(command=("true",), in_place=True),
    )
    fleet = Fleet(plan, random.Random(1), 0.0, 0.0)
    fleet.where, fleet.home, fleet.process, fleet.fixed = {"m": "h0"}, {"m": "h0"}, {"m": 0}, set()

    async def undone(_host: str, _machine: str, _request_id: str) -> str:
        return "update.cpu: it lacks avx2"

    fleet.renew = undone  # type: ignore[method-assign]
    said: list[str] = []
    update = Update(plan, cast("Journal", fleet.journal), cast("Hosts", fleet), said.append)
    assert asyncio.run(update.run()) == ""
    assert fleet.where == {"m": "h0"}
    kinds = [one.kind for one in fleet.journal.entries if one.host == "h0"]
    assert kinds.index(Kind.UPDATED) < kinds.index(Kind.LEAVING) < kinds.index(Kind.RETURNED)
    assert "m: leaves after all: update.cpu: it lacks avx2" in said
