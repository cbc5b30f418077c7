"""Pieces of a stream come back as they were, and one that is not what it says is refused before it takes memory."""

from __future__ import annotations

import random
import tracemalloc

import lz4.block
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from vmferry.errors import ChunkRejectedError
from vmferry.negotiation.encodings import ENCODINGS, NONE
from vmferry.transfer.compression import METHODS, RAW
from vmferry.transfer.pieces import PieceBuilder, is_plain, unpack
from vmferry.transfer.streams import MAX_PIECE_BYTES
from vmferry.transfer.wire import PieceFrame, decode_request, encode_piece, stream_bytes
from vmferry.v1.transfer_pb2 import ENCODING_LZ4, ENCODING_NONE, ENCODING_ZSTD, Encoding, StreamPiece

MIB = 1024 * 1024
TEXT = b"what a guest keeps in its memory " * 40


def squeezed(data: bytes, *, sized: bool = True) -> bytes:
    return zstandard.ZstdCompressor(level=1, write_content_size=sized).compress(data)


def blocked(data: bytes) -> bytes:
    packed: bytes = lz4.block.compress(data, store_size=False)
    return packed


@given(
    seed=st.integers(0, 2**32),
    size=st.integers(1, 20_000),
    offset=st.integers(0, 2**40),
    method=st.sampled_from(METHODS),
    compresses=st.booleans(),
)
@settings(deadline=None, max_examples=100)
def test_pieces_come_back(*, seed: int, size: int, offset: int, method: object, compresses: bool) -> None:
    """Over the wire, by every method, smaller where that is possible."""
    chance = random.Random(seed)
    data = (TEXT * (size // len(TEXT) + 1))[:size] if compresses else chance.randbytes(size)
    builder = PieceBuilder()
    for _ in range(2):
        made, effort = builder.build(offset, data, method)  # type: ignore[arg-type]  # drawn from methods
        raw = encode_piece(made)
        assert len(raw) <= size + 40
        assert stream_bytes(made) == effort.data_bytes == size
        if compresses and size > 2000 and method != RAW:
            assert len(raw) < size / 2
        came = decode_request(raw)
        assert isinstance(came, PieceFrame)
        back = unpack(came, ENCODINGS)
        assert (back.data, back.head.offset, back.mark) == (data, offset, False)


def test_a_piece_that_is_not_compressed_is_what_older_releases_send() -> None:
    """Nothing but number, place, bytes and end; that is taken in whatever was agreed."""
    for method, data in ((RAW, TEXT), (METHODS[2], random.Random(1).randbytes(4096))):
        made, _ = PieceBuilder().build(7, data, method)
        assert made.head == StreamPiece(offset=7)
        assert is_plain(made)
        assert unpack(made, {NONE}) is made


BAD: dict[str, tuple[Encoding.ValueType, int, bytes, str]] = {
    "a bomb that says so": (ENCODING_ZSTD, 512 * MIB, squeezed(bytes(256 * MIB)), "decoded_bytes"),
    "a bomb that says less": (ENCODING_ZSTD, MAX_PIECE_BYTES, squeezed(bytes(256 * MIB)), "data"),
    "a bomb that says nothing": (ENCODING_ZSTD, 0, squeezed(bytes(256 * MIB), sized=False), "decoded_bytes"),
    "a bomb without its size": (ENCODING_ZSTD, 4096, squeezed(bytes(256 * MIB), sized=False), "data"),
    "a bomb of the other kind": (ENCODING_LZ4, MAX_PIECE_BYTES, blocked(bytes(256 * MIB)), "data"),
    "a bomb behind the piece": (ENCODING_ZSTD, len(TEXT), squeezed(TEXT) + squeezed(bytes(MIB)), "data"),
    "just too large": (
        ENCODING_LZ4,
        MAX_PIECE_BYTES + 1,
        blocked(bytes(MAX_PIECE_BYTES + 1)),
        "decoded_bytes",
    ),
    "more than it says": (ENCODING_LZ4, len(TEXT) - 1, blocked(TEXT), "data"),
    "less than it says": (ENCODING_ZSTD, len(TEXT) + 1, squeezed(TEXT), "data"),
    "nothing": (ENCODING_ZSTD, len(TEXT), b"", "data"),
    "no size": (ENCODING_LZ4, 0, blocked(TEXT), "decoded_bytes"),
    "cut off": (ENCODING_LZ4, len(TEXT), blocked(TEXT)[:-2], "data"),
    "another kind than it says": (ENCODING_LZ4, len(TEXT), squeezed(TEXT), "data"),
    "not encoded, of another size": (ENCODING_NONE, len(TEXT) + 1, TEXT, "data"),
    "a size without an encoding": (Encoding.ValueType(0), len(TEXT), TEXT, "encoding"),
    "one that nobody knows": (Encoding.ValueType(4), len(TEXT), TEXT, "encoding"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_not_what_it_says_is_refused(name: str) -> None:
    """By its field, and without memory for what it claims."""
    encoding, size, data, field = BAD[name]
    frame = PieceFrame(StreamPiece(encoding=encoding, decoded_bytes=size), data, mark=False)
    tracemalloc.start()
    try:
        with pytest.raises(ChunkRejectedError) as refused:
            unpack(frame, ENCODINGS)
        assert tracemalloc.get_traced_memory()[1] < 2 * MAX_PIECE_BYTES
    finally:
        tracemalloc.stop()
    assert refused.value.field == field


def test_only_what_was_agreed_is_decoded() -> None:
    """Also of what could be."""
    frame = PieceFrame(
        StreamPiece(encoding=ENCODING_ZSTD, decoded_bytes=len(TEXT)), squeezed(TEXT), mark=True
    )
    assert unpack(frame, {"zstd"}).data == TEXT
    assert unpack(frame, {"zstd"}).mark
    with pytest.raises(ChunkRejectedError) as refused:
        unpack(frame, {NONE, "lz4"})
    assert refused.value.field == "encoding"
