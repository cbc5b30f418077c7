"""Updates in place of micro-VMs: the guest goes on in another process, or in the one it was in, and never in both."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import signal
import uuid
from pathlib import Path

import grpc.aio
import pytest

from tests.integration.hosts import Guest, World
from tests.integration.places import collecting
from tests.integration.services import DEADLINE_S, eventually, processes_with, refusal
from tests.integration.updates import armed, ask, ended, held, nothing_open, updates
from vmferry import failpoints
from vmferry.errors import IncompatibleError, MachineBusyError, UpdateNotFoundError
from vmferry.machines.beside import find_beside
from vmferry.machines.microvm import activity
from vmferry.machines.wire import spec_to_message
from vmferry.v1 import migration_pb2
from vmferry.v1 import update_pb2 as pb

pytestmark = pytest.mark.usefixtures("tidy")


def hypervisors(guest: Guest) -> list[int]:
    """All processes of the machine, by their command lines."""
    return processes_with(f"--uuid\0{guest.id}")


async def one_is_left(world: World, guest: Guest) -> int:
    """Wait until the update is settled, and return the one process that there is; its guest is unharmed."""
    await eventually(lambda: nothing_open(world.a, guest), "the update is settled")
    await eventually(lambda: len(hypervisors(guest)) == 1, "one process is left")
    (pid,) = hypervisors(guest)
    assert world.a.machine_pid(guest.id) == pid
    await guest.assert_clean(world.a)
    return pid


def never_two(folder: Path) -> None:
    """By what the processes noted themselves: no two of them executed within the same time."""
    spans = sorted((times[0], times[-1]) for path in folder.iterdir() if (times := activity.read(path)))
    for (_, end), (begin, _) in itertools.pairwise(spans):
        assert end < begin, spans


async def test_a_guest_goes_on_in_another_process(world: World) -> None:
    """Its memory is the same file, its pause is short, and its clock is right; three times in a row."""
    guest = await world.run(memory_mib=64)
    ram = world.a.record(guest.id).paths.ram
    inode = ram.stat().st_ino
    for _ in range(3):
        before = world.a.machine_pid(guest.id)
        done = await ended(world, await ask(world, guest))
        assert done.outcome == pb.UPDATE_OUTCOME_COMPLETED, done
        assert done.bytes_copied == 0
        assert done.memory_bytes == 64 << 20
        assert 0 < done.pause.ToMilliseconds() < 1000
        assert done.old_version == done.new_version
        assert done.clock.method == "clock-device"
        assert done.clock.measured
        assert abs(done.clock.offset_after_us) < 1000
        # By the guest's own clock: from its last instruction here to its first one there, within the pause.
        assert -done.pause.ToMicroseconds() <= done.clock.offset_before_us < 0
        assert done.pid != before
        assert await one_is_left(world, guest) == done.pid
    assert ram.stat().st_ino == inode


async def test_it_can_leave_and_be_updated_where_it_arrived(world: World) -> None:
    """A machine that was updated migrates as any other does."""
    guest = await world.run()
    assert (await ended(world, await ask(world, guest))).outcome == pb.UPDATE_OUTCOME_COMPLETED
    found = await world.ended(world.a, await world.start(guest, world.a, world.b))
    assert found.outcome == migration_pb2.MIGRATION_OUTCOME_COMPLETED, found
    await guest.assert_clean(world.b)


async def test_the_same_request_starts_one_update(world: World) -> None:
    """And what is asked about an update that nobody knows is refused by name."""
    guest = await world.run()
    request_id = str(uuid.uuid4())
    first = await ask(world, guest, request_id=request_id)
    assert (await ask(world, guest, request_id=request_id)).id == first.id
    await ended(world, first)
    assert (await ask(world, guest, request_id=request_id)).id == first.id
    async with updates(world) as stub:
        error = await refusal(stub.GetUpdate(pb.GetUpdateRequest(id="00"), timeout=DEADLINE_S))
        assert isinstance(error, UpdateNotFoundError)
        told = (await stub.GetUpdate(pb.GetUpdateRequest(id=first.id), timeout=DEADLINE_S)).update
    assert told.outcome == pb.UPDATE_OUTCOME_COMPLETED


PLACES = [name for name in failpoints.UPDATE if name not in {"update.recorded.undone", "update.given-back"}]


@pytest.mark.parametrize("places", [PLACES[1::2], pytest.param(PLACES[::2], marks=pytest.mark.slow)])
async def test_a_service_killed_at_any_step_leaves_one_process(
    world: World, tmp_path: Path, places: list[str]
) -> None:
    """The next start settles it: one process runs the guest, and two never did at once."""
    with collecting(tmp_path):
        guest = await world.run()
        for place in places:
            await armed(world, f"{place}=kill")
            with contextlib.suppress(grpc.aio.AioRpcError):
                await ask(world, guest)
            await eventually(lambda: not world.a.source.running, f"the service is killed at {place}")
            world.a.source.environment.clear()
            await world.a.source.start()
            await one_is_left(world, guest)
        done = await ended(world, await ask(world, guest))
        assert done.outcome == pb.UPDATE_OUTCOME_COMPLETED, done
        await one_is_left(world, guest)
        never_two(tmp_path)


@pytest.mark.parametrize("dies", ["old", "new"])
async def test_when_one_process_dies_the_other_goes_on(world: World, tmp_path: Path, dies: str) -> None:
    """Whichever is killed while both are there, at each step from where the guest's state is in the new one."""
    places = ["started", "paused", "state-saved", "loaded", "recorded.switched", "answered"]
    with collecting(tmp_path):
        guest = await world.run()
        for place in places if dies == "new" else places[2:]:
            asked = await held(world, guest, place)
            record = world.a.record(guest.id)
            new = find_beside(record.paths)
            assert new is not None
            assert record.process is not None
            victim = record.process if dies == "old" else new.process
            victim.send_signal(signal.SIGKILL)
            assert await victim.wait_ended(DEADLINE_S)
            world.a.source.signal(signal.SIGCONT)
            done = await ended(world, await asked)
            completed = dies == "old"
            wanted = pb.UPDATE_OUTCOME_COMPLETED if completed else pb.UPDATE_OUTCOME_ROLLED_BACK
            assert done.outcome == wanted, (place, done)
            pid = await one_is_left(world, guest)
            assert pid == (new.process.pid if completed else record.process.pid), place
        never_two(tmp_path)


