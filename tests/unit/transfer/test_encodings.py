"""Compressed contents come back as they were, and nothing that claims to be some makes more than it may."""

from __future__ import annotations

import contextlib
import random
import resource
import tracemalloc

import lz4.block
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from vmferry.errors import ChunkRejectedError
from vmferry.memory.runs import PAGE_SIZE
from vmferry.negotiation.encodings import ENCODINGS, LZ4, NONE, ZSTD
from vmferry.transfer.encodings import NUMBERS, Encoder, decode, encoding_name

MIB = 1024 * 1024
LARGEST = 4 * MIB


def contents(seed: int, pages: int) -> bytes:
    """Pages of which some compress and some do not."""
    chance = random.Random(seed)
    return b"".join(
        chance.choice([bytes(PAGE_SIZE), chance.randbytes(PAGE_SIZE), chance.randbytes(16) * 256])
        for _ in range(pages)
    )


@given(seed=st.integers(0, 2**32), pages=st.integers(1, 40), level=st.sampled_from([1, 3, 6]))
@settings(deadline=None, max_examples=50)
def test_contents_come_back(seed: int, pages: int, level: int) -> None:
    """By every encoding, from any kind of buffer, one piece after the other."""
    data, encoder = contents(seed, pages), Encoder()
    for encoding in (LZ4, ZSTD, LZ4):
        encoded = encoder.encode(encoding, level, memoryview(bytearray(data)))
        assert decode(encoding, memoryview(encoded), len(data)) == data
    assert decode(NONE, data, len(data)) is data


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_another_size_than_expected_is_refused(encoding: str) -> None:
    """More, less and nothing: the pages that a chunk names say what its data must be."""
    data = contents(1, 4)
    encoded = data if encoding == NONE else Encoder().encode(encoding, 1, data)
    for size in (0, 1, len(data) - 1, len(data) + 1, len(data) * 2, LARGEST):
        with pytest.raises(ChunkRejectedError) as refused:
            decode(encoding, encoded, size)
        assert refused.value.field == "data"


@given(seed=st.integers(0, 2**32), data=st.data(), encoding=st.sampled_from([LZ4, ZSTD]))
@settings(deadline=None, max_examples=300)
def test_damaged_data_is_refused_or_has_the_expected_size(
    seed: int, data: st.DataObject, encoding: str
) -> None:
    """Cut off or changed anywhere: an error by name; the chunk's hash catches what still can be decoded."""
    plain = contents(seed, 3)
    encoded = bytearray(Encoder().encode(encoding, 1, plain))
    if data.draw(st.booleans()):
        del encoded[data.draw(st.integers(0, len(encoded) - 1)) :]
    else:
        for _ in range(data.draw(st.integers(1, 4))):
            encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ChunkRejectedError):
        assert len(decode(encoding, bytes(encoded), len(plain))) == len(plain)


def _bombs() -> dict[str, tuple[str, bytes]]:
    much = bytes(256 * MIB)
    stated = zstandard.ZstdCompressor(level=1).compress(much)
    silent = zstandard.ZstdCompressor(level=1, write_content_size=False).compress(much)
    page = zstandard.ZstdCompressor(level=1).compress(bytes(PAGE_SIZE))
    # A header of one segment whose eight bytes of size say 2**62, and nothing else.
    lying = b"\x28\xb5\x2f\xfd\xe0" + (1 << 62).to_bytes(8, "little") + page[9:]
    return {
        "a size that is true": (ZSTD, stated),
        "no size": (ZSTD, silent),
        "a size that nobody has": (ZSTD, lying),
        "a second frame behind": (ZSTD, page + stated),
        "a frame to be skipped": (ZSTD, b"\x50\x2a\x4d\x18\xff\xff\xff\x7f" + page),
        "lz4": (LZ4, lz4.block.compress(much, store_size=False)),
    }


@pytest.mark.parametrize(("encoding", "bomb"), _bombs().values(), ids=_bombs())
def test_a_bomb_takes_no_memory(encoding: str, bomb: bytes) -> None:
    """A few bytes that would become very many are refused before memory is taken for them."""
    tracemalloc.start()
    peak_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        with pytest.raises(ChunkRejectedError):
            decode(encoding, bomb, PAGE_SIZE)
        assert tracemalloc.get_traced_memory()[1] < MIB
    finally:
        tracemalloc.stop()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak_before < 16 * 1024


def test_only_what_was_agreed_has_a_name() -> None:
    """An encoding that exists, that does not, or that nobody sets is refused by field unless it was agreed."""
    assert encoding_name(NUMBERS[ZSTD], {ZSTD, NONE}) == ZSTD
    for number in (0, NUMBERS[LZ4], 4, 99, -1, 2**31 - 1):
        with pytest.raises(ChunkRejectedError) as refused:
            encoding_name(number, {ZSTD, NONE})
        assert refused.value.field == "encoding"
