"""Links between hosts that break while machines cross: a pause of the transfer, never its end before the limit.

The hosts are in network namespaces; what happens to the wire between them is real (a cable that is pulled, packets
that vanish, connections that the kernel resets, a rate), and only the destination's wire is touched, so that the
source can be watched all the time.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from source_svc.link import until_reached
from source_svc.peer import Destination
from tests.integration.hosts import Guest, World
from tests.integration.links import LANES, Broken, assert_little_was_repeated, broken_hosts, lost
from tests.integration.services import DEADLINE_S, DOMAIN, eventually
from tests.integration.traces import events
from vmferry import failpoints
from vmferry.errors import PeerUnreachableError
from vmferry.security.authority import issue
from vmferry.security.identity import Identity, Kind
from vmferry.security.material import TlsFiles
from vmferry.security.renewal import CurrentMaterial
from vmferry.v1 import migration_pb2 as pb

pytestmark = [pytest.mark.usefixtures("healed"), pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
async def broken() -> AsyncIterator[Broken]:
    """Hosts a and b in namespaces."""
    async with broken_hosts() as hosts:
        yield hosts


@pytest.fixture
async def healed(broken: Broken) -> AsyncIterator[None]:
    """Heals the wires, ends a test's machines, and fails it if anything of them is left."""
    yield
    await broken.tidy()


async def completes(broken: Broken, guest: Guest, migration_id: str) -> pb.Migration:
    """The machine arrives, whole, and nothing of it is left at the source."""
    broken.wire.shape(None)
    world = broken.world
    migration = await world.ended(world.a, migration_id)
    assert migration.outcome == pb.MIGRATION_OUTCOME_COMPLETED, migration
    assert world.a.holdings(guest.spec) == []
    await guest.assert_clean(world.b)
    assert_little_was_repeated(migration)
    return migration


async def test_a_break_is_a_pause(broken: Broken) -> None:
    """Longer than a stall may last, and than the destination waits for a silent source: it goes on after it."""
    world = broken.world
    guest = await broken.guest()
    limits = {"stall_timeout": 1.5, "reconnect_timeout": 40.0}
    migration_id = await broken.in_the_middle(guest, **limits)
    broken.break_down()
    found = await world.reaches(world.a, migration_id, lost, "the connection is lost")
    said = guest.serial(world.a).count("\n")
    long = world.b.config.receive_timeout_s + 3

    def after_long(now: pb.Migration) -> bool:
        return lost(now) and now.progress.reconnect_left.ToMilliseconds() < (40 - long) * 1000

    later = await world.reaches(world.a, migration_id, after_long, "the time that is left is told")
    assert found.progress.lanes_connected == later.progress.lanes_connected == 0
    assert found.progress.disconnected_since == later.progress.disconnected_since
    assert later.phase == pb.MIGRATION_PHASE_PRECOPYING
    assert guest.serial(world.a).count("\n") > said, "the guest runs meanwhile"
    broken.wire.heal()
    back = await world.reaches(world.a, migration_id, lambda now: not lost(now), "the connection is back")
    assert back.progress.lanes_connected > 0
    migration = await completes(broken, guest, migration_id)
    assert migration.progress.reconnects >= LANES

    def told() -> bool:
        names = {event for _, event, _ in events(world.trace_dir, migration.trace_id)}
        return names >= {"connection lost", "lane lost", "connection back", "lane reopened"}

    await eventually(told, "the trace tells")


@pytest.mark.parametrize("direction", ["to", "from"])
async def test_a_black_hole_is_noticed(broken: Broken, direction: str) -> None:
    """Whichever direction vanishes, without a sign from the network; the machine goes on when it is filled."""
    world = broken.world
    guest = await broken.guest()
    migration_id = await broken.in_the_middle(guest)
    broken.wire.swallow(to_host=direction == "to", from_host=direction == "from")
    began = time.monotonic()
    await world.reaches(world.a, migration_id, lost, "the black hole is noticed")
    print(f"noticed after {time.monotonic() - began:.1f} s")
    began = time.monotonic()
    broken.wire.heal()
    await world.reaches(world.a, migration_id, lambda now: not lost(now), "the connection is back")
    print(f"back after {time.monotonic() - began:.1f} s")
    await completes(broken, guest, migration_id)


async def test_a_break_beyond_the_limit_gives_the_machine_back(broken: Broken) -> None:
    """The limit is named, the guest has never been paused, and the destination lets go when it is reached again."""
    world = broken.world
    guest = await broken.guest()
    migration_id = await broken.in_the_middle(guest, reconnect_timeout=2.0)
    broken.break_down()
    migration = await world.ended(world.a, migration_id)
    assert "2 s" in migration.reason.message
    assert not migration.HasField("downtime")
    broken.wire.heal()
    broken.wire.shape(None)
    await world.assert_failed_and_well(guest, world.a, world.b, migration, "PEER_UNREACHABLE")


