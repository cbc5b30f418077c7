"""Page contents to what travels, and back.

Promise: decoding never makes more than the bytes it is told to expect, and refuses data that would make more before
memory is taken for it; what it returns has exactly that size. An encoder is used by one thread at a time and holds
one compressor; both work without Python's lock.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final

import lz4.block
import zstandard

from vmferry.errors import ChunkRejectedError
from vmferry.negotiation.encodings import LZ4, NONE, ZSTD
from vmferry.transfer.wire import Buffer
from vmferry.v1 import transfer_pb2

NUMBERS: Final[Mapping[str, transfer_pb2.Encoding.ValueType]] = {
    NONE: transfer_pb2.ENCODING_NONE,
    LZ4: transfer_pb2.ENCODING_LZ4,
    ZSTD: transfer_pb2.ENCODING_ZSTD,
}
_NAMES: Final = {number: name for name, number in NUMBERS.items()}


class Encoder:
    """Compresses pieces one after the other."""

    def __init__(self) -> None:
        self._level = 0
        self._zstd: zstandard.ZstdCompressor | None = None

    def encode(self, encoding: str, level: int, data: Buffer) -> bytes:
        """Compress ``data`` as one piece; ``level`` is zstd's."""
        if encoding == LZ4:
            compressed: bytes = lz4.block.compress(data, store_size=False)
            return compressed
        if self._zstd is None or level != self._level:
            self._zstd, self._level = zstandard.ZstdCompressor(level=level), level
        return self._zstd.compress(data)


def encoding_name(number: int, agreed: Collection[str]) -> str:
    """The name of an encoding that came with a frame.

    Raises:
        ChunkRejectedError: nobody agreed on it.
    """
    name = _NAMES.get(transfer_pb2.Encoding.ValueType(number), "")
    if name not in agreed:
        raise ChunkRejectedError(f"encoding {name or number} was not agreed", field="encoding")
    return name


_WORTH_IT: Final = 0.9


def is_worth_it(encoded_bytes: int, data_bytes: int) -> bool:
    """Whether data should travel encoded: otherwise decoding it would cost more than it spares."""
    return encoded_bytes < data_bytes * _WORTH_IT


def decode(encoding: str, data: Buffer, size: int) -> Buffer:
    """What ``data`` stands for, which must be ``size`` bytes.

    Raises:
        ChunkRejectedError: it is not an encoding of so many bytes.
    """
    if encoding == NONE:
        if len(data) != size:
            raise ChunkRejectedError(f"{len(data)} bytes came where {size} belong", field="data")
        return data
    if not size:
        return decode(NONE, data, size)
    try:
        decoded = _unlz4(data, size) if encoding == LZ4 else _unzstd(data, size)
    except (lz4.block.LZ4BlockError, zstandard.ZstdError, ValueError) as error:
        raise ChunkRejectedError(f"the data cannot be decoded: {error}", field="data") from error
    if len(decoded) != size:
        raise ChunkRejectedError(f"the data decodes to {len(decoded)} bytes, not {size}", field="data")
    return decoded


def _unlz4(data: Buffer, size: int) -> bytes:
    decoded: bytes = lz4.block.decompress(data, uncompressed_size=size)
    return decoded


def _unzstd(data: Buffer, size: int) -> bytes:
    # The library would take as much memory as the frame says, so that has to be looked at first.
    stated = zstandard.frame_content_size(data)
    if stated != size:
        raise ChunkRejectedError(
            f"the frame says that it holds {stated} bytes, not {size}"
            if stated >= 0
            else "no size is stated",
            field="data",
        )
    return zstandard.ZstdDecompressor().decompress(data, allow_extra_data=False)
