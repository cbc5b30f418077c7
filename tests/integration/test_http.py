"""The HTTP listener of a service: metrics of real migrations, and who is answered."""

from __future__ import annotations

import asyncio
import shutil
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.integration.hosts import MIB, World, configured
from tests.integration.services import eventually_async
from tests.integration.webclient import client, samples, scraped, value
from tests.support import require
from vmferry.errors import TimedOutError
from vmferry.telemetry.instruments import DRAIN_DURATION, INSTRUMENTS, MIGRATIONS_QUEUED, Kind
from vmferry.v1 import migration_pb2 as pb
from vmferry.web.guard import HEADERS

pytestmark = pytest.mark.usefixtures("tidy")


async def test_a_scrape_has_every_metric_with_its_true_value(world: World) -> None:
    """After a migration that completed and one that failed, both services show every metric there is, and truly.

    Prometheus's own tool finds nothing to complain about.
    """
    guest = await world.run(memory_mib=32)
    plan = pb.PlanMigrationRequest(
        machine=guest.id,
        destination=pb.Destination(host=world.b.identity.uri, address=world.b.dest.address),
    )
    async with world.source(world.a) as stub:
        await stub.PlanMigration(plan)  # so that there is a prediction
    failed = await world.migrate(guest, world.a, world.b, reserve_timeout=0.001)
    assert failed.outcome == pb.MIGRATION_OUTCOME_FAILED
    seen: set[str] = set()

    async def shows_the_guest() -> bool:
        text = await scraped(world.a.source)
        seen.update(name for name, labels in samples(text) if ("vmferry_machine", guest.spec.name) in labels)
        return bool(seen)

    running = await world.start(guest, world.a, world.b, max_bandwidth=MIB)
    await eventually_async(shows_the_guest, "a running migration is measured")
    async with world.source(world.a) as stub:
        await stub.UpdateMigration(pb.UpdateMigrationRequest(id=running, max_bandwidth=0))
    done = await world.ended(world.a, running)
    assert done.outcome == pb.MIGRATION_OUTCOME_COMPLETED, done

    texts = [await scraped(service) for service in (world.a.source, world.b.dest)]
    source, dest = map(samples, texts)
    names = {name for name, _ in source.keys() | dest.keys()} | seen
    series = {one.prometheus + ("_count" if one.kind is Kind.HISTOGRAM else "") for one in INSTRUMENTS}
    absent = {MIGRATIONS_QUEUED.prometheus, f"{DRAIN_DURATION.prometheus}_count"}
    assert series - names == absent, "nothing waited, and no host was emptied; other tests are about that"
    assert not [name for name, labels in source if ("vmferry_machine", guest.spec.name) in labels], (
        "it has ended"
    )

    assert value(source, "vmferry_migrations_total", outcome="completed", reason="") == 1
    assert value(source, "vmferry_migrations_total", outcome="failed", reason=failed.reason.reason) == 1
    assert value(source, "vmferry_migrations_total", outcome="failed", reason=TimedOutError.reason) >= 1
    assert value(source, "vmferry_migration_wire_bytes_total") == done.progress.wire_bytes
    assert value(source, "vmferry_migration_memory_bytes_total") == done.progress.sent_bytes
    downtime_s = done.downtime.ToNanoseconds() / 1e9
    assert value(source, "vmferry_migration_downtime_seconds_sum", path="direct") == pytest.approx(downtime_s)
    assert value(source, "vmferry_migration_rounds_sum") == done.progress.round
    assert value(source, "vmferry_migrations_open", phase="precopying") == 0
    assert value(dest, "vmferry_arrivals_total", outcome="owned", reason="") == 1
    given_up = "the source gave it up: it took too long to take the memory"
    assert value(dest, "vmferry_arrivals_total", outcome="refused", reason=TimedOutError.reason) == 1, (
        given_up
    )
    # The destination is told of device state as well, which has no pages.
    assert value(dest, "vmferry_arrival_memory_bytes_total") >= done.progress.sent_bytes
    left_s = value(source, "vmferry_certificate_expiry_timestamp_seconds") - time.time()
    assert left_s == pytest.approx((world.material("a").not_after.timestamp() - time.time()), abs=5)
    for text in texts:
        check_metrics(text)


async def test_a_trace_is_whole_right_after_its_migration(world: World) -> None:
    """Whoever looks it up at once sees the spans that ended a moment ago, and not only what the disk has already."""
    guest = await world.run(memory_mib=32)
    done = await world.migrate(guest, world.a, world.b)
    async with client(world.a.source) as session, session.get(f"/api/traces/{done.trace_id}") as answer:
        document = await answer.json()
    assert done.outcome == pb.MIGRATION_OUTCOME_COMPLETED
    assert {"precopy", "last round", "device state", "seal", "commit"} <= set(names(document["spans"]))


def names(nodes: list[dict[str, Any]]) -> Iterator[str]:
    """Of all spans of a tree."""
    for node in nodes:
        yield node["name"]
        yield from names(node["children"])


