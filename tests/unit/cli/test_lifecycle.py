"""What the command line says about queue, deadline and history: read, passed on, and shown."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import pytest

from tests.unit.cli.conftest import Run
from tests.unit.cli.fake_source import HOST_B, MIGRATION_ID, FakeSource, migration
from vmferry.cli.units import moment
from vmferry.errors import ExitCode, InvalidArgumentError
from vmferry.v1 import migration_pb2 as pb

NOW = datetime(2026, 11, 28, 12, 0, tzinfo=UTC)
MOVE = ("migrate", "web-1", "--to-host", HOST_B, "--to-address", "127.0.0.1:7602")


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("15m", 900), ("1.5h", 5400), ("7d", 604800), ("2 h", 7200)]
)
def test_spans_lead_ahead_and_back(text: str, seconds: int) -> None:
    """A span counts from now, in the direction that the option means."""
    span = timedelta(seconds=seconds)
    assert moment(text, field="--deadline", ahead=True, now=NOW) == NOW + span
    assert moment(text, field="--since", ahead=False, now=NOW) == NOW - span


@pytest.mark.parametrize(
    "text", ["2026-11-28T12:00:00Z", "2026-11-28 12:00", "2026-11-28T13:00:00+01:00", "2026-11-28T12:00"]
)
def test_times_are_read(text: str) -> None:
    """With a zone or, without one, as UTC."""
    assert moment(text, field="--since", ahead=False) == NOW


@pytest.mark.parametrize("text", ["", "soon", "12", "-5m", "5w", "999999999d", "2026-13-01"])
def test_what_is_no_time_is_refused(text: str) -> None:
    """The error names the option and shows what would be understood."""
    with pytest.raises(InvalidArgumentError) as caught:
        moment(text, field="--since", ahead=False)
    assert caught.value.field == "--since"
    assert "15m" in caught.value.instance_remedy


def test_deadline_and_priority_are_passed_on(call: Run, source: FakeSource) -> None:
    """When a migration is started, and when it is changed."""
    source.script = [migration(outcome=pb.MIGRATION_OUTCOME_COMPLETED)]
    before = datetime.now(UTC)
    for command in (MOVE, ("set", MIGRATION_ID)):
        assert call(*command, "--deadline", "10m", "--priority", 7).code == ExitCode.OK
        request = source.requests[-1]
        asked = request.options if isinstance(request, pb.StartMigrationRequest) else request
        assert asked.priority == 7
        left = asked.deadline.ToDatetime(tzinfo=UTC) - before
        assert timedelta(minutes=10) <= left < timedelta(minutes=11)
    assert call("set", MIGRATION_ID, "--priority", 10).code == ExitCode.USAGE


def test_switch_now(call: Run, source: FakeSource) -> None:
    """It names the migration, prints it, and says where to see what comes of it."""
    assert json.loads(call("switch-now", MIGRATION_ID, "--json").out)["id"] == MIGRATION_ID
    assert f"vmferry watch {MIGRATION_ID}" in call("switch-now", MIGRATION_ID).err
    assert call("switch-now", "0" * 32).code == ExitCode.PRECONDITION


def test_list_ends_where_it_is_told_to(call: Run, source: FakeSource) -> None:
    """All pages are fetched, or no more of them than it takes."""
    source.migrations = [migration() for _ in range(5)]
    for options, count in (((), 5), (("--limit", "2"), 2), (("--limit", "9"), 5)):
        source.requests.clear()
        assert len(json.loads(call("list", "--json", *options).out)["migrations"]) == count
        assert len(source.requests) == count, "one migration to a page"
    assert call("list", "--machines", "--limit", "2").code == ExitCode.USAGE


def test_list_asks_for_what_is_wanted(call: Run, source: FakeSource) -> None:
    """Every filter arrives in its field, on every page."""
    ran = call(
        "list", "--ended", "--to-host", HOST_B, "--outcome", "failed", "--outcome", "cancelled",
        "--since", "2026-11-01", "--before", "2026-11-28T12:00:00Z", "--phase", "queued",
    )  # fmt: skip
    assert ran.code == ExitCode.OK, ran.err
    assert len(source.requests) == 2
    for request in source.requests:
        assert list(request.outcomes) == [pb.MIGRATION_OUTCOME_FAILED, pb.MIGRATION_OUTCOME_CANCELLED]
        assert list(request.phases) == [pb.MIGRATION_PHASE_QUEUED, pb.MIGRATION_PHASE_ENDED]
        assert request.destination == HOST_B
        assert request.created_since.ToDatetime() == datetime(2026, 11, 1)  # noqa: DTZ001 - as the message has it
        assert request.created_before.ToDatetime(tzinfo=UTC) == NOW


@pytest.mark.parametrize(
    "option", [("--ended",), ("--since", "2h"), ("--outcome", "failed"), ("--to-host", HOST_B)]
)
def test_machines_have_no_outcome(call: Run, source: FakeSource, option: tuple[str, ...]) -> None:
    """--machines goes with none of the options about migrations."""
    ran = call("list", "--machines", *option)
    assert ran.code == ExitCode.USAGE
    assert "--machines" in ran.err


def test_status_shows_the_place_in_the_queue(call: Run, source: FakeSource) -> None:
    """Where it stands, what it waits for, until when, and who asked for it."""
    waiting = migration(phase=pb.MIGRATION_PHASE_QUEUED)
    waiting.queue.CopyFrom(
        pb.QueueState(position=2, length=5, waits_for="2 migrations leave this host already")
    )
    waiting.options.priority = 3
    waiting.options.deadline.FromDatetime(NOW)
    waiting.caller, waiting.request_id = "spiffe://test.example/admin/operator", "4d7c"
    source.migrations = [waiting]
    out = call("status", MIGRATION_ID).out
    assert "phase       queued\n" in out
    assert "queue       place 2 of 5: 2 migrations leave this host already; priority 3\n" in out
    assert "deadline    2026-11-28 12:00:00Z\n" in out
    assert "asked for   by spiffe://test.example/admin/operator, request 4d7c\n" in out


def test_watch_shows_the_queue_and_resumes(call: Run, source: FakeSource) -> None:
    """While it waits its place is shown; a broken watch goes on with the token of what it saw last."""
    waiting = migration(phase=pb.MIGRATION_PHASE_QUEUED)
    waiting.ClearField("progress")
    waiting.queue.CopyFrom(pb.QueueState(position=1, length=1, waits_for="room"))
    source.script = [waiting, source.away, migration(outcome=pb.MIGRATION_OUTCOME_COMPLETED)]
    ran = call("watch", MIGRATION_ID)
    assert ran.code == ExitCode.OK
    assert "queued: place 1 of 1: room" in ran.err
    assert source.resumed == ["", "token-1"]
