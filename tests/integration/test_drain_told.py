"""What a drain tells while it goes on and afterwards, and what an operator undoes while a destination is full."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.integration.drains import client, drained, is_in, left_clean, owners, target
from tests.integration.hosts import MIB, World, configured, open_world
from tests.integration.services import eventually, eventually_async
from tests.integration.webclient import samples, scraped, value
from vmferry.client import new_request_id
from vmferry.errors import TraceNotFoundError
from vmferry.machines import readymemory
from vmferry.telemetry.spans import SpanRecord, load_spans
from vmferry.v1 import drain_pb2 as dp
from vmferry.v1 import migration_pb2 as pb
from vmferry.v1.drain_pb2 import DRAIN_STATE_DRAINED, DRAIN_STATE_NONE, DRAIN_STATE_STUCK


@pytest.fixture(scope="module")
async def world() -> AsyncIterator[World]:
    """Three hosts, which look again soon and measure for a moment only."""
    settings = {"drain_look_s": 1.0, "drain_retry_s": 0.5, "drain_measure_s": 3.0}
    async with open_world("abc", source_http_listen="127.0.0.1:0", **settings) as opened:
        yield opened


@pytest.fixture
async def clean(world: World) -> AsyncIterator[None]:
    """What a test found is there afterwards."""
    async with left_clean(world):
        yield


pytestmark = pytest.mark.usefixtures("clean")


async def test_it_says_what_goes_on_and_leaves_one_trace_and_true_figures(world: World) -> None:
    """From the first second every machine is listed, and what is done is said; then it is one trace, counted once."""
    guests = [await world.run(world.a) for _ in range(3)]
    async with client(world, world.a) as a:
        await a.drain([target(world.b)])
        told = [seen async for seen in a.watch_drain()]
        await a.drain([target(world.b)])  # of an empty host: it stays so, and is not counted again
        last = await drained(world, world.a, is_in(DRAIN_STATE_DRAINED), "it stays empty")
        moved = await a.history()

    said = [one.activity for one in told]
    assert any("asking b about 3 machines" in text for text in said)
    assert any("measuring what moving each machine costs, 1 of 3 done" in text for text in said)
    assert any("goes next, as soon as one of the 2 under way has ended" in text for text in said)
    assert any(text.startswith("nothing waits; ") for text in said)
    asking = next(one for one in told if one.activity.startswith("asking"))
    assert sorted(item.turn for item in asking.machines) == [1, 2, 3]
    assert (last.activity, [item.turn for item in last.machines]) == ("", [0, 0, 0])

    spans: list[SpanRecord] = []

    def complete() -> bool:
        try:
            spans[:] = load_spans([world.trace_dir], last.trace_id)
        except TraceNotFoundError:
            return False
        return any(one.name == "drain" for one in spans)

    await eventually(complete, "the drain is told")
    (whole,) = [one for one in spans if one.name == "drain"]
    moves = [one.attributes for one in spans if one.name == "move"]
    assert (whole.attributes["vmferry.outcome"], whole.attributes["vmferry.moved"]) == ("emptied", "3")
    assert {one["vmferry.machine"] for one in moves} == {guest.spec.name for guest in guests}
    traces = {one["vmferry.migration_trace"] for one in moves}
    assert traces == {one.trace_id for one in moved}
    assert last.trace_id not in traces, "each migration has a trace of its own"
    assert len(traces) == len(moves) == 3

    found = samples(await scraped(world.a.source))
    assert value(found, "vmferry_drain_moves_total", outcome="completed", reason="") == 3
    assert value(found, "vmferry_drain_duration_seconds_count", outcome="emptied") == 1
    assert value(found, "vmferry_drain_machines", state="moved") == 3
    assert value(found, "vmferry_drain_state", state="drained") == 1
    assert value(found, "vmferry_drain_state", state="draining") == 0


async def test_undone_while_the_destination_is_full_what_waits_is_taken_back(world: World) -> None:
    """Machines in the queue stay and can be ordered anew; twice is once; what fills the destination goes on."""
    c = world.hosts["c"]
    busy = [
        await world.start(
            await world.run(c, 80, params={"resident-mib": "64"}), c, world.b, max_bandwidth=MIB
        )
        for _ in range(c.config.max_outgoing)
    ]
    for migration_id in busy:
        await world.enters(c, migration_id, pb.MIGRATION_PHASE_PRECOPYING)
    guests = [await world.run(world.a) for _ in range(3)]
    async with client(world, world.a) as a:
        request_id = new_request_id()
        await a.drain([target(world.b)], request_id=request_id)

        async def waits() -> bool:
            return any(one.phase == pb.MIGRATION_PHASE_QUEUED for one in await a.history(open_only=True))

        await eventually_async(waits, "a machine waits for room at host b")
        undone = await a.undrain()
        assert (undone.state, undone.takes_newcomers) == (DRAIN_STATE_NONE, True)

        async def all_stay() -> bool:
            found = await a.get_drain()
            return all(item.state == dp.DRAINED_MACHINE_STATE_STAYS for item in found.machines)

        await eventually_async(all_stay, "nothing is under way any more")
        assert await a.history(open_only=True) == []
        again = await a.undrain()
        assert await a.undrain() == again
        ended = [one for one in await a.history() if one.machine_id in {guest.id for guest in guests}]
    assert ended
    assert {one.outcome for one in ended} == {pb.MIGRATION_OUTCOME_CANCELLED}
    for guest in guests:
        assert await owners(world, guest) == ["a"]
        await guest.assert_clean(world.a)
    async with world.source(c) as stub:
        for migration_id in busy:
            await stub.UpdateMigration(pb.UpdateMigrationRequest(id=migration_id, max_bandwidth=0))
    for migration_id in busy:
        assert (await world.ended(c, migration_id)).outcome == pb.MIGRATION_OUTCOME_COMPLETED
    await world.assert_crosses(guests[0], world.a, world.b)


async def test_memory_that_is_kept_ready_goes_when_its_host_is_emptied(world: World) -> None:
    """Without a restart: a host that takes nobody keeps none, and one that takes machines again makes it again."""
    async with configured(world.b.dest, ready_memory_mib=(16,)):
        ready = world.b.config.ram_dir
        await eventually(lambda: readymemory.ready_files(ready) == [16], "memory is ready")
        async with client(world, world.b) as b:
            await b.drain([target(world.a)])
            await eventually(lambda: readymemory.ready_files(ready) == [], "it is given up")
            await b.undrain()
        await eventually(lambda: readymemory.ready_files(ready) == [16], "it is ready again")


async def test_every_machine_says_why_it_stays_while_a_destination_does_not_answer(world: World) -> None:
    """Also those that it was never asked about, as it is left alone for a while."""
    guests = [await world.run(world.a) for _ in range(5)]  # more than are asked about at a time
    await world.b.dest.stop()
    try:
        async with client(world, world.a) as a:
            await a.drain([target(world.b)])
        stuck = await drained(
            world,
            world.a,
            lambda seen: seen.state == DRAIN_STATE_STUCK and "is left alone until" in seen.activity,
            "host b is left alone",
        )
    finally:
        await world.b.dest.start()
    assert len(stuck.machines) == len(guests)
    for item in stuck.machines:
        assert "PEER_UNREACHABLE" in {one.reason for one in item.obstacles}, item
        assert all(one.remedy for one in item.obstacles)
