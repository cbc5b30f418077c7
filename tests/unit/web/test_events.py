"""What those who look at the page are told, and how often the service is asked for it."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from tests.integration.services import eventually_async
from vmferry.config import HostConfig
from vmferry.drain.record import DrainFile
from vmferry.v1.drain_pb2 import DRAIN_STATE_DRAINING, DRAINED_MACHINE_STATE_BLOCKED, DrainRecord
from vmferry.v1.machine_pb2 import Machine
from vmferry.v1.migration_pb2 import (
    MIGRATION_PHASE_ENDED,
    MIGRATION_PHASE_PRECOPYING,
    MIGRATION_PHASE_QUEUED,
    Migration,
)
from vmferry.web.app import Site
from vmferry.web.listener import serve_http
from vmferry.web.view import Arriving


@dataclass
class Shown:
    """A service of which only what it shows exists."""

    migrations_open: list[Migration] = field(default_factory=list)
    migrations_ended: list[Migration] = field(default_factory=list)
    asked: int = 0
    """How often the history was asked for."""
    looked: int = 0
    """How often it was looked at what goes on."""

    async def machines(self) -> list[Machine]:
        machine = Machine(name="web", uuid="u")
        machine.spec.qemu.append = "console=ttyS0 password=swordfish"
        return [machine]

    async def migrations(self, *, limit: int) -> list[Migration]:
        self.asked += 1
        return [*self.migrations_open, *self.migrations_ended][:limit]

    def open_migrations(self) -> list[Migration]:
        self.looked += 1
        return list(self.migrations_open)

    def arrivals(self) -> list[Arriving]:
        return []


def open_one(number: int, phase: Any = MIGRATION_PHASE_PRECOPYING, position: int = 0) -> Migration:
    """A migration that has not ended."""
    one = Migration(id=f"{number:032x}", machine=f"vm-{number}", phase=phase)
    one.queue.position = position
    return one


@contextlib.asynccontextmanager
async def page(shown: Shown, state_dir: Path = Path("/nowhere")) -> AsyncIterator[aiohttp.ClientSession]:
    """The page of such a service."""
    site = Site("source", "spiffe://example.org/vmhost/a", HostConfig(state_dir=state_dir), [shown])
    async with (
        serve_http(site, "127.0.0.1:0") as address,
        aiohttp.ClientSession(f"http://{address}") as session,
    ):
        yield session


async def told(stream: aiohttp.ClientResponse) -> tuple[str, Any]:
    """The next event of a stream: its kind, and what it says."""
    kind = (await stream.content.readline()).decode().removeprefix("event: ").strip()
    data = (await stream.content.readline()).decode().removeprefix("data: ")
    assert await stream.content.readline() == b"\n"
    return kind, json.loads(data)


async def test_the_history_is_told_when_it_changes() -> None:
    """A migration that ends moves from one list to the other; nothing else makes the long list be sent again."""
    shown = Shown([open_one(1)])
    async with page(shown) as session, session.get("/api/events") as stream:
        assert await told(stream) == ("history", [])
        kind, state = await told(stream)
        assert (kind, [one["machine"] for one in state["migrations"]]) == ("state", ["vm-1"])
        shown.migrations_open[0].progress.round = 2
        kind, state = await told(stream)
        assert (kind, state["migrations"][0]["progress"]["round"]) == ("state", 2)
        asked = shown.asked
        ended = shown.migrations_open.pop()
        ended.phase = MIGRATION_PHASE_ENDED
        shown.migrations_ended.append(ended)
        kind, history = await told(stream)
        assert (kind, [one["machine"] for one in history]) == ("history", ["vm-1"])
        kind, state = await told(stream)
        assert (kind, state["migrations"]) == ("state", [])
        assert shown.asked == asked + 1


async def test_nobody_is_asked_while_nobody_looks() -> None:
    """When the last one who watched has gone, the service is left alone."""
    shown = Shown()
    async with page(shown) as session:
        assert shown.looked == 0
        async with session.get("/api/events") as stream:
            await told(stream)
        since = [shown.looked, time.monotonic()]

        async def left_alone() -> bool:
            if shown.looked != since[0]:
                since[:] = shown.looked, time.monotonic()
            return time.monotonic() - since[1] > 1  # while somebody looks it is asked four times in that

        await eventually_async(left_alone, "nobody asks any more")
        assert shown.looked >= 1


async def test_what_waits_comes_after_what_moves_and_is_bounded() -> None:
    """However long the queue is, the page gets a bounded part of it, and how many there are."""
    queue = [open_one(number, MIGRATION_PHASE_QUEUED, number) for number in range(100, 0, -1)]
    shown = Shown([*queue, open_one(999)])
    async with page(shown) as session, session.get("/api/state") as answer:
        state = await answer.json()
    names = [one["machine"] for one in state["migrations"]]
    assert names == ["vm-999", *(f"vm-{number}" for number in range(1, 50))]
    assert state["open"] == 101
    assert state["history"] == []


async def test_a_description_is_not_for_everybody() -> None:
    """Of a machine's description only what says nothing about its inside is shown."""
    async with page(Shown()) as session, session.get("/api/state") as answer:
        text = await answer.text()
    assert "swordfish" not in text
    assert [one["name"] for one in json.loads(text)["machines"]] == ["web"]


async def test_a_host_that_is_being_emptied_says_how_far_it_is(tmp_path: Path) -> None:
    """The page tells which machines have moved and what holds others up, and nothing that was signed for it."""
    record = DrainRecord(draining=True, warrant=b"swordfish")
    record.drain.state = DRAIN_STATE_DRAINING
    item = record.drain.machines.add(machine="web", machine_id="u", state=DRAINED_MACHINE_STATE_BLOCKED)
    item.obstacles.add(reason="INCOMPATIBLE", message="no tap there")
    file = DrainFile(tmp_path)
    async with page(Shown(), tmp_path) as session:
        async with session.get("/api/state") as answer:
            state = await answer.json()
        assert (state["draining"], state["drain"]) == (False, {})
        file.write(record)

        async def told_so() -> str:
            async with session.get("/api/state") as answer:
                text = await answer.text()
            return text if json.loads(text)["drain"] else ""

        text = await eventually_async(told_so, "it is told")
    state = json.loads(text)
    assert state["draining"]
    (machine,) = state["drain"]["machines"]
    assert (machine["state"], machine["obstacles"][0]["message"]) == (
        "DRAINED_MACHINE_STATE_BLOCKED",
        "no tap there",
    )
    assert "warrant" not in text
    assert "swordfish" not in text
