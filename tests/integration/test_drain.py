"""Emptying a host: real services, real machines, and what an operator does at night, once and twice."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator

import pytest

from tests.integration.drains import client, drained, is_in, item_of, left_clean, owners, target
from tests.integration.hosts import World, open_world
from tests.integration.proxy import Proxy, open_proxy
from tests.integration.services import eventually_async
from vmferry import failpoints
from vmferry.client import new_request_id
from vmferry.drain.record import DrainFile
from vmferry.errors import ExitCode, HostDrainingError, TicketInvalidError
from vmferry.v1 import drain_pb2 as dp
from vmferry.v1 import migration_pb2 as pb
from vmferry.v1.drain_pb2 import DRAIN_STATE_DRAINED, DRAIN_STATE_NONE, DRAIN_STATE_STUCK

MOVED = dp.DRAINED_MACHINE_STATE_MOVED
STAYS = dp.DRAINED_MACHINE_STATE_STAYS
BLOCKED = dp.DRAINED_MACHINE_STATE_BLOCKED
COMMAND = (sys.executable, "-m", "vmferry.cli.main")


@pytest.fixture(scope="module")
async def world() -> AsyncIterator[World]:
    """Three hosts, which look again soon and measure for a moment only."""
    settings = {"drain_look_s": 1.0, "drain_retry_s": 0.5, "drain_measure_s": 1.0, "reconnect_timeout_s": 1.0}
    async with open_world("abc", **settings) as opened:
        yield opened


@pytest.fixture
async def link(world: World) -> AsyncIterator[Proxy]:
    """A way to host b's destination that stays the same when that is started anew."""
    async with open_proxy(lambda: world.b.dest.port) as opened:
        yield opened


@pytest.fixture
async def clean(world: World) -> AsyncIterator[None]:
    """What a test found is there afterwards."""
    async with left_clean(world):
        yield


pytestmark = pytest.mark.usefixtures("clean")


async def test_a_host_is_emptied_over_two_others_and_takes_nobody_until_it_is_undone(world: World) -> None:
    """Four machines arrive unharmed on two hosts; a newcomer is refused, without a restart; undrain lets it in."""
    guests = [await world.run(world.a) for _ in range(4)]
    async with client(world, world.a) as a:
        await a.drain([target(world.b), target(world.hosts["c"])])
        drain = await drained(world, world.a, is_in(DRAIN_STATE_DRAINED), "host a is empty")

        assert {item.state for item in drain.machines} == {MOVED}
        assert {item.destination.host for item in drain.machines} == {
            world.b.identity.uri,
            world.hosts["c"].identity.uri,
        }
        assert not drain.takes_newcomers
        assert drain.HasField("end_time")
        assert world.a.holdings() == []
        for guest in guests:
            there = world.hosts[(await owners(world, guest))[0]]
            await guest.assert_clean(there)
        back = guests[0]
        there = world.hosts[(await owners(world, back))[0]]
        refused = await world.migrate(back, there, world.a)
        assert "host.draining" in refused.reason.message
        undone = await a.undrain()
        assert undone.takes_newcomers
        assert undone.state == DRAIN_STATE_NONE
    await world.assert_crosses(back, there, world.a)


async def test_asked_twice_it_comes_to_the_same_as_once(world: World) -> None:
    """The same request changes nothing, not even after undrain; undrain twice is undrain; a second drain goes on."""
    guest = await world.run(world.a)
    request_id = new_request_id()
    async with client(world, world.a) as a:
        await a.drain([target(world.b)], request_id=request_id)
        first = await drained(world, world.a, is_in(DRAIN_STATE_DRAINED), "empty")
        again = await a.drain([target(world.b)], request_id=request_id)
        assert again.revision == first.revision
        assert again.create_time == first.create_time

        undone = await a.undrain()
        assert (await a.undrain()) == undone
        assert (await a.drain([target(world.b)], request_id=request_id)).state == DRAIN_STATE_NONE
        await world.assert_crosses(guest, world.b, world.a)

        await a.drain([target(world.b)])
        await a.drain([target(world.b)])
        last = await drained(world, world.a, is_in(DRAIN_STATE_DRAINED), "empty again")
    assert [item.attempts for item in last.machines] == [1]
    assert await owners(world, guest) == ["b"]


