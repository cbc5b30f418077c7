"""The hot frames between object and bytes, with one copy of their payload on each side.

Promise: what :func:`encode_chunk` and :func:`encode_piece` make is byte for byte what the generated code makes, and
:func:`decode_request` takes exactly what the generated code takes, with the same meaning: everything around a payload
is read and written by the generated code, and so is whatever is not laid out as this module lays it out.

A chunk on the wire, as a field of the message around it::

    tag length | sequence round region runs zero_runs encoding data_hash | tag length data | compare_only
               '-------------------- head, generated code --------------'              '-- one byte or none

A piece of a stream is laid out alike, and what says how its payload is encoded comes behind it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Generic, TypeAlias, TypeVar

from google.protobuf.message import DecodeError

from vmferry.v1 import handoff_pb2, transfer_pb2

Buffer: TypeAlias = bytes | bytearray | memoryview
_Head = TypeVar("_Head", transfer_pb2.Chunk, transfer_pb2.StreamPiece)


@dataclass(slots=True)
class _Frame(Generic[_Head]):
    """A numbered message whose payload is kept apart, so that it need not be copied."""

    head: _Head
    """Everything but payload and flag."""
    data: Buffer
    """The payload."""
    mark: bool
    """The one flag that comes after it: ``compare_only`` of a chunk, ``last`` of a piece."""


class ChunkFrame(_Frame[transfer_pb2.Chunk]):
    """A chunk; its mark is ``compare_only``."""


class PieceFrame(_Frame[transfer_pb2.StreamPiece]):
    """A piece of a hypervisor's stream; its mark is ``last``."""


Received: TypeAlias = transfer_pb2.TransferRequest | ChunkFrame | PieceFrame

_VARINT, _BYTES = 0, 2
_MORE: Final = 0x80
_LONGEST_VARINT: Final = 10
_TRANSFER_CHUNK: Final = 2 << 3 | _BYTES
_MEASURE_CHUNK: Final = 1 << 3 | _BYTES
_TRANSFER_PIECE: Final = 5 << 3 | _BYTES
_CHUNK_DATA: Final = 8 << 3 | _BYTES
_CHUNK_MARK: Final = 9 << 3 | _VARINT
_PIECE_DATA: Final = 3 << 3 | _BYTES
# All fields of a chunk before its data, and of a piece: their numbers are below 16, so a tag is one byte.
_CHUNK_HEAD_NUMBERS: Final = frozenset(number << 3 | _VARINT for number in (1, 2, 3, 6))
_CHUNK_HEAD_BYTES: Final = frozenset(number << 3 | _BYTES for number in (4, 5, 7))
_PIECE_HEAD_NUMBERS: Final = frozenset(number << 3 | _VARINT for number in (1, 2))
_PIECE_TAIL_NUMBERS: Final = frozenset(number << 3 | _VARINT for number in (4, 5, 6))


def encode_chunk(frame: ChunkFrame) -> bytes:
    """A ``TransferRequest`` with the chunk."""
    return _encode_chunk(_TRANSFER_CHUNK, frame)


def encode_measured(frame: ChunkFrame) -> bytes:
    """A ``MeasureRequest`` with the chunk."""
    return _encode_chunk(_MEASURE_CHUNK, frame)


def _encode_chunk(tag: int, frame: ChunkFrame) -> bytes:
    # Nothing is written for a flag that is not set, as the generated code does it.
    after = bytes((_CHUNK_MARK, 1)) if frame.mark else b""
    return _join(tag, frame.head.SerializeToString(), _CHUNK_DATA, frame.data, after)


def encode_piece(frame: PieceFrame) -> bytes:
    """A ``TransferRequest`` with the piece."""
    whole = frame.head
    head = transfer_pb2.StreamPiece(sequence=whole.sequence, offset=whole.offset)
    tail = transfer_pb2.StreamPiece(
        last=frame.mark, encoding=whole.encoding, decoded_bytes=whole.decoded_bytes
    )
    before, after = head.SerializeToString(), tail.SerializeToString()
    return _join(_TRANSFER_PIECE, before, _PIECE_DATA, frame.data, after)


def decode_request(raw: bytes) -> Received:
    """What a ``TransferRequest`` brings; payloads are views of ``raw``.

    Raises:
        DecodeError: it is not one.
    """
    frame = _chunk(raw, _TRANSFER_CHUNK) or _piece(raw)
    if frame is not None:
        return frame
    message = transfer_pb2.TransferRequest.FromString(raw)
    match message.WhichOneof("message"):
        case "chunk":
            return chunk_frame(message.chunk)
        case "stream_piece":
            return piece_frame(message.stream_piece)
    return message


def decode_measured(raw: bytes) -> ChunkFrame:
    """The chunk that a ``MeasureRequest`` brings.

    Raises:
        DecodeError: it is not one.
    """
    return _chunk(raw, _MEASURE_CHUNK) or chunk_frame(handoff_pb2.MeasureRequest.FromString(raw).chunk)


