"""The hot frames' bytes are the generated code's, both ways, whatever is in them and whatever is done to them."""

from __future__ import annotations

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from vmferry.transfer.wire import (
    ChunkFrame,
    PieceFrame,
    Received,
    chunk_frame,
    decode_measured,
    decode_request,
    encode_chunk,
    encode_measured,
    encode_piece,
    kind,
    piece_frame,
)
from vmferry.v1.handoff_pb2 import MeasureRequest
from vmferry.v1.transfer_pb2 import (
    Chunk,
    DeviceState,
    LaneEnd,
    LaneOpen,
    PageRun,
    StreamPiece,
    TransferRequest,
)

u64 = st.one_of(st.integers(0, 300), st.integers(0, 2**64 - 1))
u32 = st.one_of(st.integers(0, 300), st.integers(0, 2**32 - 1))
page_runs = st.lists(st.builds(PageRun, first_page=u64, page_count=u64), max_size=20)
payloads = st.one_of(st.binary(max_size=40), st.sampled_from([127, 128, 16383, 16384]).map(bytes))
chunks = st.builds(
    Chunk,
    sequence=u64,
    round=u32,
    region=u32,
    runs=page_runs,
    zero_runs=page_runs,
    encoding=st.integers(0, 9),
    data_hash=st.binary(max_size=200),
    data=payloads,
    compare_only=st.booleans(),
)
pieces = st.builds(
    StreamPiece,
    sequence=u64,
    offset=u64,
    data=payloads,
    last=st.booleans(),
    encoding=st.integers(0, 9),
    decoded_bytes=u32,
)
others = st.one_of(
    st.builds(TransferRequest, open=st.builds(LaneOpen, migration_id=st.binary(max_size=20), lane=u32)),
    st.builds(TransferRequest, end=st.builds(LaneEnd, frames=u64, digest=st.binary(max_size=20))),
    st.builds(TransferRequest, device_state=st.builds(DeviceState, sequence=u64, data=payloads)),
    st.just(TransferRequest()),
)
requests = st.one_of(
    chunks.map(lambda chunk: TransferRequest(chunk=chunk)),
    pieces.map(lambda piece: TransferRequest(stream_piece=piece)),
    others,
)


def copied_chunk(chunk: Chunk) -> ChunkFrame:
    return chunk_frame(Chunk.FromString(chunk.SerializeToString()))


def message(found: Received) -> TransferRequest:
    """What was decoded, put together again by the generated code."""
    if isinstance(found, ChunkFrame):
        whole = Chunk()
        whole.CopyFrom(found.head)
        whole.data, whole.compare_only = bytes(found.data), found.mark
        return TransferRequest(chunk=whole)
    if isinstance(found, PieceFrame):
        piece = StreamPiece()
        piece.CopyFrom(found.head)
        piece.data, piece.last = bytes(found.data), found.mark
        return TransferRequest(stream_piece=piece)
    return found


def verdict(raw: bytes) -> TransferRequest | None:
    try:
        return TransferRequest.FromString(raw)
    except DecodeError:
        return None


def agrees(raw: bytes) -> None:
    """Our reader takes what the generated code takes, as what it takes it for, and nothing else.

    Fields that nobody knows are not told apart: the generated code keeps them, and nobody reads them.
    """
    expected = verdict(raw)
    if expected is None:
        with pytest.raises(DecodeError):
            decode_request(raw)
        return
    found = decode_request(raw)
    known = message(found)
    known.DiscardUnknownFields()
    expected.DiscardUnknownFields()
    assert known == expected
    assert kind(found) == (expected.WhichOneof("message") or "")


@given(chunk=chunks, view=st.sampled_from([bytes, bytearray, memoryview]))
def test_a_chunk_is_written_as_the_generated_code_writes_it(chunk: Chunk, view: type) -> None:
    """Byte for byte, in both messages that carry one, whatever the payload lies in."""
    frame = copied_chunk(chunk)
    frame.data = view(frame.data)
    assert encode_chunk(frame) == TransferRequest(chunk=chunk).SerializeToString()
    assert encode_measured(frame) == MeasureRequest(chunk=chunk).SerializeToString()


