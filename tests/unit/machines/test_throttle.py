"""A guest is held back by as much as was asked for, let go whatever happens, and never let go for anybody else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import pytest

from tests.integration.services import eventually
from tests.unit.handoff.samples import MACHINE, attempt, record
from vmferry.errors import MachineFailedError, MachineNotOwnedError
from vmferry.handoff.gate import ResumePermit
from vmferry.handoff.ledger import HostLedger, MachineJournal
from vmferry.handoff.states import Append, RecordKind
from vmferry.machines.port import RunState
from vmferry.machines.throttle import Throttle


class Hypervisor:
    """As much of a machine as a throttle asks of it; the port's other methods must not be called."""

    def __init__(self) -> None:
        self.state = RunState.RUNNING
        self.stops = 0
        self.refuses_cont = 0

    @property
    def spec(self) -> Any:
        class Spec:
            name = "web"

        return Spec

    async def run_state(self) -> RunState:
        return self.state

    async def stop(self) -> None:
        await asyncio.sleep(0)
        self.stops += 1
        self.state = RunState.PAUSED

    async def cont(self, permit: ResumePermit) -> None:
        assert permit.machine_id == MACHINE
        if self.refuses_cont:
            self.refuses_cont -= 1
            raise MachineFailedError("it does not want to")
        self.state = RunState.RUNNING


class Copying:
    """A machine that is owned here, with an attempt open that takes it away."""

    def __init__(self, folder: Path) -> None:
        self.ledger = HostLedger(folder)
        self.ledger.birth(MACHINE)
        self.journal: MachineJournal[Any] = self.ledger.open_source(MACHINE)
        self.add(RecordKind.BEGUN)
        self.hypervisor = Hypervisor()
        self.throttle = Throttle(self.hypervisor, lambda: self.ledger.held_back(MACHINE))  # type: ignore[arg-type]

    def add(self, kind: RecordKind) -> None:
        self.journal.append(Append(record(kind, attempt(1, epoch=1)), durable=True))


@asynccontextmanager
async def copying(folder: Path) -> AsyncIterator[Copying]:
    found = Copying(folder)
    with closing(found.journal):
        yield found


async def test_it_is_held_and_let_go_in_turn(tmp_path: Path) -> None:
    """Again and again until the end, and from then on never."""
    async with copying(tmp_path) as world:
        world.throttle.set(40)
        assert world.throttle.percent == 40
        await eventually(lambda: world.hypervisor.stops > 2, "it is held again and again")
        await world.throttle.end()
        stops = world.hypervisor.stops
        assert world.hypervisor.state is RunState.RUNNING
        assert world.throttle.percent == 0
        world.throttle.set(90)
        await world.throttle.end()
        assert (world.hypervisor.stops, world.throttle.used) == (stops, True)


async def test_a_guest_that_stands_still_by_itself_is_left_alone(tmp_path: Path) -> None:
    """What somebody else has paused is not resumed."""
    async with copying(tmp_path) as world:
        world.hypervisor.state = RunState.PAUSED
        world.throttle.set(50)
        await asyncio.sleep(0.15)  # one and a half periods, in which nothing may happen
        await world.throttle.end()
        assert (world.hypervisor.state, world.hypervisor.stops) == (RunState.PAUSED, 0)


async def test_a_refusal_is_told_and_made_up_for(tmp_path: Path) -> None:
    """A guest that could not be let go is not held any further; the end tries once more."""
    async with copying(tmp_path) as world:
        world.hypervisor.refuses_cont = 1
        world.throttle.set(50)

        def told() -> bool:
            try:
                world.throttle.set(50)
            except MachineFailedError:
                return True
            return False

        await eventually(told, "what went wrong is told")
        assert world.hypervisor.state is RunState.PAUSED
        await world.throttle.end()
        assert world.hypervisor.state is RunState.RUNNING


async def test_an_end_that_is_cancelled_still_lets_the_guest_go(tmp_path: Path) -> None:
    """Whoever is cancelled while ending it has ended it."""
    async with copying(tmp_path) as world:
        world.throttle.set(95)
        await eventually(lambda: world.hypervisor.state is RunState.PAUSED, "it is held")
        ending = asyncio.create_task(world.throttle.end())
        await asyncio.sleep(0)
        ending.cancel()
        await asyncio.wait({ending})
        assert world.hypervisor.state is RunState.RUNNING


@pytest.mark.parametrize("kinds", [[RecordKind.SEALED], [RecordKind.SEALED, RecordKind.HANDED_OFF]])
async def test_nothing_is_let_go_from_the_seal_on(tmp_path: Path, kinds: list[RecordKind]) -> None:
    """Even a throttle that nobody has ended cannot undo the pause of a hand-off."""
    async with copying(tmp_path) as world:
        world.throttle.set(95)
        await eventually(lambda: world.hypervisor.state is RunState.PAUSED, "it is held")
        for kind in kinds:
            world.add(kind)
        with pytest.raises(MachineNotOwnedError):
            await world.throttle.end()
        assert world.hypervisor.state is RunState.PAUSED