def stream_bytes(piece: PieceFrame) -> int:
    """How many bytes of its stream a piece stands for, by its own words."""
    return piece.head.decoded_bytes or len(piece.data)


def kind(request: Received) -> str:
    """Which field of a ``TransferRequest`` it is; empty if none."""
    if isinstance(request, ChunkFrame):
        return "chunk"
    if isinstance(request, PieceFrame):
        return "stream_piece"
    return request.WhichOneof("message") or ""


def chunk_frame(message: transfer_pb2.Chunk) -> ChunkFrame:
    """A chunk that came in one piece, taken apart; the message becomes its head."""
    data, mark = message.data, message.compare_only
    message.ClearField("data")
    message.ClearField("compare_only")
    return ChunkFrame(message, data, mark)


def piece_frame(message: transfer_pb2.StreamPiece) -> PieceFrame:
    """A piece that came in one, taken apart; the message becomes its head."""
    data, mark = message.data, message.last
    message.ClearField("data")
    message.ClearField("last")
    return PieceFrame(message, data, mark)


def _join(tag: int, head: bytes, data_tag: int, data: Buffer, after: bytes) -> bytes:
    # Nothing is written for an empty payload, as the generated code does it.
    before = bytes((data_tag,)) + _varint(len(data)) if data else b""
    size = len(head) + len(before) + len(data) + len(after)
    return b"".join((bytes((tag,)), _varint(size), head, before, data, after))


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value >= _MORE:
        encoded.append(value & 0x7F | _MORE)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


class _UnusualError(Exception):
    """A message is laid out in a way that only the generated code reads."""


def _chunk(raw: bytes, outer: int) -> ChunkFrame | None:
    try:
        start = _content(raw, outer)
        at, head_end, data = start, 0, memoryview(b"")
        while at < len(raw) and raw[at] != _CHUNK_DATA:
            tag = raw[at]
            if tag in _CHUNK_HEAD_BYTES:
                at = _end_of_bytes(raw, at + 1)
            elif tag in _CHUNK_HEAD_NUMBERS:
                at = _end_of_varint(raw, at + 1)
            else:
                break
        head_end = at
        if at < len(raw) and raw[at] == _CHUNK_DATA:
            at, data = _payload(raw, at + 1)
        mark = _mark(raw, at, _CHUNK_MARK)
        return ChunkFrame(transfer_pb2.Chunk.FromString(raw[start:head_end]), data, mark)
    except (_UnusualError, IndexError, DecodeError):
        return None


def _piece(raw: bytes) -> PieceFrame | None:
    try:
        start = _content(raw, _TRANSFER_PIECE)
        at, data = _end_of_numbers(raw, start, _PIECE_HEAD_NUMBERS), memoryview(b"")
        head_end = at
        if at < len(raw) and raw[at] == _PIECE_DATA:
            at, data = _payload(raw, at + 1)
        if _end_of_numbers(raw, at, _PIECE_TAIL_NUMBERS) != len(raw):
            return None
        head = transfer_pb2.StreamPiece.FromString(raw[start:head_end] + raw[at:])
        mark = head.last
        head.ClearField("last")
        return PieceFrame(head, data, mark)
    except (_UnusualError, IndexError, DecodeError):
        return None


def _content(raw: bytes, tag: int) -> int:
    """Where the content of a message's only field begins."""
    if not raw or raw[0] != tag:
        raise _UnusualError
    size, at = _number(raw, 1)
    if at + size != len(raw):
        raise _UnusualError
    return at


def _payload(raw: bytes, at: int) -> tuple[int, memoryview]:
    size, start = _number(raw, at)
    end = start + size
    if end > len(raw):
        raise _UnusualError
    return end, memoryview(raw)[start:end]


def _mark(raw: bytes, at: int, tag: int) -> bool:
    """The flag after the payload, with which the message must end."""
    if at == len(raw):
        return False
    if len(raw) - at != 2 or raw[at] != tag or raw[at + 1] > 1:  # noqa: PLR2004 - a tag and a flag
        raise _UnusualError
    return raw[at + 1] == 1


def _end_of_numbers(raw: bytes, at: int, tags: frozenset[int]) -> int:
    while at < len(raw) and raw[at] in tags:
        at = _end_of_varint(raw, at + 1)
    return at


def _end_of_bytes(raw: bytes, at: int) -> int:
    if raw[at] >= _MORE:  # no field of a head is that long
        raise _UnusualError
    return at + 1 + raw[at]


def _end_of_varint(raw: bytes, at: int) -> int:
    end = at
    while raw[end] >= _MORE:
        end += 1
    if end - at >= _LONGEST_VARINT:
        raise _UnusualError
    return end + 1


def _number(raw: bytes, at: int) -> tuple[int, int]:
    """A length and where it ends; gRPC bounds messages to far less than what four of its bytes can say."""
    value = 0
    for shift in range(0, 28, 7):
        byte = raw[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < _MORE:
            return value, at
    raise _UnusualError
