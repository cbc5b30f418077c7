"""A real Prometheus reads real services, and answers what dashboard and alerts ask it."""

from __future__ import annotations

import asyncio
import contextlib
import re
import shutil
import socket
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.integration.hosts import World, open_world
from tests.integration.services import eventually_async
from tests.support import require
from tests.unit.monitoring import RULES, dashboard_expressions, rule_expressions
from vmferry.v1 import migration_pb2 as pb

pytestmark = pytest.mark.usefixtures("tidy")

WHILE_MOVING = re.compile(r"vmferry_migration_(?:dirty_rate|send_rate|remaining|expected_downtime)_")


@pytest.fixture(scope="module")
async def world() -> AsyncIterator[World]:
    """Hosts that can be scraped."""
    async with open_world(source_http_listen="127.0.0.1:0", dest_http_listen="127.0.0.1:0") as opened:
        yield opened


@contextlib.asynccontextmanager
async def prometheus(folder: Path, targets: list[str]) -> AsyncIterator[aiohttp.ClientSession]:
    """A Prometheus that scrapes these every second, with our alerts."""
    require(shutil.which("prometheus"), "prometheus is not installed (apt install prometheus)")
    settings = folder / "prometheus.yml"
    settings.write_text(
        "global: {scrape_interval: 1s, evaluation_interval: 1s}\n"
        f"rule_files: [{RULES}]\n"
        f"scrape_configs: [{{job_name: vmferry, static_configs: [{{targets: {targets}}}]}}]\n",
        encoding="utf-8",
    )
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with (folder / "log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *("prometheus", f"--config.file={settings}", f"--storage.tsdb.path={folder / 'data'}"),
            f"--web.listen-address={address}",
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:
        async with aiohttp.ClientSession(f"http://{address}") as session:
            yield session
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def ask(session: aiohttp.ClientSession, expression: str) -> list[dict[str, Any]]:
    """What Prometheus answers; a mistake in the expression fails the test."""
    async with session.get("/api/v1/query", params={"query": expression}) as answer:
        document = await answer.json()
        assert document["status"] == "success", f"{expression}: {document}"
        found: list[dict[str, Any]] = document["data"]["result"]
        return found


async def test_dashboard_and_alerts_are_answered(world: World, tmp_path: Path) -> None:
    """After a migration every panel has data, every alert can be evaluated, and none of them fires."""
    services = [world.a.source, world.b.dest]
    async with prometheus(tmp_path, [service.http for service in services]) as session:

        async def up() -> bool:
            try:
                return len([one for one in await ask(session, "up == 1") if one["value"][1] == "1"]) == 2
            except aiohttp.ClientError:
                return False

        await eventually_async(up, "both services are read", seconds=60)
        guest = await world.run()
        plan = pb.PlanMigrationRequest(
            machine=guest.id,
            destination=pb.Destination(host=world.b.identity.uri, address=world.b.dest.address),
        )
        async with world.source(world.a) as stub:
            await stub.PlanMigration(plan)
        done = await world.migrate(guest, world.a, world.b)
        assert done.outcome == pb.MIGRATION_OUTCOME_COMPLETED, done
        completed = 'increase(vmferry_migrations_total{vmferry_outcome="completed"}[5m])'

        async def counted() -> bool:
            return any(float(one["value"][1]) > 0 for one in await ask(session, completed))

        await eventually_async(counted, "the migration is seen as an increase", seconds=60)
        # What compares two moments needs the first of them to be there as well.
        rate = "rate(vmferry_migration_downtime_seconds_count[1h])"
        await eventually_async(lambda: ask(session, rate), "rates are known", seconds=60)
        for panel in dashboard_expressions():
            expression = panel.replace("$__rate_interval", "5m").replace("$instance", ".*")
            answered = await ask(session, expression)
            if not answered and not WHILE_MOVING.search(expression) and not expression.endswith("> 0"):
                # What a host sees to last is read last: a guest's clock.
                await eventually_async(
                    partial(ask, session, expression), f"data for {expression}", seconds=60
                )
        for expression in rule_expressions():
            assert await ask(session, expression) == [], expression