async def test_an_old_process_that_dies_with_its_guests_state_is_a_crash(world: World) -> None:
    """Before the state was saved nobody else has it: that is said, and nothing is left open."""
    guest = await world.run()
    asked = await held(world, guest, "paused")
    old = world.a.record(guest.id).process
    assert old is not None
    old.send_signal(signal.SIGKILL)
    world.a.source.signal(signal.SIGCONT)
    done = await ended(world, await asked)
    assert done.outcome == pb.UPDATE_OUTCOME_LOST, done
    assert hypervisors(guest) == []
    assert nothing_open(world.a, guest)


@pytest.mark.parametrize("both", [False, True])
async def test_the_service_and_a_process_die_together(world: World, tmp_path: Path, *, both: bool) -> None:
    """Killed behind the commit point, with the new one dead that never ran: the old one goes on at the next start."""
    with collecting(tmp_path):
        guest = await world.run()
        asked = await held(world, guest, "recorded.switched")
        record = world.a.record(guest.id)
        new = find_beside(record.paths)
        assert new is not None
        if both:
            new.process.send_signal(signal.SIGKILL)
        await world.a.source.kill()
        world.a.source.environment.clear()
        await world.a.source.start()
        pid = await one_is_left(world, guest)
        assert pid == (record.pid if both else new.process.pid)
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)
        never_two(tmp_path)


