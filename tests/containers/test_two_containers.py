"""Two hosts in containers, as deploy/compose.yaml has them: guests cross, and survive what happens to containers."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from tests.containers.hosts import MIB, TwoContainers, new_canary, new_linux
from tests.containers.podman import podman
from tests.integration.services import eventually, eventually_async
from vmferry.client import SourceClient, Target
from vmferry.v1 import machine_pb2
from vmferry.v1 import migration_pb2 as pb
from vmferry.v1.drain_pb2 import DRAIN_STATE_DRAINED, DRAIN_STATE_STUCK

pytestmark = pytest.mark.timeout(580)

SLOW = 2 * MIB
"""Bytes a second at which copying lasts long enough to be disturbed."""


def test_it_needs_neither_root_nor_any_capability(world: TwoContainers) -> None:
    """The first process and a service: their own user, no capability, no way to more, and our system call filter."""
    for host in (world.a, world.b):
        for pid in (host.container.pid, *host.processes("source_svc"), *host.processes("dest_svc")):
            status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
            values = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
            assert values["Uid"].split() == ["7601"] * 4
            assert {values[name] for name in ("CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
            assert values["NoNewPrivs"] == "1"
            assert values["Seccomp"] == "2"
    (best, *_) = json.loads(world.a.container.exec("vmferry", "probe", "--json"))["trackers"]
    assert (best["kind"], best["usable"]) == ("pagemap-scan", True)


async def test_a_micro_vm_crosses_and_the_collector_hears_of_both_hosts(world: TwoContainers) -> None:
    """It goes there and back; the collector has one trace of it, with spans of both containers."""
    guest = new_canary()
    world.a.run(guest.spec)
    await guest.speaks(world.a)
    migration = await guest.assert_crosses(world.a, world.b)
    await guest.assert_crosses(world.b, world.a)

    def hosts() -> set[str]:
        return {span["host"] for span in world.collected() if _trace_id(span) == migration.trace_id}

    await eventually(lambda: hosts() == {"a", "b"}, "the collector has spans of both hosts")
    world.a.container.exec("vmferry", "machine", "stop", guest.spec.name)


async def test_a_linux_guest_in_qemu_crosses_with_its_writes_tracked(world: TwoContainers) -> None:
    """Memory goes the direct way, by the tracker that operates on QEMU's process; then the image is proven whole."""
    guest = new_linux()
    world.a.run(guest.spec)
    await guest.speaks(world.a)
    migration = await guest.assert_crosses(world.a, world.b)
    assert (migration.path, migration.tracker) == ("direct", "pagemap-scan")
    await guest.assert_crosses(world.b, world.a)
    world.a.container.exec("vmferry", "machine", "stop", guest.spec.name)


async def test_machines_survive_their_services(world: TwoContainers) -> None:
    """Both services of a host are killed: they come back, the machine never noticed, and it can go home."""
    guest = new_canary()
    world.a.run(guest.spec)
    await guest.speaks(world.a)
    await guest.assert_crosses(world.a, world.b)
    (pid,) = world.b.processes(f"{guest.spec.name}/")
    for service in ("source_svc", "dest_svc"):
        (victim,) = world.b.processes(service)
        podman("exec", world.b.container.name, "python3", "-c", _KILL, service)
        await eventually(
            lambda old=victim: not Path(f"/proc/{old}").exists(), "the service is dead and collected"
        )
    world.b.container.wait_healthy()
    assert world.b.processes(f"{guest.spec.name}/") == [pid]
    await guest.assert_only_on(world.b, world.a)
    await guest.assert_crosses(world.b, world.a)
    world.a.container.exec("vmferry", "machine", "stop", guest.spec.name)


async def test_the_destination_loses_power_in_the_middle(world: TwoContainers) -> None:
    """The guest runs on where it was; once the other host is back, it crosses."""
    guest = new_canary()
    world.a.run(guest.spec)
    await guest.speaks(world.a)
    migration_id = await world.a.start(guest.spec, world.b, max_bandwidth=SLOW)
    await world.a.copies(migration_id)
    world.b.container.kill()
    await guest.assert_well(world.a)
    migration = await world.a.ended(migration_id)
    assert migration.outcome == pb.MIGRATION_OUTCOME_FAILED
    assert migration.reason.reason == "PEER_UNREACHABLE"
    world.b.container.start()
    world.b.container.wait_healthy()
    await guest.assert_only_on(world.a, world.b)
    await guest.assert_crosses(world.a, world.b)
    world.b.container.exec("vmferry", "machine", "stop", guest.spec.name)


