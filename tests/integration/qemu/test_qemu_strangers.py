"""Guests that do as they please: each crosses, or it is said why not, and nothing is left."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.hosts import MIB, World
from tests.integration.proxy import Proxy
from tests.integration.qemu.leftovers import Chronicle, left_in_process
from tests.integration.qemu.strangers import Stranger, alive, run_stranger, stranger_spec
from tests.integration.services import eventually, eventually_async, open_trackers
from vmferry.machines.qemu.spec import NicSpec, QemuSpec
from vmferry.machines.spec import new_mac, new_qemu_spec
from vmferry.v1 import machine_pb2
from vmferry.v1 import migration_pb2 as pb

pytestmark = [pytest.mark.usefixtures("tidy"), pytest.mark.timeout(300)]

SLOW = MIB
# Turns processors off and on, reads every device it finds, and writes to a device whenever it is its turn.
RESTLESS = """
n=0
while :; do
  n=$((n + 1))
  echo $((n / 2 % 2)) >/sys/devices/system/cpu/cpu$((n % 2 + 1))/online
  cat /sys/bus/pci/devices/*/config /proc/interrupts /proc/iomem >/tmp/seen || echo BAD devices
  hwclock -u >/tmp/time || echo BAD clock
  ip link show eth0 >/tmp/link || echo BAD network
  dd if=/dev/urandom of=/tmp/$((n % 8)) bs=64k count=4 2>/dev/null
  echo "alive $n"
  usleep 200000
done
"""
REBOOTS = "echo came up\nsleep 2\nreboot -f\n"
PANICS = "echo came up\nsleep 2\necho c >/proc/sysrq-trigger\n"
SWITCHES_OFF = "echo came up\nsleep 3\necho going down\npoweroff -f\n"
SUSPENDS = "echo came up\necho mem >/sys/power/state\necho woke up\nsleep 1000\n"
IDLE = "echo came up\nexec sleep 100000\n"


async def arriving(world: World, guest: Stranger, link: Proxy) -> str:
    """Start a migration that stays in pre-copy until the link is fast again; returns its id."""
    link.up_bytes_per_s = SLOW
    link.begin_migration()
    migration_id = await world.start(guest, world.a, world.b, address=link.address, downtime_limit=1.0)
    await world.enters(world.a, migration_id, pb.MIGRATION_PHASE_PRECOPYING)
    return migration_id


async def assert_arrived(world: World, guest: Stranger, migration_id: str, says: str = "") -> None:
    """The migration completed, nothing is left behind, and the guest goes back, compared byte for byte.

    What it ``says`` from time to time it says where it went, and where it came back to.
    """
    migration = await world.ended(world.a, migration_id)
    assert migration.outcome == pb.MIGRATION_OUTCOME_COMPLETED, migration
    await world.assert_stays(guest, world.b, world.a)
    if says:
        await guest.says(world.b, says)
    back = await world.assert_crosses(
        guest, world.b, world.a, verify=pb.VERIFY_MODE_BYTES, downtime_limit=5.0
    )
    assert back.verification.different_pages == 0
    if says:
        await guest.says(world.a, says)
    assert left_in_process(world.a, guest) == []
    assert [open_trackers(service.pid) for service in world.services] == [[], [], [], []]


async def test_a_restless_guest_of_an_odd_size_crosses(
    world: World, images: Path, card_modules: list[Path]
) -> None:
    """Three processors that come and go, 97 MiB, an old machine type, a network card: it counts on without a hole."""
    spec = stranger_spec(
        images,
        RESTLESS,
        vcpus=3,
        modules=card_modules,
        nics=(NicSpec(backend="user", mac=new_mac()),),
    )
    guest = await run_stranger(world, spec)
    await guest.says(world.a, "alive ")
    here, there = world.a, world.b
    with Chronicle(guest) as chronicle:
        chronicle.follow(here)
        for _ in range(4):
            await world.assert_crosses(guest, here, there)
            here, there = there, here
            chronicle.follow(here)
            assert left_in_process(here, guest) == []
        said = alive(chronicle.text())
    assert said == list(range(1, len(said) + 1))


@pytest.mark.parametrize(
    ("script", "append"),
    [(REBOOTS, "quiet loglevel=0"), (PANICS, "quiet loglevel=0 panic=-1")],
    ids=["reboots", "panics"],
)
async def test_a_guest_that_starts_anew_on_the_way_arrives(
    world: World, images: Path, link: Proxy, script: str, append: str
) -> None:
    """Its firmware and kernel are written anew while memory is being copied: it starts anew where it went, too."""
    guest = await run_stranger(world, stranger_spec(images, script, append=append), speaks=False)
    await guest.says(world.a, "came up")
    migration_id = await arriving(world, guest, link)
    await guest.says(world.a, "came up", guest.count(world.a, "came up") + 1)
    link.up_bytes_per_s = None
    await assert_arrived(world, guest, migration_id, "came up")


async def test_a_guest_that_switches_itself_off_on_the_way_is_told_as_dead(
    world: World, images: Path, link: Proxy
) -> None:
    """Its process ends in pre-copy: the migration fails for that reason, and no copy stays at the destination."""
    guest = await run_stranger(world, stranger_spec(images, SWITCHES_OFF), speaks=False)
    await guest.says(world.a, "came up")
    migration_id = await arriving(world, guest, link)
    process = world.a.record(guest.id).process
    assert process is not None
    assert await process.wait_ended(60.0)
    link.up_bytes_per_s = None
    migration = await world.ended(world.a, migration_id)
    assert migration.outcome == pb.MIGRATION_OUTCOME_FAILED, migration
    assert migration.reason.reason == "MACHINE_DEAD", migration.reason
    assert migration.owner == world.a.identity.uri
    assert (await world.machine(world.a, guest)).state == machine_pb2.MACHINE_STATE_DEAD
    await eventually(lambda: not world.b.holdings(guest.spec), "the destination holds nothing")
    assert not world.b.ledger.rights(guest.id).permitted
    assert "going down" in guest.serial(world.a)


async def test_a_guest_that_has_panicked_for_good_crosses_as_it_is(
    world: World, images: Path, link: Proxy
) -> None:
    """A kernel that gave up is a running machine all the same; it is moved, bit by bit as it is."""
    spec = stranger_spec(images, PANICS, append="console=ttyS0 quiet panic=0", machine="q35")
    guest = await run_stranger(world, spec, speaks=False)
    await guest.says(world.a, "end Kernel panic")
    await assert_arrived(world, guest, await world.start(guest, world.a, world.b))


async def test_a_guest_that_does_nothing_crosses(world: World, images: Path) -> None:
    """All processors asleep, nothing written: it crosses, compared byte for byte."""
    guest = await run_stranger(world, stranger_spec(images, IDLE, vcpus=2), speaks=False)
    await guest.says(world.a, "came up")
    await assert_arrived(world, guest, await world.start(guest, world.a, world.b))


async def test_a_machine_with_nothing_to_boot_crosses(world: World) -> None:
    """Firmware alone, looking for a disk that is not there."""
    part = QemuSpec(accelerator="tcg", machine="pc")
    guest = await run_stranger(world, new_qemu_spec("empty-handed", 33, 3, part), speaks=False)
    await assert_arrived(world, guest, await world.start(guest, world.a, world.b))


async def test_a_guest_that_sleeps_is_not_moved_and_not_disturbed(world: World, images: Path) -> None:
    """In S3 QEMU has no way to hold it still: the migration fails saying so, and the guest sleeps on."""
    guest = await run_stranger(world, stranger_spec(images, SUSPENDS, machine="q35"), speaks=False)
    await guest.says(world.a, "came up")
    machine = world.a.directory.open(world.a.record(guest.id), observe=True)
    try:

        async def sleeps() -> bool:
            return bool((await machine._monitor.execute("query-status"))["status"] == "suspended")

        await eventually_async(sleeps, "the guest sleeps")
    finally:
        await machine.close()
    migration = await world.ended(world.a, await world.start(guest, world.a, world.b))
    assert "asleep" in migration.reason.message
    assert migration.outcome == pb.MIGRATION_OUTCOME_FAILED
    await world.assert_stays(guest, world.a, world.b)
    assert left_in_process(world.a, guest) == []
    assert "woke up" not in guest.serial(world.a)
