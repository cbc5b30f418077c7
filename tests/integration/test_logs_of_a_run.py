"""The logs of real services, at their most talkative, over migrations that come out in different ways."""

from __future__ import annotations

import base64
import json
import re
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.integration.hosts import MIB, World, open_world
from tests.integration.services import refusal
from vmferry.v1 import migration_pb2 as pb

pytestmark = pytest.mark.usefixtures("tidy")

OURS = ("source_svc", "dest_svc", "vmferry")
ALWAYS = {"event", "level", "logger", "timestamp", "service", "host"}
LEVELS = {"debug", "info", "warning", "error", "critical"}
# 32 bytes or more that look like anything but an id: a token, a digest, a key.
LOOKS_SECRET = re.compile(
    r"(?<![0-9a-zA-Z+/=_-])(?:[0-9a-f]{64,}|[0-9a-zA-Z+/_-]{43,}={1,2})(?![0-9a-zA-Z+/=_-])"
)


@pytest.fixture(scope="module")
async def world() -> AsyncIterator[World]:
    """Hosts whose services log everything."""
    async with open_world(log_level="debug") as opened:
        yield opened


async def test_logs_tell_the_migration_and_no_secret(world: World) -> None:
    """Each line is one event with its origin; those of a migration name it and its trace, and no secret is in any."""
    guest = await world.run(memory_mib=32)
    tickets = [world.ticket(guest, world.a, world.b) for _ in range(3)]
    failed = await world.migrate(guest, world.a, world.b, ticket=tickets[0], reserve_timeout=0.001)
    cancelled = await cancelled_one(world, guest, tickets[1])
    done = await world.migrate(guest, world.a, world.b, ticket=tickets[2])
    outcomes = [one.outcome for one in (failed, cancelled, done)]
    assert outcomes == [
        pb.MIGRATION_OUTCOME_FAILED,
        pb.MIGRATION_OUTCOME_CANCELLED,
        pb.MIGRATION_OUTCOME_COMPLETED,
    ]
    async with world.source(world.b) as stub:
        used = world.order(guest, world.b, world.a, ticket=tickets[0])
        assert (await refusal(stub.StartMigration(used))).reason

    texts = [service.log_text() for service in world.services]
    events = [json.loads(line) for text in texts for line in text.splitlines()]
    assert len(events) > 50
    for event in events:
        assert event.keys() >= ALWAYS, event
        assert event["level"] in LEVELS
    check_ids(world, events, [failed, cancelled, done])
    check_secrets(world, "\n".join(texts), tickets)
    assert not [one for one in events if one["level"] in {"error", "critical"}]
    given_back = [one for one in events if one["event"] == "giving the machine back"]
    assert {one["migration"]: one["level"] for one in given_back} == {
        failed.id: "warning",
        cancelled.id: "warning",
    }


async def cancelled_one(world: World, guest: Any, ticket: bytes) -> pb.Migration:
    """A migration that is cancelled while memory is on its way."""
    running = await world.start(guest, world.a, world.b, ticket=ticket, max_bandwidth=MIB)
    await world.enters(world.a, running, pb.MIGRATION_PHASE_PRECOPYING)
    async with world.source(world.a) as stub:
        await stub.CancelMigration(pb.CancelMigrationRequest(id=running))
    return await world.ended(world.a, running)


def check_ids(world: World, events: list[dict[str, Any]], migrations: list[pb.Migration]) -> None:
    """Records and whatever else speaks of a migration carry its id; its trace, wherever they carry one."""
    traces = {one.id: one.trace_id for one in migrations}
    ours = [one for one in events if one["logger"].split(".")[0] in OURS]
    recorded = [one for one in ours if one["event"] == "recorded"]
    assert Counter(one["migration"] for one in recorded).keys() == traces.keys()
    assert {one["host"] for one in recorded} == {"a", "b"}
    about = [one for one in ours if one.get("machine") == recorded[0]["machine"] or "migration" in one]
    assert len(about) >= len(recorded)
    for one in about:
        assert one.get("trace_id") == traces[one["migration"]], one


def check_secrets(world: World, text: str, tickets: list[bytes]) -> None:
    """Nothing of any key, of any ticket, and nothing that looks like a token."""
    for key in world.root.rglob("*.key"):
        for line in key.read_text(encoding="ascii").splitlines():
            assert line.startswith("-----") or len(line) < 8 or line not in text, key
    assert "PRIVATE KEY" not in text
    for ticket in tickets:
        # What can be read in it are names; the secret is the signature at its end.
        signature = ticket[-48:]
        whole = base64.b64encode(ticket).decode()
        for spelt in (signature.hex(), whole[-40:], whole[40:80], repr(signature)[2:-1][:60]):
            assert spelt not in text
            assert json.dumps(spelt)[1:-1] not in text
    assert LOOKS_SECRET.findall(text) == []
