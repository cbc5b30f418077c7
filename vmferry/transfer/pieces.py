"""Pieces of a hypervisor's own stream to frames and back.

Promise: what a piece says it stands for is bounded before memory is taken for it, and is exactly what decoding it
makes; a piece that does not become clearly smaller travels as it is, in the form that every release knows.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import Final

from vmferry.errors import ChunkRejectedError
from vmferry.negotiation.encodings import NONE
from vmferry.transfer.compression import RAW, Effort, Method
from vmferry.transfer.encodings import NUMBERS, Encoder, decode, encoding_name, is_worth_it
from vmferry.transfer.streams import MAX_PIECE_BYTES
from vmferry.transfer.wire import PieceFrame
from vmferry.v1 import transfer_pb2

_LEAST_BYTES: Final = 256
"""Less is not worth a try."""


class PieceBuilder:
    """Makes frames of pieces, one at a time."""

    def __init__(self) -> None:
        self._encoder = Encoder()

    def build(self, offset: int, data: bytes, method: Method) -> tuple[PieceFrame, Effort]:
        """A frame, compressed by ``method`` if that makes it smaller, and what that took."""
        head = transfer_pb2.StreamPiece(offset=offset)
        if method == RAW or len(data) < _LEAST_BYTES:
            return PieceFrame(head, data, mark=False), Effort(RAW, len(data), 0, 0.0, 0.0, 0.0)
        began, started = time.monotonic(), time.thread_time()
        encoded = self._encoder.encode(method.encoding, method.level, data)
        took_s, took_wall_s = time.thread_time() - started, time.monotonic() - began
        effort = Effort(method, len(data), len(encoded), 0.0, took_s, took_wall_s)
        if not is_worth_it(len(encoded), len(data)):
            return PieceFrame(head, data, mark=False), effort
        head.encoding, head.decoded_bytes = NUMBERS[method.encoding], len(data)
        return PieceFrame(head, encoded, mark=False), effort


def is_plain(piece: PieceFrame) -> bool:
    """Whether it travelled as it is, as an older source sends it; nothing has to be decoded then."""
    return piece.head.encoding == transfer_pb2.ENCODING_UNSPECIFIED and not piece.head.decoded_bytes


def unpack(piece: PieceFrame, agreed: Collection[str]) -> PieceFrame:
    """The piece as it was before it was compressed.

    Raises:
        ChunkRejectedError: its encoding was not agreed, or it is not what it says.
    """
    if is_plain(piece):
        return piece
    encoding, size = encoding_name(piece.head.encoding, agreed), piece.head.decoded_bytes
    if encoding == NONE:
        size = size or len(piece.data)
    elif not 0 < size <= MAX_PIECE_BYTES:
        raise ChunkRejectedError(
            f"a piece stands for 1 to {MAX_PIECE_BYTES} bytes, not for {size}", field="decoded_bytes"
        )
    return PieceFrame(piece.head, decode(encoding, piece.data, size), piece.mark)
