"""The source service's memory: what is kept, found and forgotten, and that no file can do harm."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from source_svc import history as history_module
from source_svc.history import Filter, History, key_of
from source_svc.listing import list_migrations, resume_token, seen_revision
from source_svc.migrations import Migration, Migrations
from source_svc.store import Store
from vmferry.errors import InvalidArgumentError
from vmferry.v1 import migration_pb2 as pb

DAY_NS = 24 * 3600 * 10**9
ENDED = pb.MIGRATION_PHASE_ENDED


@contextlib.asynccontextmanager
async def remembering(path: Path, *, days: float = 90, count: int = 100) -> AsyncIterator[History]:
    """A history in a file, closed afterwards."""
    store = Store(path, (history_module.SCHEMA,))
    await store.open()
    try:
        yield History(store, max_age_days=days, max_count=count)
    finally:
        await store.close()


def message(number: int, *, ended: bool = True, at_ns: int = 0, **fields: object) -> pb.Migration:
    """A migration that was accepted at a second of its own, counted from an hour ago."""
    values: dict[str, object] = {
        "id": f"{number:032x}",
        "machine": f"vm-{number % 2}",
        "machine_id": f"uuid-{number % 2}",
        "destination": pb.Destination(host=f"host-{number % 3}"),
        "phase": ENDED if ended else pb.MIGRATION_PHASE_QUEUED,
        "request_id": f"request-{number}",
        "trace_id": "0af7651916cd43dd8448eb211c80319c",
    }
    made = pb.Migration(**(values | fields))  # type: ignore[arg-type]  # each is one of its fields
    at_ns = at_ns or time.time_ns() - 3600 * 10**9 + number * 10**9
    made.create_time.FromNanoseconds(at_ns)
    if ended:
        made.end_time.FromNanoseconds(at_ns + 10**9)
        made.outcome = made.outcome or pb.MIGRATION_OUTCOME_COMPLETED
    return made


def ids(found: list[pb.Migration]) -> list[int]:
    """What was found, by number."""
    return [int(one.id, 16) for one in found]


async def test_what_is_written_is_there_after_a_restart(tmp_path: Path) -> None:
    """A migration, its request, its ticket and its trace, as they were; the ticket only until it has ended."""
    waiting, ended = message(1, ended=False), message(2)
    async with remembering(tmp_path / "memory") as history:
        assert await history.save(waiting, ticket=b"ticket", traceparent="parent")
        assert await history.save(ended)
    async with remembering(tmp_path / "memory") as history:
        (one,) = await history.unfinished()
        assert (one.message, one.ticket, one.traceparent) == (waiting, b"ticket", "parent")
        assert await history.get(ended.id) == ended
        assert await history.of_request("request-1") == waiting
        assert await history.of_request("request-3") is None
        waiting.phase = ENDED
        await history.save(waiting)
        assert await history.unfinished() == []
    assert b"ticket" not in [row[0] for row in rows(tmp_path / "memory", "SELECT ticket FROM migrations")]
    assert (tmp_path / "memory").stat().st_mode & 0o777 == 0o600


async def test_a_later_write_keeps_what_it_does_not_know(tmp_path: Path) -> None:
    """Saving again while it copies loses neither the ticket nor the trace that it was accepted with."""
    one = message(1, ended=False)
    async with remembering(tmp_path / "memory") as history:
        await history.save(one, ticket=b"ticket", traceparent="parent")
        one.phase = pb.MIGRATION_PHASE_PRECOPYING
        await history.save(one)
        (kept,) = await history.unfinished()
    assert (kept.message, kept.ticket, kept.traceparent) == (one, b"ticket", "parent")


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (Filter(), [6, 5, 4, 3, 2, 1]),
        (Filter(machine="vm-1"), [5, 3, 1]),
        (Filter(machine="uuid-0"), [6, 4, 2]),
        (Filter(destination="host-2"), [5, 2]),
        (Filter(outcomes=(pb.MIGRATION_OUTCOME_FAILED, pb.MIGRATION_OUTCOME_CANCELLED)), [4]),
        (Filter(phases=(ENDED,)), [6, 5, 4, 3, 2, 1]),
        (Filter(phases=(pb.MIGRATION_PHASE_QUEUED,)), []),
        (Filter(open_only=True), []),
        (Filter(since_ns=DAY_NS + 3, before_ns=DAY_NS + 5), [4, 3]),
        (Filter(machine="vm-1", destination="host-1"), [1]),
    ],
)
async def test_filters(tmp_path: Path, wanted: Filter, expected: list[int]) -> None:
    """Each filter by itself and together, and the same answer from the file as from memory."""
    all_of_them = [message(number, at_ns=DAY_NS + number) for number in range(1, 7)]
    all_of_them[3].outcome = pb.MIGRATION_OUTCOME_FAILED
    async with remembering(tmp_path / "memory", days=1e5) as history:
        for one in all_of_them:
            await history.save(one)
        assert ids(await history.select(wanted, limit=10)) == expected
    assert ids(sorted(filter(wanted.matches, all_of_them), key=key_of, reverse=True)) == expected


async def test_the_old_and_the_many_are_forgotten(tmp_path: Path) -> None:
    """By age and by count; what has not ended stays, however old."""
    now = time.time_ns()
    async with remembering(tmp_path / "memory", days=2, count=3) as history:
        await history.save(message(1, ended=False, at_ns=now - 9 * DAY_NS))
        await history.save(message(2, at_ns=now - 3 * DAY_NS))
        for number in range(3, 8):
            await history.save(message(number, at_ns=now - DAY_NS + number))
        assert ids(await history.select(Filter(), limit=10)) == [7, 6, 5]
        assert ids([one.message for one in await history.unfinished()]) == [1]


async def test_starts_count_up_whatever_the_clock_says(tmp_path: Path) -> None:
    """Each start has a higher number, also if the clock stood ahead at an earlier one."""
    async with remembering(tmp_path / "memory") as history:
        first = await history.count_start()
        assert await history.count_start() == first + 1
    with contextlib.closing(sqlite3.connect(tmp_path / "memory")) as db:
        db.execute("UPDATE starts SET number = number + 1000")
        db.commit()
    async with remembering(tmp_path / "memory") as history:
        assert await history.count_start() == first + 1002


@pytest.mark.parametrize("damage", ["garbage", "torn", "later release", "page"])
async def test_a_damaged_file_is_set_aside(tmp_path: Path, damage: str) -> None:
    """Whatever is wrong with it, a new one is begun and the old one kept."""
    path = tmp_path / "memory"
    async with remembering(path) as history:
        for number in range(1, 200):
            await history.save(message(number))
    spoil(path, damage)
    async with remembering(path) as history:
        assert await history.save(message(500))
        assert ids(await history.select(Filter(), limit=10)) == [500]
    assert sum("damaged" in name for name in os.listdir(tmp_path)) == 1  # noqa: PTH208 - the names are enough


async def test_damage_while_it_is_used(tmp_path: Path) -> None:
    """A file that is overwritten under the service is noticed by the next use, which finds an empty one."""
    path = tmp_path / "memory"
    async with remembering(path) as history:
        for number in range(1, 200):
            await history.save(message(number))
        for suffix in ("", "-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError), open(f"{path}{suffix}", "r+b") as file:  # noqa: ASYNC230, PTH123 - a test
                file.write(os.urandom(65536))
        answers = [await history.save(message(500 + number)) for number in range(3)]
        assert answers[-1]
        assert 502 in ids(await history.select(Filter(), limit=10))


async def test_no_disk_is_no_harm(tmp_path: Path) -> None:
    """A place where no file can be made costs the memory and nothing else, and what comes to be writable is used."""
    blocked = tmp_path / "state"
    blocked.write_text("a file where the folder should be")
    async with remembering(blocked / "memory") as history:
        assert await history.count_start() > 0
        assert not await history.save(message(1))
        assert await history.get(message(1).id) is None
        assert await history.select(Filter(), limit=10) == []
        assert await history.unfinished() == []
        blocked.unlink()
        assert await history.save(message(2))


async def test_a_full_disk_is_tried_again(tmp_path: Path) -> None:
    """What ended while nothing could be written is written with the next that ends."""
    async with remembering(tmp_path / "memory") as history:
        migrations = Migrations(history)
        with contextlib.closing(sqlite3.connect(tmp_path / "memory", isolation_level=None)) as other:
            other.execute("BEGIN EXCLUSIVE")
            await end(migrations, 1)
            assert await history.get(message(1).id) is None
        await end(migrations, 2)
        assert ids(await history.select(Filter(), limit=10)) == [2, 1]


async def test_pages_stand_still_while_things_change(tmp_path: Path) -> None:
    """What begins, ends or is forgotten between two pages neither repeats nor hides what was there all the time."""
    async with remembering(tmp_path / "memory") as history:
        migrations = Migrations(history)
        for number in range(1, 6):
            await history.save(message(number))
        for number in (6, 7):
            migrations.add(Migration(message(number, ended=False)))
        request = pb.ListMigrationsRequest(page_size=3)
        answer = await list_migrations(request, migrations, history)
        assert ids(list(answer.migrations)) == [7, 6, 5]
        request.page_token = answer.next_page_token
        migrations.add(Migration(message(8, ended=False)))
        await (await migrations.find(message(6).id)).end(pb.MIGRATION_OUTCOME_FAILED)
        await migrations.flush()
        answer = await list_migrations(request, migrations, history)
        assert ids(list(answer.migrations)) == [4, 3, 2]
        request.page_token = answer.next_page_token
        answer = await list_migrations(request, migrations, history)
        assert (ids(list(answer.migrations)), answer.next_page_token) == ([1], "")


@pytest.mark.parametrize(
    ("field", "request_"),
    [
        ("page_token", pb.ListMigrationsRequest(page_token="7")),
        ("page_token", pb.ListMigrationsRequest(page_token="' OR 1=1 --")),
        ("page_token", pb.ListMigrationsRequest(page_token=f"{10**19 - 1}.{'a' * 32}.{'b' * 16}")),
        ("page_size", pb.ListMigrationsRequest(page_size=-1)),
        ("phases", pb.ListMigrationsRequest(phases=[99])),
        ("outcomes", pb.ListMigrationsRequest(outcomes=[99])),
    ],
)
async def test_lists_refuse_what_cannot_be_meant(
    tmp_path: Path, field: str, request_: pb.ListMigrationsRequest
) -> None:
    """By the name of the field; a token of a list with other filters is one of these."""
    async with remembering(tmp_path / "memory") as history:
        with pytest.raises(InvalidArgumentError) as caught:
            await list_migrations(request_, Migrations(history), history)
    assert caught.value.field == field


async def test_a_watch_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """With a token it hears only what is newer; of an ended migration that it knows, nothing."""
    async with remembering(tmp_path / "memory") as history:
        migrations = Migrations(history)
        migrations.started(5)
        migration = Migration(message(1, ended=False))
        migrations.add(migration)
        watch = migration.watch()
        first = await anext(watch)
        await watch.aclose()
        again = pb.WatchMigrationRequest(id=migration.id, resume_token=resume_token(first))
        await migration.touch()
        watch = migration.watch(seen_revision(again))
        assert (await anext(watch)).revision > first.revision
        await migration.end(pb.MIGRATION_OUTCOME_FAILED)
        last = [one async for one in watch][-1]
        assert last.phase == ENDED
        again.resume_token = resume_token(last)
        assert [one async for one in migration.watch(seen_revision(again))] == []
        await migrations.flush()


@pytest.mark.parametrize("token", ["x", "1.2", f"{'b' * 32}.7", f"{'a' * 32}.", f"{'a' * 32}.-1"])
def test_a_watch_refuses_a_strange_token(token: str) -> None:
    """One that was not made here, or for another migration."""
    with pytest.raises(InvalidArgumentError) as caught:
        seen_revision(pb.WatchMigrationRequest(id="a" * 32, resume_token=token))
    assert caught.value.field == "resume_token"


async def end(migrations: Migrations, number: int) -> None:
    """One migration ends, and was offered to the history."""
    migration = Migration(message(number, ended=False))
    migrations.add(migration)
    await migration.end(pb.MIGRATION_OUTCOME_COMPLETED)
    await migrations.flush()


def spoil(path: Path, damage: str) -> None:
    """Damage a file that nobody has open."""
    data = path.read_bytes()
    match damage:
        case "garbage":
            path.write_bytes(os.urandom(len(data)))
        case "torn":
            path.write_bytes(data[: len(data) // 2])
        case "page":
            path.write_bytes(data[:4096] + os.urandom(len(data) - 4096))
        case "later release":
            with contextlib.closing(sqlite3.connect(path)) as db:
                db.execute("PRAGMA user_version = 99")


def rows(path: Path, query: str) -> list[tuple[object, ...]]:
    """What a file holds."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        return db.execute(query).fetchall()
