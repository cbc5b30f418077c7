"""A host that compresses what nobody asked it to, or what would be more than it says.

Each offence is told by name before memory is taken or touched, and the lane can be opened again.
"""

from __future__ import annotations

import lz4.block
import pytest
import zstandard
from xxhash import xxh3_128_digest

from tests.hostile.raw_source import PAGES, Lane, RawSource, Request
from tests.integration.hosts import MIB
from tests.integration.services import refusal
from vmferry.errors import VmferryError
from vmferry.memory.runs import PAGE_SIZE
from vmferry.v1 import transfer_pb2

pytestmark = pytest.mark.usefixtures("tidy")

PAGE = b"\xa5" * PAGE_SIZE
LZ4, ZSTD = transfer_pb2.ENCODING_LZ4, transfer_pb2.ENCODING_ZSTD
_BOMB = bytes(256 * MIB)


def squeezed(data: bytes, *, sized: bool = True) -> bytes:
    return zstandard.ZstdCompressor(level=1, write_content_size=sized).compress(data)


def blocked(data: bytes) -> bytes:
    packed: bytes = lz4.block.compress(data, store_size=False)
    return packed


def encoded(
    lane: Lane, encoding: transfer_pb2.Encoding.ValueType, data: bytes, plain: bytes = PAGE
) -> Request:
    """The next chunk of a lane, for the first page, in an encoding."""
    return lane.chunk([(0, 1)], data, encoding=encoding, data_hash=xxh3_128_digest(plain))


BAD = {
    "a bomb that says so": (ZSTD, squeezed(_BOMB), "CHUNK_REJECTED", "data"),
    "a bomb that says nothing": (ZSTD, squeezed(_BOMB, sized=False), "CHUNK_REJECTED", "data"),
    "a bomb behind the page": (ZSTD, squeezed(PAGE) + squeezed(_BOMB), "CHUNK_REJECTED", "data"),
    "a bomb of the other kind": (LZ4, blocked(_BOMB), "CHUNK_REJECTED", "data"),
    "too little": (ZSTD, squeezed(PAGE[:-1]), "CHUNK_REJECTED", "data"),
    "too little of the other kind": (LZ4, blocked(PAGE[:-1]), "CHUNK_REJECTED", "data"),
    "cut off": (ZSTD, squeezed(PAGE)[:-2], "CHUNK_REJECTED", "data"),
    "cut off, the other kind": (LZ4, blocked(PAGE)[:-2], "CHUNK_REJECTED", "data"),
    "nothing": (ZSTD, b"", "CHUNK_REJECTED", "data"),
    "raw pages": (ZSTD, PAGE, "CHUNK_REJECTED", "data"),
    "another kind than it says": (LZ4, squeezed(PAGE), "CHUNK_REJECTED", "data"),
    "another page": (ZSTD, squeezed(b"\x5a" * PAGE_SIZE), "HASH_MISMATCH", "data_hash"),
    "one that nobody knows": (transfer_pb2.Encoding.ValueType(4), PAGE, "CHUNK_REJECTED", "encoding"),
}


async def test_what_does_not_decode_to_its_pages_is_refused_by_name(source: RawSource) -> None:
    """Nothing is written, and the service does not grow by what was claimed."""
    await source.begin(encodings=["zstd", "lz4", "none"])
    lane = await source.open_lane()
    for name, (encoding, data, reason, field) in BAD.items():
        with pytest.raises(VmferryError) as caught:
            await lane.send(encoded(Lane(lane.call), encoding, data))
        assert (caught.value.reason, caught.value.field) == (reason, field), name
        assert caught.value.message, name
        lane = await source.open_lane()
    assert not any(source.to.directory.paths(source.spec).ram.read_bytes())
    assert int(source.to.dest.status("VmHWM").split()[0]) < 200 * 1024
    for encoding, data in ((ZSTD, squeezed(PAGE)), (LZ4, blocked(PAGE))):
        answer = await lane.send(encoded(lane, encoding, data))
        assert answer.ack.acknowledged == lane.sequence
    assert source.to.directory.paths(source.spec).ram.read_bytes()[:PAGE_SIZE] == PAGE


@pytest.mark.parametrize(("agreed", "used"), [([], ZSTD), (["none"], LZ4), (["lz4", "none"], ZSTD)])
async def test_an_encoding_that_was_not_agreed_is_refused(
    source: RawSource, agreed: list[str], used: transfer_pb2.Encoding.ValueType
) -> None:
    """Also one that the destination could decode; a source that agrees on nothing may send raw pages."""
    await source.begin(encodings=agreed)
    lane = await source.open_lane()
    data = squeezed(PAGE) if used == ZSTD else blocked(PAGE)
    with pytest.raises(VmferryError) as caught:
        await lane.send(encoded(Lane(lane.call), used, data))
    assert (caught.value.reason, caught.value.field) == ("CHUNK_REJECTED", "encoding")
    lane = await source.open_lane()
    assert (await lane.send(lane.chunk([(PAGES - 1, 1)], PAGE))).ack.acknowledged == 1


async def test_encodings_that_do_not_exist_cannot_be_agreed_on(source: RawSource) -> None:
    """They are refused before anything is made."""
    request = source.begin_request(encodings=["zstd", "rle"])
    error = await refusal(source.stub.Begin(request))
    assert (error.reason, error.field) == ("INVALID_ARGUMENT", "encodings")