@given(piece=pieces)
def test_a_piece_is_written_as_the_generated_code_writes_it(piece: StreamPiece) -> None:
    """Byte for byte."""
    frame = piece_frame(StreamPiece.FromString(piece.SerializeToString()))
    assert encode_piece(frame) == TransferRequest(stream_piece=piece).SerializeToString()


@given(request=requests)
def test_what_the_generated_code_writes_is_read_as_it_was(request: TransferRequest) -> None:
    """Every message, and payloads without a copy."""
    raw = request.SerializeToString()
    agrees(raw)
    found = decode_request(raw)
    if isinstance(found, ChunkFrame | PieceFrame) and len(found.data):
        assert isinstance(found.data, memoryview)
        assert found.data.obj is raw


@given(chunk=chunks)
def test_a_measured_chunk_is_read_as_it_was(chunk: Chunk) -> None:
    """The same for the other message that carries chunks."""
    frame = decode_measured(MeasureRequest(chunk=chunk).SerializeToString())
    assert message(frame) == TransferRequest(chunk=chunk)


@given(request=requests, data=st.data())
@settings(max_examples=300)
def test_damaged_messages_get_the_verdict_of_the_generated_code(
    request: TransferRequest, data: st.DataObject
) -> None:
    """Cut off, with bytes changed, with more behind or between: the same error or the same message."""
    raw = bytearray(request.SerializeToString())
    match data.draw(st.sampled_from(["cut", "change", "append", "insert", "twice", "remove"])):
        case "cut":
            del raw[data.draw(st.integers(0, len(raw))) :]
        case "change" if raw:
            for _ in range(data.draw(st.integers(1, 3))):
                raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
        case "append":
            raw += data.draw(st.binary(min_size=1, max_size=20))
        case "insert":
            at = data.draw(st.integers(0, len(raw)))
            raw[at:at] = data.draw(st.binary(min_size=1, max_size=6))
        case "twice":
            raw += bytes(raw)
        case "remove" if raw:
            del raw[data.draw(st.integers(0, len(raw) - 1))]
    agrees(bytes(raw))


@given(raw=st.binary(max_size=60))
@settings(max_examples=300)
def test_any_bytes_get_the_verdict_of_the_generated_code(raw: bytes) -> None:
    """Also behind the beginning of a chunk that claims to hold all of them."""
    agrees(raw)
    agrees(bytes([0x12, len(raw)]) + raw)
    agrees(bytes([0x2A, len(raw)]) + raw)
    agrees(bytes([0x12, len(raw) + 3, 0x42, 1, 7]) + raw)


UNUSUAL = {
    "fields in another order": b"\x42\x01x\x08\x07",
    "data twice": b"\x42\x01x\x42\x02yz",
    "a flag before the data": b"\x48\x01\x42\x01x",
    "a flag that is taken back": b"\x42\x01x\x48\x01\x48\x00",
    "a flag of two": b"\x48\x02",
    "a field nobody knows": b"\x42\x01x\xa2\x06\x01z",
    "a field nobody knows before": b"\xa2\x06\x01z\x42\x01x",
    "a number as bytes": b"\x0a\x01x",
    "a number that is too long": b"\x08" + b"\xff" * 10 + b"\x01",
    "a number beyond its size": b"\x10" + b"\xff" * 9 + b"\x01",
    "a length that is longer than need be": b"\x42\x81\x00x",
    "a length that wraps around": b"\x42\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01x",
    "a run that reaches beyond the chunk": b"\x22\x7f\x08\x01",
    "a run that is long": b"\x22\x82\x01" + b"\x08\x01" * 65,
    "a group": b"\x0b\x0c",
}


@pytest.mark.parametrize("content", UNUSUAL.values(), ids=UNUSUAL)
def test_unusual_layouts_get_the_verdict_of_the_generated_code(content: bytes) -> None:
    """What other writers may make, and what nobody should."""
    size = len(content)
    prefix = bytes([0x12, size]) if size < 128 else bytes([0x12, size & 0x7F | 0x80, size >> 7])
    agrees(prefix + content)
    agrees(prefix + content + b"\x12\x00")
