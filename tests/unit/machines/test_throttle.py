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
from vmferry.machines.cpulimit import RECORD, CpuLimit, restore, restore_all
from vmferry.machines.port import RunState
from vmferry.machines.throttle import Means, Throttle


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

    def __init__(self, folder: Path, limit: CpuLimit | None) -> None:
        self.ledger = HostLedger(folder)
        self.ledger.birth(MACHINE)
        self.journal: MachineJournal[Any] = self.ledger.open_source(MACHINE)
        self.add(RecordKind.BEGUN)
        self.hypervisor = Hypervisor()
        self.throttle = Throttle(self.hypervisor, lambda: self.ledger.held_back(MACHINE), lambda: limit)  # type: ignore[arg-type]

    def add(self, kind: RecordKind) -> None:
        self.journal.append(Append(record(kind, attempt(1, epoch=1)), durable=True))


@asynccontextmanager
async def copying(folder: Path, limit: CpuLimit | None = None) -> AsyncIterator[Copying]:
    found = Copying(folder, limit)
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


# A group's files, as far as they are read and written: a kernel that lets groups be limited is not everywhere.
PID = 4711


def group(tmp_path: Path, limit: str = "max 100000", name: str = "web.scope") -> Path:
    """The files of a group that the process PID is alone in."""
    folder = tmp_path / "cgroup" / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cgroup.procs").write_text(f"{PID}\n")
    (folder / "cpu.max").write_text(limit + "\n")
    process = tmp_path / "proc" / str(PID)
    process.mkdir(parents=True)
    (process / "cgroup").write_text(f"1:name=systemd:/else\n0::/{name}\n")
    return folder


def find(tmp_path: Path, vcpus: int = 1) -> CpuLimit | None:
    return CpuLimit.find(
        PID, tmp_path, vcpus, mounted_at=(tmp_path / "none", tmp_path / "cgroup"), processes=tmp_path / "proc"
    )


def said(folder: Path) -> str:
    return (folder / "cpu.max").read_text().strip()


async def test_a_group_of_its_own_is_limited_instead(tmp_path: Path) -> None:
    """The guest is never held, its group gets a part of what it had, and in the end what it had."""
    folder = group(tmp_path, "50000 100000")
    async with copying(tmp_path / "journal", find(tmp_path)) as world:
        world.throttle.set(40)
        assert world.throttle.means is Means.CPU_LIMIT
        assert said(folder) == "6000 20000"
        world.throttle.set(95)
        assert said(folder) == "1000 20000"
        await world.throttle.end()
        assert said(folder) == "50000 100000"
        assert (world.hypervisor.stops, world.throttle.used) == (0, False)
        assert not (tmp_path / RECORD).exists()


def test_a_group_of_version_1_is_limited_as_well(tmp_path: Path) -> None:
    """Where processors are there: by the quota alone, in the period that it has, and undone from the record."""
    process = tmp_path / "proc" / str(PID)
    process.mkdir(parents=True)
    (process / "cgroup").write_text("4:cpu,cpuacct:/web\n0::/\n")
    folder = tmp_path / "cpu" / "web"
    folder.mkdir(parents=True)
    for name, text in (("cgroup.procs", PID), ("cpu.cfs_quota_us", -1), ("cpu.cfs_period_us", 100_000)):
        (folder / name).write_text(f"{text}\n")
    limit = CpuLimit.find(
        PID, tmp_path, 1, mounted_at=(), v1_mounted_at=(tmp_path / "cpu",), processes=tmp_path / "proc"
    )
    assert limit is not None
    limit.take(60)
    assert (folder / "cpu.cfs_quota_us").read_text() == "40000"
    assert (folder / "cpu.cfs_period_us").read_text() == "100000\n"
    assert restore(tmp_path)
    assert (folder / "cpu.cfs_quota_us").read_text() == "-1"


def test_a_limit_that_was_left_is_restored_by_the_next(tmp_path: Path) -> None:
    """From the record alone; without one nothing is done, and a group that has gone is no reason to complain."""
    folder = group(tmp_path)
    limit = find(tmp_path)
    assert limit is not None
    assert not restore(tmp_path)
    limit.take(60)
    assert said(folder) == "8000 20000"
    assert restore(tmp_path)
    assert said(folder) == "max 100000"
    limit.take(60)
    restore_all(tmp_path.parent)
    assert said(folder) == "max 100000"
    limit.take(60)
    (folder / "cpu.max").unlink()
    assert restore(tmp_path)
    assert not (tmp_path / RECORD).exists()


async def test_a_limit_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    """The guest is held still instead."""
    folder = group(tmp_path)
    limit = find(tmp_path)
    (folder / "cpu.max").unlink()
    async with copying(tmp_path / "journal", limit) as world:
        world.throttle.set(40)
        assert world.throttle.means is Means.DUTY_CYCLE
        await eventually(lambda: world.hypervisor.stops, "it is held")
        await world.throttle.end()
        assert world.hypervisor.state is RunState.RUNNING


@pytest.mark.parametrize("spoilt", ["shared", "children", "no limit", "the root"])
def test_only_a_group_of_its_own_is_used(tmp_path: Path, spoilt: str) -> None:
    """Nothing is limited that others are in, or that has no limit; the root of all groups never."""
    folder = group(tmp_path, name="" if spoilt == "the root" else "web.scope")
    match spoilt:
        case "shared":
            (folder / "cgroup.procs").write_text(f"{PID}\n1\n")
        case "children":
            (folder / "child").mkdir()
        case "no limit":
            (folder / "cpu.max").unlink()
    assert find(tmp_path) is None
