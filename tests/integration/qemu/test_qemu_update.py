"""Updates in place of QEMU machines: a Linux guest goes on counting in another process, or in the one it was in."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import grpc.aio
import pytest

from tests.integration.hosts import World, open_world
from tests.integration.qemu.conftest import QEMU, LinuxGuest, boot, linux_spec
from tests.integration.services import DEADLINE_S, eventually, processes_with
from tests.integration.updates import armed, ask, ended, held, nothing_open, updates
from vmferry import failpoints
from vmferry.machines.beside import find_beside
from vmferry.machines.qemu import probe
from vmferry.memory.backings import ANONYMOUS, MEMFD
from vmferry.v1 import update_pb2 as pb

NEWER = os.environ.get("VMFERRY_QEMU_NEWER", "")

pytestmark = [pytest.mark.usefixtures("tidy"), pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
async def world(images: Path) -> AsyncIterator[World]:
    """Hosts that may use both releases, where there are two."""
    binaries = (QEMU, *((Path(NEWER),) if NEWER else ()))
    async with open_world("ab", image_roots=(images,), qemu_binaries=binaries) as opened:
        yield opened


async def unharmed(world: World, guest: LinuxGuest) -> int:
    """The one process that there is, whose guest counts on without a hole and finds its files as they were."""
    await eventually(lambda: nothing_open(world.a, guest), "the update is settled")
    await eventually(lambda: len(processes_with(guest.id)) == 1, "one process is left")
    (pid,) = processes_with(guest.id)
    assert world.a.machine_pid(guest.id) == pid
    await guest.assert_clean(world.a)
    return pid


async def test_a_linux_guest_goes_on_in_another_process(world: World, images: Path) -> None:
    """Twice in a row, then with one that is killed, and one that stands still; its clock is said to be behind."""
    guest = await boot(world, linux_spec(images, vcpus=2, nics=1))
    for _ in range(2):
        before = world.a.machine_pid(guest.id)
        done = await ended(world, await ask(world, guest))
        assert done.outcome == pb.UPDATE_OUTCOME_COMPLETED, done
        assert done.bytes_copied == 0
        assert done.old_version == done.new_version == probe.probe_binary(str(QEMU)).version_text
        assert (done.clock.method, done.clock.measured) == ("rtc", False)
        assert done.clock.offset_before_us == done.clock.offset_after_us < 0
        assert "hwclock" in done.clock.note
        assert await unharmed(world, guest) == done.pid != before
    for number in (signal.SIGKILL, signal.SIGSTOP):
        before = world.a.machine_pid(guest.id)
        asked = await held(world, guest, "loaded", max_pause_s=3)
        new = find_beside(world.a.record(guest.id).paths)
        assert new is not None
        new.process.send_signal(number)
        world.a.source.signal(signal.SIGCONT)
        done = await ended(world, await asked)
        assert done.outcome == pb.UPDATE_OUTCOME_ROLLED_BACK, done
        assert await unharmed(world, guest) == before
    world.a.source.environment.clear()
    await world.a.source.restart()


@pytest.mark.slow
async def test_memory_without_a_name_is_shared_too(world: World, images: Path) -> None:
    """The second process inherits the memory file of the first; memory of QEMU's own is refused by name."""
    spec = linux_spec(images, vcpus=1, nics=0)
    assert spec.qemu is not None
    guest = await boot(world, replace(spec, qemu=replace(spec.qemu, memory_backing=MEMFD)))
    done = await ended(world, await ask(world, guest))
    assert done.outcome == pb.UPDATE_OUTCOME_COMPLETED, done
    assert await unharmed(world, guest) == done.pid
    other = linux_spec(images, vcpus=1, nics=0)
    assert other.qemu is not None
    private = await boot(world, replace(other, qemu=replace(other.qemu, memory_backing=ANONYMOUS)))
    request = pb.CheckUpdateRequest(
        machine=private.id, target=pb.UpdateTarget(qemu_binary="/opt/none/qemu-system-x86_64")
    )
    async with updates(world) as stub:
        found = await stub.CheckUpdate(request, timeout=DEADLINE_S)
    assert {one.id for one in found.obstacles} == {
        "update.memory-not-shared",
        "update.hypervisor-not-allowed",
    }


@pytest.mark.slow
async def test_a_service_killed_wherever_it_matters_leaves_one_process(world: World, images: Path) -> None:
    """The next start settles it: one process runs the guest, which has missed nothing and counts on.

    Every other place is killed with micro-VMs.
    """
    guest = await boot(world, linux_spec(images, vcpus=1, nics=0))
    for place in ("paused", "loaded", "recorded.switched", "resumed"):
        assert f"update.{place}" in failpoints.UPDATE
        await armed(world, f"update.{place}=kill")
        with contextlib.suppress(grpc.aio.AioRpcError):
            await ask(world, guest)
        await eventually(lambda: not world.a.source.running, "the service is killed")
        world.a.source.environment.clear()
        await world.a.source.start()
        await unharmed(world, guest)
    done = await ended(world, await ask(world, guest))
    assert done.outcome == pb.UPDATE_OUTCOME_COMPLETED, done
    assert await unharmed(world, guest) == done.pid


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [20])
async def test_a_new_process_that_stands_still_for_long(world: World, images: Path, seconds: int) -> None:
    """Stopped for 20 s in the middle, with the longest pause that is usual: the old one goes on long before."""
    guest = await boot(world, linux_spec(images, vcpus=1, nics=0))
    before = world.a.machine_pid(guest.id)
    asked = await held(world, guest, "state-saved")
    new = find_beside(world.a.record(guest.id).paths)
    assert new is not None
    new.process.send_signal(signal.SIGSTOP)
    world.a.source.signal(signal.SIGCONT)
    done = await asyncio.wait_for(ended(world, await asked), seconds)
    assert done.outcome == pb.UPDATE_OUTCOME_ROLLED_BACK, done
    assert await unharmed(world, guest) == before
    world.a.source.environment.clear()
    await world.a.source.restart()


@pytest.mark.skipif(not NEWER, reason="VMFERRY_QEMU_NEWER names no second QEMU (scripts/newer_qemu.py)")
async def test_a_guest_goes_on_in_a_newer_release(world: World, images: Path) -> None:
    """The real case: the hypervisor is another release afterwards, and the guest has not noticed."""
    guest = await boot(world, linux_spec(images, vcpus=2, nics=1))
    done = await ended(world, await ask(world, guest, qemu_binary=NEWER))
    assert done.outcome == pb.UPDATE_OUTCOME_COMPLETED, done
    assert done.old_version == probe.probe_binary(str(QEMU)).version_text
    assert done.new_version == probe.probe_binary(NEWER).version_text != done.old_version
    assert await unharmed(world, guest) == done.pid
    record = world.a.record(guest.id)
    assert record.spec.qemu is not None
    assert record.spec.qemu.binary == NEWER
