"""A Linux guest in QEMU that is told of its migration over its own network card, by a busybox's wget and nc."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.integration.hosts import World, open_world
from tests.integration.qemu.conftest import SPEAKS_S, LinuxGuest, boot, linux_spec
from tests.integration.services import Host, eventually
from vmferry.events.files import BoardFiles
from vmferry.machines.qemu import guest as linux
from vmferry.machines.qemu.guest.verdict import Told
from vmferry.machines.qemu.spec import NicSpec
from vmferry.machines.spec import MachineSpec, new_mac
from vmferry.v1 import migration_pb2 as pb

pytestmark = [pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
async def world(images: Path) -> AsyncIterator[World]:
    """Hosts a and b, which give their guests a notice."""
    async with open_world(image_roots=(images,), downtime_limit_ms=1000, event_notice_s=120.0) as opened:
        yield opened


def events_spec(images: Path, modules: list[Path], way: str) -> MachineSpec:
    """The Linux guest, with a card on which the metadata service answers."""
    path = images / "initrd-events"
    if not path.exists():
        path.write_bytes(linux.initramfs(modules=modules))
    spec = linux_spec(images, files=2)
    assert spec.qemu is not None
    nic = NicSpec(backend="user", mac=new_mac(), metadata=True)
    append = f"{spec.qemu.append} vf.ip=169.254.169.15/24 vf.events={way}"
    return replace(
        spec, guest_name="WestNO_0", qemu=replace(spec.qemu, initrd=str(path), append=append, nics=(nic,))
    )


async def told(guest: LinuxGuest, host: Host, status: str) -> Told:
    """What the guest says that it was told, once that is so far."""

    def newest() -> Told | None:
        try:
            found = guest.verdict(host).told
        except FileNotFoundError:  # it has gone from here
            return None
        return found[-1] if found and found[-1].status == status else None

    found = await eventually(newest, f"the guest is told {status}", seconds=SPEAKS_S)
    assert found is not None
    return found


async def test_a_guest_approves_its_migrations_over_its_own_network(
    world: World, images: Path, card_modules: list[Path]
) -> None:
    """There and back: it is asked, approves with nc, crosses long before its time, and reads on with wget.

    The numbers of the documents that it reads only grow, whichever host answers.
    """
    guest = await boot(world, events_spec(images, card_modules, "ack"))
    try:
        last = await told(guest, world.a, "none")
        for here, there in ((world.a, world.b), (world.b, world.a)):
            migration_id = await world.start(guest, here, there)
            asked = await told(guest, here, "Scheduled")
            assert asked.number > last.number
            migration = await world.ended(here, migration_id)
            assert migration.outcome == pb.MIGRATION_OUTCOME_COMPLETED, migration
            assert migration.total.ToSeconds() < 100
            assert asked.event_id == migration.event_id
            past = BoardFiles(here.config.events_dir).load(guest.id).outcome(migration.event_id)
            assert past is not None
            assert past.event.approved_by == "WestNO_0"
            last = await told(guest, there, "none")
            assert last.number > asked.number
            # It was still holding its connection when it crossed.
            await eventually(
                lambda there=there, done=(asked.event_id, "HTTP/1.1 200 OK"): (
                    done in guest.verdict(there).approved
                ),
                "the guest says how its approval was answered",
            )
            await guest.assert_clean(there)
    finally:
        assert await world.end_guests() == []


async def test_a_guest_that_only_watches_is_waited_for_to_the_end_of_the_notice(
    world: World, images: Path, card_modules: list[Path]
) -> None:
    """It is told, says nothing, and crosses when its time has come."""
    guest = await boot(world, events_spec(images, card_modules, "watch"))
    try:
        await told(guest, world.a, "none")
        migration_id = await world.start(guest, world.a, world.b, notice=3.0)
        asked = await told(guest, world.a, "Scheduled")
        migration = await world.ended(world.a, migration_id)
        assert migration.outcome == pb.MIGRATION_OUTCOME_COMPLETED, migration
        assert asked.event_id == migration.event_id
        after = await told(guest, world.b, "none")
        assert after.number > asked.number
        assert guest.verdict(world.b).approved == ()
        await guest.assert_clean(world.b)
    finally:
        assert await world.end_guests() == []
