"""Pages survive the way through frames, and nothing that does not fit touches memory."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from xxhash import xxh3_128_digest

from vmferry.config import HostConfig
from vmferry.errors import ChunkRejectedError, HashMismatchError
from vmferry.memory.digest import PageTable
from vmferry.memory.regions import RamFile
from vmferry.memory.runs import PAGE_SIZE, PageRuns
from vmferry.security.tls import MAX_MESSAGE_BYTES
from vmferry.transfer.frames import MAX_PAGES_PER_CHUNK, Batches, BuiltChunk, ChunkBuilder, Intake
from vmferry.transfer.wire import ChunkFrame, chunk_frame, encode_chunk
from vmferry.v1.transfer_pb2 import ENCODING_NONE, Chunk, PageRun

PAGES = 64


@pytest.fixture
def source(tmp_path: Path) -> Iterator[RamFile]:
    with RamFile.create(tmp_path / "source.ram", PAGES * PAGE_SIZE) as ram:
        yield ram


@pytest.fixture
def intake(tmp_path: Path) -> Iterator[Intake]:
    with RamFile.create(tmp_path / "destination.ram", PAGES * PAGE_SIZE) as ram:
        yield Intake(ram, PageTable(PAGES))


def fill(ram: RamFile, pages: dict[int, int]) -> None:
    for page, seed in pages.items():
        data = random.Random(seed).randbytes(PAGE_SIZE) if seed else bytes(PAGE_SIZE)
        ram.write_pages([(page, 1)], memoryview(data))


def content(ram: RamFile) -> bytes:
    return ram.path.read_bytes()


def chunk(
    *runs: tuple[int, int], zero: tuple[tuple[int, int], ...] = (), data: bytes | None = None
) -> ChunkFrame:
    payload = b"x" * PAGE_SIZE * sum(count for _, count in runs) if data is None else data
    return chunk_frame(
        Chunk(
            runs=[PageRun(first_page=first, page_count=count) for first, count in runs],
            zero_runs=[PageRun(first_page=first, page_count=count) for first, count in zero],
            encoding=ENCODING_NONE,
            data=payload,
            data_hash=xxh3_128_digest(payload),
        )
    )


def build_chunk(ram: RamFile, table: PageTable, runs: list[tuple[int, int]], **changes: Any) -> BuiltChunk:
    return ChunkBuilder(ram, table).build(runs, **changes)


@given(
    rounds=st.lists(st.dictionaries(st.integers(0, PAGES - 1), st.integers(0, 5)), min_size=1, max_size=5),
    batch=st.integers(1, 20),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)
def test_memory_and_digest_are_the_same_after_any_rounds(
    source: RamFile, intake: Intake, rounds: list[dict[int, int]], batch: int
) -> None:
    """After any rounds of writes, both ends hold the same bytes and the same digest, zero pages included."""
    sent = PageTable(PAGES)
    everything = dict.fromkeys(range(PAGES), 0)
    for number, written in enumerate([everything, *rounds], start=1):
        fill(source, written)
        for runs in PageRuns((page, 1) for page in sorted(written)).batches(batch):
            built = build_chunk(source, sent, runs, round_number=number)
            intake.write(intake.check(built.frame))
            assert built.pages == sum(count for _, count in runs)
    assert content(source) == content(intake.ram)
    assert sent.root() == intake.table.root()


def test_zero_pages_travel_without_data(source: RamFile) -> None:
    """A page that is all zero is named, not sent."""
    fill(source, {1: 7, 3: 9})
    built = build_chunk(source, PageTable(PAGES), [(0, 4)], round_number=2)
    assert [(run.first_page, run.page_count) for run in built.frame.head.runs] == [(1, 1), (3, 1)]
    assert [(run.first_page, run.page_count) for run in built.frame.head.zero_runs] == [(0, 1), (2, 1)]
    assert (built.data_bytes, built.zero_pages) == (2 * PAGE_SIZE, 2)


def test_threads_share_the_pages_of_a_round() -> None:
    """Whoever asks at the same time gets other pages, and together they get all of them."""
    batches = Batches(PageRuns.whole(20_000), lambda: 1)
    with ThreadPoolExecutor(4) as pool:
        taken = [pool.submit(lambda: list(iter(batches.next, ()))) for _ in range(4)]
    pages = [run for one in taken for runs in one.result() for run in runs]
    assert sorted(pages) == [(page, 1) for page in range(20_000)]


def test_a_large_round_is_taken_from_several_places_in_turn() -> None:
    """So that zero memory, which lies together, is never all there is to look at; and each page once."""
    runs = PageRuns([(7, 30_000), (40_000, 40_000)])
    batches = Batches(runs, lambda: 512)
    taken = list(iter(batches.next, ()))
    firsts = [batch[0][0] for batch in taken[:4]]
    assert firsts == sorted(firsts)
    assert firsts[-1] > 60_000
    assert PageRuns(sorted(run for batch in taken for run in batch)) == runs
    assert sum(count for batch in taken for _, count in batch) == runs.page_count


def test_the_digest_is_that_of_memory_not_of_the_message(source: RamFile, intake: Intake) -> None:
    """A byte that changes in memory after it was written shows when the table is made anew from memory."""
    fill(source, {0: 3})
    built = build_chunk(source, PageTable(PAGES), [(0, 1)], round_number=1)
    intake.write(intake.check(built.frame))
    noted = intake.table.get(0)
    assert noted == xxh3_128_digest(content(intake.ram)[:PAGE_SIZE])


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        pytest.param(chunk((PAGES, 1)), "runs", id="behind the end"),
        pytest.param(chunk((PAGES - 1, 2)), "runs", id="across the end"),
        pytest.param(chunk((2**64 - 1, 1)), "runs", id="overflow"),
        pytest.param(chunk((3, 2), (4, 1)), "runs", id="overlapping"),
        pytest.param(chunk((5, 1), (1, 1)), "runs", id="out of order"),
        pytest.param(chunk((0, 0), data=b""), "runs", id="empty run"),
        pytest.param(chunk((0, 2), data=b"x" * PAGE_SIZE), "data", id="too little data"),
        pytest.param(chunk((0, 1), data=b"x" * 2 * PAGE_SIZE), "data", id="too much data"),
        pytest.param(chunk(zero=((0, 1),), data=b"x"), "data", id="zero pages with data"),
        pytest.param(chunk(zero=((PAGES, 1),), data=b""), "zero_runs", id="zero pages behind the end"),
    ],
)
def test_what_does_not_fit_is_refused_by_field(intake: Intake, bad: ChunkFrame, field: str) -> None:
    """Pages outside the region, or that contradict the data, are refused before memory is touched."""
    before = content(intake.ram)
    with pytest.raises(ChunkRejectedError) as refused:
        intake.check(bad)
    assert refused.value.field == field
    assert content(intake.ram) == before


def test_a_chunk_cannot_make_the_receiver_allocate_much(tmp_path: Path) -> None:
    """One small frame that names very many zero pages is refused."""
    pages = MAX_PAGES_PER_CHUNK + 1
    refused = pytest.raises(ChunkRejectedError, match="at most")
    with RamFile.create(tmp_path / "big.ram", pages * PAGE_SIZE) as ram, refused:
        Intake(ram, PageTable(pages)).check(chunk(zero=((0, pages),), data=b""))


def test_other_regions_and_encodings_are_refused(intake: Intake) -> None:
    """What was not agreed is not guessed."""
    for name, value in (("region", 1), ("encoding", 9)):
        bad = chunk((0, 1))
        setattr(bad.head, name, value)
        with pytest.raises(ChunkRejectedError) as refused:
            intake.check(bad)
        assert refused.value.field == name


def test_changed_data_is_noticed(intake: Intake) -> None:
    """One flipped bit on the way is an integrity error."""
    bad = chunk((0, 1))
    bad.data = b"y" + bytes(bad.data)[1:]
    with pytest.raises(HashMismatchError):
        intake.check(bad)


@pytest.mark.parametrize("spoiled", [0, 1, 2, 3])
def test_the_comparison_counts_every_differing_page(source: RamFile, intake: Intake, spoiled: int) -> None:
    """Compared byte for byte, each page that differs counts once, zero pages too, and nothing is written."""
    fill(source, {0: 5, 1: 6, 2: 0, 3: 0})
    table = PageTable(PAGES)
    intake.write(intake.check(build_chunk(source, table, [(0, 4)], round_number=1).frame))
    compared = intake.check(build_chunk(source, table, [(0, 4)], round_number=2, compare_only=True).frame)
    assert intake.compare(compared) == 0
    damaged = bytearray(content(intake.ram)[spoiled * PAGE_SIZE : (spoiled + 1) * PAGE_SIZE])
    damaged[4095] ^= 1
    intake.ram.write_pages([(spoiled, 1)], memoryview(damaged))
    before = content(intake.ram)
    assert intake.compare(compared) == 1
    assert content(intake.ram) == before


def test_the_largest_chunk_fits_into_a_message() -> None:
    """Each page a run of its own, far out in memory: the more scattered pages are, the larger is the head."""
    pages = HostConfig().chunk_bytes // PAGE_SIZE
    head = Chunk(
        sequence=2**63,
        round=2**31,
        runs=[PageRun(first_page=2**40 + 2 * number, page_count=1) for number in range(pages)],
        encoding=ENCODING_NONE,
        data_hash=bytes(16),
    )
    message = encode_chunk(ChunkFrame(head, bytes(pages * PAGE_SIZE), mark=False))
    assert pages <= MAX_PAGES_PER_CHUNK
    assert pages * PAGE_SIZE < len(message) < MAX_MESSAGE_BYTES
