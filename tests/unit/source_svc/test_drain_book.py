"""What a host keeps of its drain: on disk before it is told, whole or not at all, never older than what was told."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from source_svc.drain_service import DrainService
from source_svc.drainstate import DrainBook
from source_svc.inside import Inside
from vmferry.config import HostConfig
from vmferry.drain.record import FILE_NAME, DrainFile
from vmferry.errors import ConfigError
from vmferry.rpc.interceptors import acting_as
from vmferry.security.identity import Identity
from vmferry.security.warrants import VerifiedWarrant
from vmferry.v1 import drain_pb2 as dp
from vmferry.v1 import migration_pb2 as pb
from vmferry.v1.machine_pb2 import Machine

OWN = Identity.parse("spiffe://example.org/vmhost/a")
CALLER = Identity.parse("spiffe://example.org/controller/main")


@pytest.fixture
def book(tmp_path: Path) -> DrainBook:
    return DrainBook(HostConfig(state_dir=tmp_path), OWN)


@contextlib.contextmanager
def refusing(state_dir: Path) -> Iterator[None]:
    """A disk that takes no record: a folder lies in its place."""
    file, kept = state_dir / FILE_NAME, state_dir / "kept"
    with contextlib.suppress(FileNotFoundError):
        file.rename(kept)
    (file / "full").mkdir(parents=True)
    try:
        yield
    finally:
        (file / "full").rmdir()
        file.rmdir()
        with contextlib.suppress(FileNotFoundError):
            kept.rename(file)


def request() -> dp.DrainHostRequest:
    return dp.DrainHostRequest(
        request_id=str(uuid.uuid4()),
        destinations=[pb.Destination(host="spiffe://example.org/vmhost/b", address="b:7443")],
        warrant=b"a warrant",
    )


async def begin(book: DrainBook, asked: dp.DrainHostRequest) -> None:
    now = datetime.now(UTC)
    warrant = VerifiedWarrant(
        signer=CALLER,
        warrant_id=b"id",
        source=OWN,
        destinations=frozenset(one.host for one in asked.destinations),
        machines={},
        not_before=now,
        expires=now + timedelta(hours=1),
        signed=b"",
    )
    await book.begin(asked, warrant, CALLER)


async def test_a_drain_that_the_disk_did_not_take_was_never_asked_for(
    book: DrainBook, tmp_path: Path
) -> None:
    """Asked for again it is not taken for a repetition, which would be answered and not done."""
    asked = request()
    with refusing(tmp_path), pytest.raises(ConfigError, match=r"drain\.json"):
        await begin(book, asked)
    assert not book.knows(asked.request_id)
    assert not book.record.draining
    assert (book.drain.state, len(book.drain.destinations)) == (dp.DRAIN_STATE_NONE, 0)

    await begin(book, asked)
    assert book.knows(asked.request_id)
    assert DrainFile(tmp_path).draining


async def test_a_drain_goes_on_until_its_undoing_is_on_disk(book: DrainBook, tmp_path: Path) -> None:
    """Otherwise it would say that it is undone, and go on after a restart."""
    await begin(book, request())
    book.item("one", "vm-one", 1)
    await book.save()
    with refusing(tmp_path), pytest.raises(ConfigError, match=r"drain\.json"):
        await book.undo(CALLER)
    assert book.record.draining
    assert book.record.warrant == b"a warrant"
    assert book.drain.state == dp.DRAIN_STATE_DRAINING
    assert book.items["one"].state == dp.DRAINED_MACHINE_STATE_WAITING

    await book.undo(CALLER)
    assert book.snapshot().state == dp.DRAIN_STATE_NONE
    assert book.snapshot().takes_newcomers
    assert not DrainFile(tmp_path).draining


async def test_what_was_told_of_a_drain_is_what_is_kept(book: DrainBook) -> None:
    """Its times too: nothing is different a moment later, so nothing is written again."""
    await begin(book, request())
    await book.save()
    assert book.snapshot().revision == 1
    await book.undo(CALLER)
    await book.save()
    assert book.snapshot().revision == 2


async def test_what_came_about_while_a_change_was_written_is_kept(
    book: DrainBook, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that has gone in that moment does not come back into the list as one that waits."""
    await begin(book, request())
    book.item("one", "vm-one", 1)
    await book.save()
    written = book.file.write

    def write(record: dp.DrainRecord) -> None:
        book.items["one"].state = dp.DRAINED_MACHINE_STATE_MOVED
        written(record)

    monkeypatch.setattr(book.file, "write", write)
    await book.undo(CALLER)
    monkeypatch.undo()
    await book.save()
    assert book.snapshot().state == dp.DRAIN_STATE_NONE
    assert book.snapshot().machines[0].state == dp.DRAINED_MACHINE_STATE_MOVED


async def test_an_older_record_is_never_written_behind_a_newer_one(
    book: DrainBook, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever is cancelled while it writes has written it before the next one does."""
    await begin(book, request())
    under_way, go_on, done = (threading.Event() for _ in range(3))
    written = book.file.write

    def write(record: dp.DrainRecord) -> None:
        under_way.set()
        go_on.wait()
        written(record)
        done.set()

    monkeypatch.setattr(book.file, "write", write)
    book.item("one", "vm-one", 1)
    first = asyncio.create_task(book.save())
    await asyncio.to_thread(under_way.wait)
    monkeypatch.undo()
    first.cancel()
    undo = asyncio.create_task(book.undo(CALLER))
    with contextlib.suppress(TimeoutError):  # a wrong order shows itself here; a right one waits
        await asyncio.wait_for(asyncio.shield(undo), 0.2)
    go_on.set()
    await asyncio.gather(first, return_exceptions=True)
    await asyncio.to_thread(done.wait)
    await undo
    assert not DrainFile(tmp_path).draining
    record = DrainFile(tmp_path).read()
    assert record is not None
    assert record.drain == book.snapshot()


class Waiting:
    """A host whose machines are being listed; it has none."""

    def __init__(self) -> None:
        self.asked, self.answers = asyncio.Event(), asyncio.Event()

    async def machines(self) -> list[Machine]:
        self.asked.set()
        await self.answers.wait()
        return []


async def test_what_was_about_to_be_said_of_a_drain_is_not_said_behind_its_undoing(
    book: DrainBook, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The list comes in the moment in which the undoing is written."""
    await begin(book, request())
    inside, settled, loop = Waiting(), threading.Event(), asyncio.get_running_loop()
    settle, written = DrainBook.settle, DrainFile.write

    async def settling(self: DrainBook, *facts: Any) -> None:
        settled.set()
        await settle(self, *facts)

    def write(self: DrainFile, record: dp.DrainRecord) -> None:
        if not record.draining:
            loop.call_soon_threadsafe(inside.answers.set)
            settled.wait(0.3)  # long enough for whoever would not be held back
        written(self, record)

    monkeypatch.setattr(DrainBook, "settle", settling)
    monkeypatch.setattr(DrainFile, "write", write)
    host: Any = SimpleNamespace(
        config=HostConfig(state_dir=tmp_path),
        own=OWN,
        tls=SimpleNamespace(load=lambda: SimpleNamespace(ca_pem=b"")),
    )
    nobody: Any = None
    service = DrainService(host, cast("Inside", inside))
    service.resume()
    await inside.asked.wait()
    with acting_as(CALLER):
        answer = await service.UndrainHost(dp.UndrainHostRequest(), nobody)
        shown = await service.GetDrain(dp.GetDrainRequest(), nobody)
    await service.stop()
    assert [one.drain.state for one in (answer, shown)] == [dp.DRAIN_STATE_NONE] * 2