async def test_one_dead_path_of_several_does_not_matter(broken: Broken) -> None:
    """The others carry on, and the lane is reopened from another port, which takes another path; nobody heals it."""
    world = broken.world
    guest = await broken.guest()
    migration_id = await broken.in_the_middle(guest)
    broken.wire.shape(None)
    broken.wire.swallow_from_port(broken.wire.ports(world.a.place)[0])
    migration = await world.ended(world.a, migration_id)
    assert migration.outcome == pb.MIGRATION_OUTCOME_COMPLETED, migration
    assert migration.progress.reconnects == 1
    names = [event for _, event, _ in events(world.trace_dir, migration.trace_id)]
    assert "connection lost" not in names
    await guest.assert_clean(world.b)
    assert_little_was_repeated(migration)


@pytest.mark.parametrize("for_long", [False, True], ids=["reset", "broken down"])
async def test_a_break_in_the_guests_pause(broken: Broken, for_long: bool) -> None:
    """Connections that were reset are made anew and the machine crosses; without any it goes on here, in time."""
    world = broken.world
    guest = await broken.guest()
    source = world.a.source
    source.environment[failpoints.VARIABLE] = "source.paused=stop"
    await source.restart()
    try:
        migration_id = await world.start(guest, world.a, world.b, lanes=LANES)
        await eventually(lambda: source.status("State").startswith("T"), "the guest is paused", seconds=60)
        if for_long:
            broken.break_down()
        else:
            broken.wire.reset()
        source.signal(signal.SIGCONT)
        if not for_long:
            migration = await completes(broken, guest, migration_id)
            assert migration.progress.reconnects >= LANES
            return
        said = guest.serial(world.a).count("\n")
        await eventually(lambda: guest.serial(world.a).count("\n") > said, "the guest goes on", seconds=30)
        broken.wire.heal()
        migration = await world.ended(world.a, migration_id)
        assert migration.outcome == pb.MIGRATION_OUTCOME_FAILED
        assert "switch_timeout" in migration.reason.message
    finally:
        source.environment.clear()
        await source.restart()
    await world.assert_stays(guest, world.a, world.b)


async def test_certificates_may_be_replaced_during_a_break(broken: Broken) -> None:
    """Lanes are reopened with what the files hold by then: expired, they are refused; renewed, they go on."""
    world = broken.world
    guest = await broken.guest()
    migration_id = await broken.in_the_middle(guest)
    broken.break_down()
    await world.reaches(world.a, migration_id, lost, "the connection is lost")
    try:
        until = datetime.now(UTC) + timedelta(seconds=6)
        replace_certificates(world, until)
        taken_up = '"new certificate in use"'
        await eventually(lambda: taken_up in world.a.source.log_text(), "the source takes them up")
        await eventually(lambda: datetime.now(UTC) > until, "the certificates expire")
        broken.wire.heal()
        await asyncio.sleep(1.5)  # a connection would be made in this time: here nothing may happen
        assert lost(await world.state(world.a, migration_id))
    finally:
        replace_certificates(world, None)
    await completes(broken, guest, migration_id)


async def test_calls_are_made_with_a_newer_certificate(broken: Broken, tmp_path: Path) -> None:
    """The connection for calls outlives its certificate; when it breaks, the next one is made with the new one."""
    world = broken.world
    guest = await broken.guest()
    until = datetime.now(UTC) + timedelta(seconds=4)
    authority = world.root / "tls" / "authority"
    issue(authority, world.a.identity, tmp_path / "tls", not_after=until)
    material = CurrentMaterial(TlsFiles(tmp_path / "tls"))
    destination = Destination(world.b.dest.address, world.b.identity, material, rpc_timeout_s=DEADLINE_S)
    try:

        async def ask() -> str:
            answer = await destination.negotiate(guest.spec, (), (), timeout_s=DEADLINE_S)
            return answer.offer.host

        assert await ask() == world.b.identity.uri
        await eventually(lambda: datetime.now(UTC) > until, "the certificate expires")
        assert await ask() == world.b.identity.uri
        broken.wire.reset()
        with pytest.raises(PeerUnreachableError):
            await until_reached(ask, "Negotiate", 0.5)
        issue(authority, world.a.identity, tmp_path / "tls", force=True)
        assert await until_reached(ask, "Negotiate", DEADLINE_S) == world.b.identity.uri
    finally:
        await destination.close()


def replace_certificates(world: World, not_after: datetime | None) -> None:
    """Issue new ones for both hosts, as ``vmferry certs issue --force`` does."""
    for name in world.hosts:
        identity = Identity(DOMAIN, Kind.VMHOST, name)
        issue(
            world.root / "tls" / "authority", identity, world.tls_dir(name), force=True, not_after=not_after
        )