async def test_what_cannot_move_is_reported_with_what_to_do_and_moves_once_it_can(world: World) -> None:
    """Both destinations are being emptied themselves: stuck, and why; one is undone: it moves."""
    guest = await world.run(world.a)
    async with client(world, world.a) as a, client(world, world.b) as b, client(world, world.hosts["c"]) as c:
        await b.drain([target(world.a)])
        await c.drain([target(world.a)])
        await a.drain([target(world.b), target(world.hosts["c"])])
        stuck = await drained(world, world.a, is_in(DRAIN_STATE_STUCK), "nothing can move")

        item = item_of(stuck, guest)
        assert item.state == STAYS
        assert {(one.destination, one.reason) for one in item.obstacles} == {
            (host.identity.uri, "host.draining") for host in (world.b, world.hosts["c"])
        }
        assert all("undrain" in one.remedy for one in item.obstacles)
        await world.assert_stays(guest, world.a, world.b)

        await c.undrain()
        done = await drained(world, world.a, is_in(DRAIN_STATE_DRAINED), "it moves now")
    assert item_of(done, guest).destination.host == world.hosts["c"].identity.uri


async def test_it_goes_on_after_its_service_was_killed(world: World) -> None:
    """Killed with a machine under way: the next start empties the host, and nobody runs twice or nowhere."""
    guests = [await world.run(world.a) for _ in range(3)]
    async with client(world, world.a) as a:
        await a.drain([target(world.b), target(world.hosts["c"])])
    await drained(world, world.a, lambda seen: any(item.attempts for item in seen.machines), "one has begun")

    await world.a.source.kill()
    assert DrainFile(world.a.config.state_dir).draining
    await world.a.source.start()

    done = await drained(world, world.a, is_in(DRAIN_STATE_DRAINED), "it went on")
    assert {item.state for item in done.machines} == {MOVED}
    for guest in guests:
        (owner,) = await owners(world, guest)
        assert owner in "bc"
        await guest.assert_clean(world.hosts[owner])


async def test_undone_in_the_middle_it_begins_nothing_more(world: World) -> None:
    """Machines that were under way arrive, or stay; the others stay, and the host takes one back at once."""
    guests = [await world.run(world.a) for _ in range(6)]
    async with client(world, world.a) as a:
        await a.drain([target(world.b), target(world.hosts["c"])])
        await drained(
            world, world.a, lambda seen: any(item.attempts for item in seen.machines), "one has begun"
        )
        undone = await a.undrain()
        assert undone.takes_newcomers
        over = await drained(
            world,
            world.a,
            lambda seen: all(item.state != dp.DRAINED_MACHINE_STATE_MOVING for item in seen.machines),
            "nothing is under way",
        )
        began = {item.machine_id for item in over.machines if item.attempts}
        assert not [
            one for one in await a.history(open_only=True) if one.machine_id in {g.id for g in guests}
        ]
    for guest in guests:
        (owner,) = await owners(world, guest)
        if guest.id not in began:
            assert owner == "a"
    assert len(began) < len(guests), "all had begun already"


async def test_a_machine_that_is_blocked_is_reported_and_not_touched(world: World, link: Proxy) -> None:
    """One whose hand-off has no answer stays as it is, with its reason; others leave; answered, it is gone too."""
    blocked, free = await world.run(world.a), await world.run(world.a)
    world.b.dest.environment[failpoints.VARIABLE] = "dest.recorded.owned=kill"
    await world.b.dest.restart()
    started = await world.start(blocked, world.a, world.b, address=link.address)
    unknown = await world.reaches(
        world.a, started, lambda now: now.outcome == pb.MIGRATION_OUTCOME_UNKNOWN, "it is unknown"
    )
    assert unknown.phase == pb.MIGRATION_PHASE_HANDING_OFF
    try:
        async with client(world, world.a) as a:
            await a.drain([target(world.hosts["c"])])
        stuck = await drained(
            world,
            world.a,
            lambda seen: seen.state == DRAIN_STATE_STUCK and item_of(seen, free).state == MOVED,
            "only the blocked one is left",
        )
        item = item_of(stuck, blocked)
        assert item.state == BLOCKED
        assert item.attempts == 0
        assert "OUTCOME_UNKNOWN" in [one.reason for one in item.obstacles]
    finally:
        world.b.dest.environment.clear()
        await world.b.dest.start()
    done = await drained(world, world.a, is_in(DRAIN_STATE_DRAINED), "the answer has come")
    assert item_of(done, blocked).state == MOVED
    assert await owners(world, blocked) == ["b"]
    await blocked.assert_clean(world.b)