async def test_a_host_is_emptied_and_its_destination_loses_power(world: TwoContainers) -> None:
    """What was on its way runs on; the drain says who does not answer, and until when; then the host is emptied."""
    guests = [new_canary() for _ in range(3)]
    for guest in guests:
        world.a.run(guest.spec)
        await guest.speaks(world.a)
    there = Target(world.b.identity.uri, f"{world.b.name}:7602")
    operator = world.a.fleet.volume("tls") / "operator"
    async with SourceClient.open(f"{world.a.container.address}:7601", world.a.identity.uri, operator) as a:
        try:
            await a.drain([there], options=pb.MigrationOptions(max_bandwidth=SLOW))

            async def copying() -> list[str]:
                found = await a.history(open_only=True)
                return [one.id for one in found if one.progress.sent_bytes >= MIB]

            await eventually_async(copying, "machines are on their way", seconds=60)
            world.b.container.kill()

            async def told() -> bool:
                found = await a.get_drain()
                reasons = {one.reason for item in found.machines for one in item.obstacles}
                assert all(item.obstacles for item in found.machines) or found.state != DRAIN_STATE_STUCK
                rests = "b does not answer as it should and is left alone until" in found.activity
                return found.state == DRAIN_STATE_STUCK and reasons == {"PEER_UNREACHABLE"} and rests

            await eventually_async(told, "it says that host b does not answer", seconds=60)
            for guest in guests:
                await guest.assert_well(world.a)
            world.b.container.start()
            world.b.container.wait_healthy()
            await a.drain([there])  # or wait: it tries again by itself

            async def empty() -> bool:
                return (await a.get_drain()).state == DRAIN_STATE_DRAINED

            await eventually_async(empty, "the host is empty", seconds=60)
        finally:
            await a.undrain()
    for guest in guests:
        await guest.assert_only_on(world.b, world.a)
        world.b.container.exec("vmferry", "machine", "stop", guest.spec.name)


async def test_the_source_loses_power_in_the_middle(world: TwoContainers) -> None:
    """The machine is gone with its container; nobody else runs it, its host may boot it, and then it crosses."""
    guest = new_canary()
    world.a.run(guest.spec)
    await guest.speaks(world.a)
    migration_id = await world.a.start(guest.spec, world.b, max_bandwidth=SLOW)
    await world.a.copies(migration_id)
    world.a.container.kill()
    await eventually(lambda: not world.b.holdings(guest.spec), "the destination gave up what it had")
    assert not world.b.ledger.rights(guest.spec.uuid).permitted
    world.a.container.start()
    world.a.container.wait_healthy()
    await eventually(lambda: world.a.ledger.rights(guest.spec.uuid).permitted, "it is the source's again")
    world.a.run(guest.spec)
    await guest.assert_only_on(world.a, world.b)
    await guest.assert_crosses(world.a, world.b)
    world.b.container.exec("vmferry", "machine", "stop", guest.spec.name)


async def test_the_network_is_cut_for_a_moment(world: TwoContainers) -> None:
    """Everything stops, the guest runs, and once the link is back the migration goes on to its end."""
    guest = new_canary()
    world.a.run(guest.spec)
    await guest.speaks(world.a)
    migration_id = await world.a.start(guest.spec, world.b, max_bandwidth=SLOW, reconnect_timeout=60.0)
    await world.a.copies(migration_id)
    world.b.container.set_link("down")
    await world.a.reaches(
        migration_id, lambda now: now.progress.HasField("disconnected_since"), "the cut is noticed"
    )
    await guest.assert_well(world.a)
    world.b.container.set_link("up")
    async with world.a.source() as stub:
        await stub.UpdateMigration(pb.UpdateMigrationRequest(id=migration_id, max_bandwidth=0), timeout=20)
    migration = await world.a.ended(migration_id)
    assert migration.outcome == pb.MIGRATION_OUTCOME_COMPLETED, migration
    assert migration.progress.reconnects
    await guest.assert_only_on(world.b, world.a)
    await guest.assert_crosses(world.b, world.a)
    world.a.container.exec("vmferry", "machine", "stop", guest.spec.name)


async def test_the_network_is_cut_for_too_long(world: TwoContainers) -> None:
    """The migration gives up, at both ends; afterwards there is one copy, and the next migration works."""
    guest = new_canary()
    world.a.run(guest.spec)
    await guest.speaks(world.a)
    migration_id = await world.a.start(guest.spec, world.b, max_bandwidth=SLOW)
    await world.a.copies(migration_id)
    world.b.container.set_link("down")
    migration = await world.a.ended(migration_id)
    assert migration.outcome == pb.MIGRATION_OUTCOME_FAILED
    assert migration.reason.reason == "PEER_UNREACHABLE"
    assert (await world.a.machine(guest.spec)).right == machine_pb2.MACHINE_RIGHT_OWNED
    world.b.container.set_link("up")
    await guest.assert_only_on(world.a, world.b)
    await guest.assert_crosses(world.a, world.b)
    world.b.container.exec("vmferry", "machine", "stop", guest.spec.name)


def test_it_ends_when_told_to(world: TwoContainers) -> None:
    """Told to stop, the first process ends its services in order, which its exit code says; then it starts again."""
    podman("stop", "--time", "60", world.b.container.name)
    assert world.b.container.inspect(".State.ExitCode") == "0"
    assert '"event": "stopping"' in world.b.container.logs()
    world.b.container.start()
    world.b.container.wait_healthy()


_KILL = """
import os, signal, sys
from pathlib import Path
for folder in Path("/proc").iterdir():
    if folder.name.isdecimal() and int(folder.name) != os.getpid():
        if b"-m\\0" + sys.argv[1].encode() in (folder / "cmdline").read_bytes():
            os.kill(int(folder.name), signal.SIGKILL)
"""


def _trace_id(span: dict[str, object]) -> str:
    """As migrations tell it; the JSON form of protobuf has bytes in base64."""
    return base64.b64decode(str(span["traceId"])).hex()
