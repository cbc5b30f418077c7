"""What a destination does with a burst of pages: as in a migration, bounded, and forgotten."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator, Iterable, Iterator
from pathlib import Path

import pytest
from xxhash import xxh3_128_digest

from dest_svc import measuring
from dest_svc.measuring import MAX_BYTES, MAX_CALLS, MAX_SOURCES, Measurements
from tests.integration.services import descriptors
from vmferry.errors import (
    ChunkRejectedError,
    HashMismatchError,
    InsufficientMemoryError,
    InvalidArgumentError,
    TimedOutError,
    TooManyMigrationsError,
)
from vmferry.memory.runs import PAGE_SIZE
from vmferry.security.identity import Identity, Kind
from vmferry.transfer.wire import ChunkFrame, decode_measured
from vmferry.v1 import handoff_pb2, transfer_pb2


@pytest.fixture
def folder() -> Iterator[Path]:
    """Where guest memory is made; afterwards nothing is in it, and no file of it is open."""
    with tempfile.TemporaryDirectory(prefix="vf-", dir="/dev/shm") as name:
        yield Path(name)
        assert list(Path(name).iterdir()) == []
        assert [target for target in descriptors(os.getpid()) if name in target] == []


def host(name: str) -> Identity:
    return Identity("test.example", Kind.VMHOST, name)


def chunk(pages: int, **changes: object) -> handoff_pb2.MeasureRequest:
    data = os.urandom(pages * PAGE_SIZE)
    made = transfer_pb2.Chunk(
        runs=[transfer_pb2.PageRun(first_page=0, page_count=pages)],
        encoding=transfer_pb2.ENCODING_NONE,
        data=data,
        data_hash=xxh3_128_digest(data),
    )
    for name, value in changes.items():
        setattr(made, name, value)
    return handoff_pb2.MeasureRequest(chunk=made)


async def sent(requests: Iterable[handoff_pb2.MeasureRequest]) -> AsyncIterator[ChunkFrame]:
    for request in requests:
        yield decode_measured(request.SerializeToString())


async def waiting(gate: asyncio.Event) -> AsyncIterator[ChunkFrame]:
    """One chunk, and then nothing until the gate opens."""
    async for frame in sent([chunk(1)]):
        yield frame
    await gate.wait()


async def test_what_came_is_counted_and_timed(folder: Path) -> None:
    """The answer has the bytes that came, how long that took, and how fast memory was taken meanwhile."""
    answer = await Measurements(folder).measure(host("a"), sent([chunk(256)] * 4))
    assert answer.data_bytes == 4 * 256 * PAGE_SIZE
    assert answer.elapsed.ToNanoseconds() > 0
    assert answer.reserve_bytes_per_second > 0


async def test_the_shortest_call_tells_how_fast_memory_was_taken(folder: Path) -> None:
    """It waits for the step that it began."""
    for _ in range(50):
        answer = await Measurements(folder).measure(host("a"), sent([chunk(1)]))
        assert answer.reserve_bytes_per_second > 0


async def test_a_call_without_pages_takes_nothing(folder: Path) -> None:
    """It is answered, which is what a source wants to know of the way there and back."""
    assert await Measurements(folder).measure(host("a"), sent([])) == handoff_pb2.MeasureResponse()


async def test_memory_is_taken_once_for_all_calls_of_a_source(folder: Path) -> None:
    """A migration takes one machine's memory, however many lanes it has."""
    measurements, gate = Measurements(folder), asyncio.Event()
    calls = [asyncio.create_task(measurements.measure(host("a"), waiting(gate))) for _ in range(3)]
    await asyncio.sleep(0)
    gate.set()
    answers = await asyncio.gather(*calls)
    assert sum(answer.reserve_bytes_per_second > 0 for answer in answers) <= 1


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        pytest.param(handoff_pb2.MeasureRequest(), ChunkRejectedError, id="no chunk"),
        pytest.param(chunk(2, data_hash=b"x" * 16), HashMismatchError, id="wrong hash"),
        pytest.param(chunk(2, data=b"short"), ChunkRejectedError, id="not whole pages"),
        pytest.param(chunk(1025), ChunkRejectedError, id="more pages than a chunk may have"),
    ],
)
async def test_chunks_are_checked_as_in_a_migration(
    folder: Path, request_: handoff_pb2.MeasureRequest, error: type[Exception]
) -> None:
    """What a migration would refuse is refused."""
    with pytest.raises(error):
        await Measurements(folder).measure(host("a"), sent([chunk(1), request_]))


async def test_a_call_takes_so_many_bytes(folder: Path) -> None:
    """A call that goes on for ever is ended at the limit."""
    one = chunk(1024)
    enough = MAX_BYTES // len(one.chunk.data)
    assert (await Measurements(folder).measure(host("a"), sent([one] * enough))).data_bytes == MAX_BYTES
    with pytest.raises(InvalidArgumentError):
        await Measurements(folder).measure(host("a"), sent([one] * (enough + 1)))


async def test_a_call_lasts_so_long(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A caller that says nothing holds nothing for long."""
    monkeypatch.setattr(measuring, "MAX_SECONDS", 0.05)
    with pytest.raises(TimedOutError):
        await Measurements(folder).measure(host("a"), waiting(asyncio.Event()))


async def test_only_so_many_measure_at_a_time(folder: Path) -> None:
    """Further hosts, and further calls of one host, are refused until others have ended."""
    measurements, gate = Measurements(folder), asyncio.Event()
    open_calls = [
        asyncio.create_task(measurements.measure(host("a"), waiting(gate))) for _ in range(MAX_CALLS)
    ]
    open_calls += [
        asyncio.create_task(measurements.measure(host(f"other-{number}"), waiting(gate)))
        for number in range(MAX_SOURCES - 1)
    ]
    await asyncio.sleep(0)  # each runs as far as its first wait
    try:
        for name in ("a", "one-too-many"):
            with pytest.raises(TooManyMigrationsError) as caught:
                await measurements.measure(host(name), sent([]))
            assert caught.value.metadata["limit"] == "measurements"
    finally:
        gate.set()
        await asyncio.gather(*open_calls)
    await measurements.measure(host("one-too-many"), sent([chunk(1)]))


async def test_a_cancelled_call_leaves_nothing(folder: Path) -> None:
    """Files are closed after what writes to them, and the next call is served."""
    measurements = Measurements(folder)
    call = asyncio.create_task(measurements.measure(host("a"), waiting(asyncio.Event())))
    await asyncio.sleep(0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert (await measurements.measure(host("a"), sent([chunk(1)]))).data_bytes == PAGE_SIZE


async def test_a_missing_folder_is_named(folder: Path) -> None:
    """A host that cannot make memory says so by an error of the catalogue."""
    with pytest.raises(InsufficientMemoryError, match="nowhere"):
        await Measurements(folder / "nowhere").measure(host("a"), sent([chunk(1)]))