@pytest.mark.slow
async def test_a_new_process_that_stands_still_for_20_s(world: World) -> None:
    """With the longest pause that is usual, and let go on after that: the old one has the guest long before."""
    guest = await world.run()
    before = world.a.machine_pid(guest.id)
    asked = await held(world, guest, "state-saved")
    new = find_beside(world.a.record(guest.id).paths)
    assert new is not None
    new.process.send_signal(signal.SIGSTOP)
    going_on = asyncio.get_running_loop().call_later(20, new.process.send_signal, signal.SIGCONT)
    try:
        world.a.source.signal(signal.SIGCONT)
        done = await ended(world, await asked)
        assert done.outcome == pb.UPDATE_OUTCOME_ROLLED_BACK, done
        assert done.pause.ToMilliseconds() < 20_000
        assert await one_is_left(world, guest) == before
    finally:
        going_on.cancel()


@pytest.mark.parametrize("place", ["state-saved", "recorded.switched"])
async def test_a_new_process_that_stands_still_loses_the_guest_to_the_old_one(
    world: World, place: str
) -> None:
    """Held for longer than the pause may last: the old one goes on, within the time that was allowed."""
    guest = await world.run()
    before = world.a.machine_pid(guest.id)
    asked = await held(world, guest, place, max_pause_s=2)
    new = find_beside(world.a.record(guest.id).paths)
    assert new is not None
    new.process.send_signal(signal.SIGSTOP)
    world.a.source.signal(signal.SIGCONT)
    done = await ended(world, await asked)
    assert done.outcome == pb.UPDATE_OUTCOME_ROLLED_BACK, done
    assert done.pause.ToMilliseconds() < 3000
    assert await one_is_left(world, guest) == before


async def test_an_update_and_a_migration_exclude_each_other(world: World) -> None:
    """While one is open the other one is refused by name."""
    guest = await world.run()
    asked = await held(world, guest, "loaded")
    order = world.order(guest, world.a, world.b)
    async with world.source(world.a) as stub:
        refused = asyncio.create_task(refusal(stub.StartMigration(order, timeout=DEADLINE_S)))
        await asyncio.sleep(0)
        world.a.source.signal(signal.SIGCONT)
        answered = await asked
        error = await refused
    assert isinstance(error, MachineBusyError)
    assert (await ended(world, answered)).outcome == pb.UPDATE_OUTCOME_COMPLETED
    world.a.source.environment[failpoints.VARIABLE] = "source.accepted=stop"
    await world.a.source.restart()
    migration = await world.start(guest, world.a, world.b)
    await eventually(lambda: world.a.source.status("State").startswith("T"), "the migration stands there")
    refused = asyncio.create_task(refusal(_asked(world, guest)))
    await asyncio.sleep(0)
    world.a.source.signal(signal.SIGCONT)
    assert isinstance(await refused, IncompatibleError)
    found = await world.ended(world.a, migration)
    assert found.outcome == migration_pb2.MIGRATION_OUTCOME_COMPLETED


async def _asked(world: World, guest: Guest) -> pb.UpdateInPlaceResponse:
    request = pb.UpdateInPlaceRequest(machine=guest.id, request_id=str(uuid.uuid4()))
    async with updates(world) as stub:
        return await stub.UpdateInPlace(request, timeout=DEADLINE_S)


async def test_every_reason_why_not_is_told(world: World) -> None:
    """A description that changes what the guest sees is refused field by field, and nothing was started."""
    guest = await world.run()
    changed = spec_to_message(guest.spec)
    changed.memory_mib += 16
    changed.microvm.mac = "52:54:00:00:00:01"
    request = pb.CheckUpdateRequest(machine=guest.id, target=pb.UpdateTarget(spec=changed))
    async with updates(world) as stub:
        answer = await stub.CheckUpdate(request, timeout=DEADLINE_S)
        fine = await stub.CheckUpdate(pb.CheckUpdateRequest(machine=guest.id), timeout=DEADLINE_S)
        order = pb.UpdateInPlaceRequest(machine=guest.id, request_id=str(uuid.uuid4()), target=request.target)
        error = await refusal(stub.UpdateInPlace(order, timeout=DEADLINE_S))
    assert {(one.id, one.object) for one in answer.obstacles} == {
        ("update.changes-guest", "memory_mib"),
        ("update.changes-guest", "microvm.mac"),
    }
    assert not answer.eligible
    assert fine.eligible
    assert not fine.obstacles
    assert isinstance(error, IncompatibleError)
    assert len(hypervisors(guest)) == 1
