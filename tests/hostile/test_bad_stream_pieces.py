"""A host with a valid ticket that does not keep to the protocol of streams.

After each offence, told by name, the destination holds nothing of the attempt once it is closed, and another guest
of these hosts has taken no harm and can still be moved.
"""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import lz4.block
import pytest
import zstandard

from tests.hostile.raw_source import MEMORY_MIB, Lane, Model, RawSource, Request
from tests.integration.services import eventually_async, refusal
from tests.support import require
from vmferry.errors import VmferryError
from vmferry.handoff.records import attempt_from_ref
from vmferry.machines.qemu import probe
from vmferry.machines.qemu.spec import QemuSpec
from vmferry.machines.spec import new_qemu_spec
from vmferry.memory.runs import PAGE_SIZE
from vmferry.transfer.seal import seal_digest
from vmferry.transfer.streams import MAX_PIECE_BYTES, StreamDigest
from vmferry.v1 import handoff_pb2, transfer_pb2

pytestmark = [pytest.mark.usefixtures("tidy"), pytest.mark.timeout(240)]

RECEIVING, REFUSED = handoff_pb2.ATTEMPT_STATE_RECEIVING, handoff_pb2.ATTEMPT_STATE_REFUSED
MAX_U64 = 2**64 - 1
MAGIC = b"QEVM\0\0\0\3"
"""What every stream of a QEMU begins with."""


@pytest.fixture(scope="module")
def model() -> Model:
    """A QEMU machine that never runs."""
    require(Path(QemuSpec.binary).exists(), f"no {QemuSpec.binary} (apt install qemu-system-x86)")
    return Model(probe.resolve(new_qemu_spec("model", MEMORY_MIB, 1, QemuSpec(accelerator="tcg"))), b"")


@pytest.fixture
async def streaming(source: RawSource) -> RawSource:
    """An attempt to come in a stream."""
    await source.begin(path="stream", protocol_version=2)
    return source


def piece(lane: Lane, offset: int, data: bytes = b"", *, last: bool = False) -> Request:
    """The next piece of a lane."""
    lane.sequence += 1
    found = transfer_pb2.StreamPiece(sequence=lane.sequence, offset=offset, data=data, last=last)
    return Request(stream_piece=found)


def encoded(
    lane: Lane, offset: int, encoding: transfer_pb2.Encoding.ValueType, size: int, data: bytes
) -> Request:
    """The next piece of a lane, encoded, that says what it stands for."""
    request = piece(lane, offset, data)
    request.stream_piece.encoding, request.stream_piece.decoded_bytes = encoding, size
    return request


BAD: dict[str, tuple[tuple[int, bytes, bool], str]] = {
    "empty": ((8, b"", False), "data"),
    "too large": ((8, bytes(MAX_PIECE_BYTES + 1), False), "data"),
    "too far ahead": ((1 << 30, b"x", False), "offset"),
    "at the end of all numbers": ((MAX_U64, b"x", False), "offset"),
    "written already": ((0, MAGIC, False), "offset"),
    "partly written": ((4, b"12345678", False), "offset"),
    "a last one before what was written": ((4, b"", True), "offset"),
}


async def test_a_piece_that_does_not_fit_is_refused_by_name(streaming: RawSource) -> None:
    """The lane can be opened again, and what fits is taken in."""
    lane = await streaming.open_lane()
    assert (await lane.send(piece(lane, 0, MAGIC))).ack.acknowledged == 1
    for name, ((offset, data, last), field) in BAD.items():
        bad = Lane(lane.call, sequence=1)
        with pytest.raises(VmferryError) as caught:
            await lane.send(piece(bad, offset, data, last=last))
        assert (caught.value.reason, caught.value.field) == ("CHUNK_REJECTED", field), name
        lane = await streaming.open_lane()
    assert (await streaming.status()).state == RECEIVING


BOMB = zstandard.ZstdCompressor(level=1).compress(bytes(256 * 1024 * 1024))
ZSTD, LZ4 = transfer_pb2.ENCODING_ZSTD, transfer_pb2.ENCODING_LZ4
BAD_ENCODINGS: dict[str, tuple[transfer_pb2.Encoding.ValueType, int, bytes, str]] = {
    "a bomb that says so": (ZSTD, 256 * 1024 * 1024, BOMB, "decoded_bytes"),
    "a bomb that says less": (ZSTD, MAX_PIECE_BYTES, BOMB, "data"),
    "a size that no piece has": (ZSTD, 2**32 - 1, BOMB, "decoded_bytes"),
    "no size": (ZSTD, 0, BOMB, "decoded_bytes"),
    "not encoded at all": (ZSTD, 8, MAGIC, "data"),
    "an encoding that was not agreed": (LZ4, 8, lz4.block.compress(MAGIC, store_size=False), "encoding"),
    "one that nobody knows": (transfer_pb2.Encoding.ValueType(9), 8, MAGIC, "encoding"),
    "a size without an encoding": (transfer_pb2.Encoding.ValueType(0), 8, MAGIC, "encoding"),
}