async def test_a_warrant_is_good_for_what_it_names_only(world: World) -> None:
    """Another host's warrant, or a destination that it does not name, is refused; a later machine is told of."""
    async with client(world, world.a) as a, client(world, world.b) as b:
        request = dp.DrainHostRequest(
            request_id=new_request_id(),
            destinations=[target(world.hosts["c"]).message()],
            warrant=await b.warrant([target(world.hosts["c"])]),
        )
        with pytest.raises(TicketInvalidError):
            await a.call(a.drain_stub.DrainHost, request)
        request.warrant = await a.warrant([target(world.b)])
        with pytest.raises(TicketInvalidError):
            await a.call(a.drain_stub.DrainHost, request)
        assert (await a.get_drain()).takes_newcomers

        await a.drain([target(world.b)])
        await drained(world, world.a, is_in(DRAIN_STATE_DRAINED), "nothing is there")
        late = await world.run(world.a)

        async def reasons() -> list[str]:
            found = await a.get_drain()
            return [one.reason for item in found.machines for one in item.obstacles]

        async def told() -> bool:
            return "NOT_IN_WARRANT" in await reasons()

        await eventually_async(told, "the late machine is reported")
        await a.drain([target(world.b)])
        await drained(world, world.a, is_in(DRAIN_STATE_DRAINED), "it was asked for once more")
    assert await owners(world, late) == ["b"]


async def test_a_damaged_file_keeps_newcomers_away_until_somebody_says(world: World) -> None:
    """Neither service guesses: the host counts as draining, the drain says why, and undrain puts it right."""
    guest = await world.run(world.b)
    file = DrainFile(world.a.config.state_dir)
    file.path.write_text("{", encoding="utf-8")
    await world.a.source.restart()
    async with client(world, world.a) as a:
        found = await a.get_drain()
        assert found.state == DRAIN_STATE_STUCK
        assert found.problem.reason == "CONFIG_INVALID"
        assert not found.takes_newcomers
        refused = await world.migrate(guest, world.b, world.a)
        assert HostDrainingError.reason in refused.reason.reason or "draining" in refused.reason.message
        assert (await a.undrain()).takes_newcomers
    await world.assert_crosses(guest, world.b, world.a)


async def test_the_command_line_drains_shows_and_undoes(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``drain`` waits until the host is empty; ``drain-status`` and ``undrain`` print what programs can read."""
    guest = await world.run(world.a)
    monkeypatch.setenv("VMFERRY_SOURCE", world.a.source.address)
    monkeypatch.setenv("VMFERRY_SOURCE_HOST", world.a.identity.uri)
    monkeypatch.setenv("VMFERRY_TLS", str(world.tls_dir("controller")))

    async def run(*arguments: str) -> tuple[int, str, str]:
        process = await asyncio.create_subprocess_exec(
            *COMMAND,
            *arguments,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = await process.communicate()
        assert process.returncode is not None
        return process.returncode, out.decode(), err.decode()

    code, _, err = await run("drain", "b", "--to", f"c={world.hosts['c'].dest.address}")
    assert code == ExitCode.USAGE
    assert "not the host of the source" in err
    code, out, err = await run("drain", "a", "--to", f"b={world.b.dest.address}", "--reconnect-timeout", "2")
    assert code == ExitCode.OK, err
    assert "is empty" in out
    assert guest.spec.name in out
    code, out, _ = await run("drain-status", "--json")
    assert json.loads(out)["state"] == "DRAIN_STATE_DRAINED"
    code, out, _ = await run("undrain", "a", "--json")
    assert code == ExitCode.OK
    assert json.loads(out)["takes_newcomers"] is True
    assert await owners(world, guest) == ["b"]