async def test_what_waits_is_measured(world: World) -> None:
    """The length of the queue is there while something waits, by destination, and gone when nothing does."""
    guests = [await world.run() for _ in range(3)]
    started = [await world.start(guest, world.a, world.b, max_bandwidth=MIB) for guest in guests]
    there = {"destination": world.b.identity.uri}

    async def measured() -> tuple[float, float]:
        found = samples(await scraped(world.a.source))
        queued = [amount for (name, _), amount in found.items() if name == MIGRATIONS_QUEUED.prometheus]
        if queued:
            assert value(found, MIGRATIONS_QUEUED.prometheus, **there) == sum(queued)
        return sum(queued), value(found, "vmferry_migrations_open", phase="queued")

    async def one_waits() -> bool:
        return await measured() == (1, 1)

    async def none_waits() -> bool:
        return await measured() == (0, 0)

    await eventually_async(one_waits, "two leave and one waits")
    async with world.source(world.a) as stub:
        for migration_id in started:
            await stub.CancelMigration(pb.CancelMigrationRequest(id=migration_id))
    for migration_id in started:
        await world.ended(world.a, migration_id)
    await eventually_async(none_waits, "nothing waits")


def check_metrics(text: str) -> None:
    """Have Prometheus's own tool look at a scrape."""
    require(shutil.which("promtool"), "promtool is not installed (apt install prometheus)")
    checked = subprocess.run(
        ["promtool", "check", "metrics"], input=text, text=True, capture_output=True, check=False
    )
    assert (checked.returncode, checked.stderr) == (0, "")


async def test_by_default_only_the_owner_can_reach_it(world: World) -> None:
    """The default is a unix socket in run_dir with mode 0600; it goes when its service ends."""
    path = world.a.config.run_dir / "source-http.sock"
    assert world.a.source.http == f"unix:{path}"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    await world.a.source.stop()
    try:
        assert not path.exists()
    finally:
        await world.a.source.start()


@pytest.mark.parametrize(
    ("method", "host", "headers", "status"),
    [
        ("GET", "localhost", {}, 200),
        ("GET", "127.0.0.1:7621", {}, 200),
        ("GET", "[::1]:80", {}, 200),
        ("HEAD", "localhost:1", {}, 200),
        ("GET", "evil.example", {}, 421),
        ("GET", "localhost.evil.example", {}, 421),
        ("GET", "192.0.2.1:7621", {}, 421),
        ("GET", "", {}, 421),
        ("GET", "localhost", {"Sec-Fetch-Site": "cross-site"}, 403),
        ("POST", "localhost", {}, 405),
        ("PUT", "localhost", {}, 405),
        ("DELETE", "localhost", {}, 405),
        ("OPTIONS", "localhost", {}, 405),
    ],
)
async def test_who_is_answered(
    world: World, method: str, host: str, headers: dict[str, str], status: int
) -> None:
    """Only what names this host as loopback, and only to look; each answer has the headers that keep others out."""
    async with client(world.a.source) as session:
        for path in ("/", "/metrics", "/api/state", "/api/traces/00"):
            async with session.request(method, path, headers={"Host": host, **headers}) as answer:
                expected = 404 if status == 200 and path.startswith("/api/traces") else status
                assert answer.status == expected, path
                assert {key: answer.headers.get(key) for key in HEADERS} == HEADERS
                assert "Access-Control-Allow-Origin" not in answer.headers


async def test_what_is_not_there_is_said(world: World) -> None:
    """Unknown paths, files that are not ours and odd traces are refused in a word, without a trace of the inside."""
    async with client(world.a.source) as session:
        for path, status in (
            ("/nothing", 404),
            ("/../config.py", 404),
            ("/%2e%2e/config.py", 404),
            ("/api/traces/nonsense", 400),
            ("/api/traces/..%2f..", 400),
        ):
            async with session.get(aiohttp.client.URL(path, encoded=True)) as answer:
                assert answer.status == status, path
                assert len(await answer.text()) < 100


async def test_an_open_page_does_not_hold_up_the_end_of_a_service(world: World, tmp_path: Path) -> None:
    """A service that is told to stop does, however many watch it."""
    async with client(world.a.dest) as session:
        streams = [await session.get("/api/events") for _ in range(3)]
        assert b"event: " in await streams[0].content.readline()
        started = time.monotonic()
        await world.a.dest.stop()
        took_s = time.monotonic() - started
        for stream in streams:
            await stream.read()  # to its end
    await world.a.dest.start()
    assert took_s < 5


async def test_only_so_many_may_watch(world: World) -> None:
    """One more than the limit is told to come later, and whoever leaves makes room."""
    async with client(world.a.dest) as session:
        streams = await asyncio.gather(*(session.get("/api/events") for _ in range(32)))
        async with session.get("/api/events") as answer:
            assert answer.status == 503
        streams[0].close()

        async def room() -> bool:
            async with session.get("/api/events") as answer:
                return answer.status == 200

        await eventually_async(room, "there is room again")
        for stream in streams:
            stream.close()


async def test_a_loopback_port(world: World) -> None:
    """A loopback port is served as well, and the service says which it is."""
    async with configured(world.a.dest, dest_http_listen="127.0.0.1:0"):
        host, _, port = world.a.dest.http.rpartition(":")
        assert host == "127.0.0.1"
        assert int(port) > 0
        assert "target_info" in await scraped(world.a.dest)
    async with configured(world.a.dest, dest_http_listen=""):
        assert world.a.dest.http == ""