async def test_a_piece_that_does_not_decode_to_what_it_says_is_refused_by_name(source: RawSource) -> None:
    """Nothing of it reaches the hypervisor, and the service does not grow by what was claimed."""
    await source.begin(path="stream", protocol_version=2, encodings=["zstd", "none"])
    lane = await source.open_lane()
    for name, (encoding, size, data, field) in BAD_ENCODINGS.items():
        with pytest.raises(VmferryError) as caught:
            await lane.send(encoded(Lane(lane.call), 0, encoding, size, data))
        assert (caught.value.reason, caught.value.field) == ("CHUNK_REJECTED", field), name
        lane = await source.open_lane()
    assert int(source.to.dest.status("VmHWM").split()[0]) < 200 * 1024
    good = zstandard.ZstdCompressor(level=1).compress(MAGIC)
    assert (await lane.send(encoded(lane, 0, ZSTD, len(MAGIC), good))).ack.acknowledged == 1
    with pytest.raises(VmferryError) as caught:  # it has a place, as it was decoded
        await lane.send(encoded(lane, 4, ZSTD, len(MAGIC), good))
    assert caught.value.field == "offset"
    assert (await source.status()).state == RECEIVING


async def test_chunks_and_device_state_do_not_belong_to_a_stream(streaming: RawSource) -> None:
    """Each is refused by its name, and nothing of it is written."""
    for make in (
        lambda lane: lane.chunk([(0, 1)], b"\xa5" * PAGE_SIZE),
        lambda lane: lane.device_state(0, 4, b"abcd"),
    ):
        lane = await streaming.open_lane()
        request: Request = make(lane)
        with pytest.raises(VmferryError) as caught:
            await lane.send(request)
        assert (caught.value.reason, caught.value.field) == ("CHUNK_REJECTED", request.WhichOneof("message"))
    assert not any(streaming.to.directory.paths(streaming.spec).ram.read_bytes())


async def test_pieces_do_not_belong_to_the_direct_way(source: RawSource) -> None:
    """Refused by name; what belongs there is still taken in."""
    await source.begin()
    lane = await source.open_lane()
    with pytest.raises(VmferryError) as caught:
        await lane.send(piece(Lane(lane.call), 0, MAGIC))
    assert (caught.value.reason, caught.value.field) == ("CHUNK_REJECTED", "stream_piece")
    lane = await source.open_lane()
    assert (await lane.send(lane.chunk([(0, 1)], b"\xa5" * PAGE_SIZE))).ack.acknowledged == 1


async def test_a_gap_is_never_filled_with_anything(streaming: RawSource) -> None:
    """A piece whose turn never comes is not acknowledged, cannot be sealed, and goes with the attempt."""
    first, second = [await streaming.open_lane(number) for number in range(2)]
    await first.send(piece(first, 0, MAGIC))
    early = asyncio.create_task(second.send(piece(second, 100, b"far", last=True)))
    error = await refusal(streaming.seal(digest=bytes(32)))
    assert error.reason == "STREAM_BROKEN"
    assert not early.done()
    assert (await streaming.abort()).state == REFUSED
    with pytest.raises(VmferryError) as caught:
        await early
    assert caught.value.reason == "STALE_ATTEMPT"


async def test_rubbish_ends_the_hypervisor_and_the_attempt(streaming: RawSource) -> None:
    """QEMU's own words come back to whoever sent it; the attempt is refused."""
    lane = await streaming.open_lane()
    sent = 0

    async def send_until_it_hangs_up() -> None:
        nonlocal sent
        while True:
            await lane.send(piece(lane, sent, b"no migration stream" * 1000))
            sent += 19_000

    with pytest.raises(VmferryError) as caught:
        await send_until_it_hangs_up()
    assert caught.value.reason == "MACHINE_FAILED"
    assert "migration stream" in caught.value.message

    async def refused() -> bool:
        return (await streaming.status()).state == REFUSED

    await eventually_async(refused, "the attempt is refused")


async def test_a_stream_that_is_cut_short_is_not_prepared(streaming: RawSource) -> None:
    """An end where QEMU expects more, rightly numbered and sealed, ends the attempt by name."""
    lane, second = [await streaming.open_lane(number) for number in range(2)]
    with contextlib.suppress(VmferryError):  # QEMU may be gone before the lanes have ended
        await lane.send(piece(lane, 0, MAGIC, last=True))
        end = transfer_pb2.LaneEnd(frames=1, data_bytes=len(MAGIC), digest=_lane_digest(MAGIC))
        await lane.send(Request(end=end))
        await second.send(second.end())
    whole = StreamDigest()
    whole.update(MAGIC)
    digest = seal_digest(
        attempt_from_ref(streaming.ref),
        memory_root=whole.root(),
        device_state=b"",
        spec_digest=streaming.spec.digest(),
    )
    error = await refusal(streaming.seal(digest=digest))
    assert error.reason in {"MACHINE_FAILED", "STALE_ATTEMPT"}


def _lane_digest(*pieces: bytes) -> bytes:
    from xxhash import xxh3_128, xxh3_128_digest

    found: Any = xxh3_128()
    for data in pieces:
        found.update(xxh3_128_digest(data))
    return bytes(found.digest())
