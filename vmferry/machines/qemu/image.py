"""What an image file says about other files it needs.

Promise: pure reading of the header of a qcow2 image; the guest cannot write there, but whoever made the image could,
and QEMU opens whatever it names.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Final

_HEADER: Final = struct.Struct(">4sIQI")
"""Magic number, version, where the name of the backing file is (0: there is none), and its length."""
_INCOMPATIBLE_OFFSET: Final = 72
_EXTERNAL_DATA: Final = 1 << 2
_HEADER_BYTES: Final = 104


def other_files(real: Path) -> str:
    """Which kind of other file a qcow2 image needs, or what is wrong with its header; empty if all is well.

    Raises:
        OSError: it cannot be read.
    """
    with real.open("rb", buffering=0) as file:
        data = file.read(_HEADER_BYTES)
    if len(data) < _HEADER.size:
        return "it is too short for a qcow2 image"
    magic, version, backing_offset, _ = _HEADER.unpack_from(data)
    if magic != b"QFI\xfb" or version not in (2, 3):
        return "it is no qcow2 image"
    if backing_offset:
        return "it needs a backing file"
    if version >= 3:  # noqa: PLR2004 - from this version of the format on there are feature bits
        if len(data) < _HEADER_BYTES:
            return "it is too short for a qcow2 image"
        (incompatible,) = struct.unpack_from(">Q", data, _INCOMPATIBLE_OFFSET)
        if incompatible & _EXTERNAL_DATA:
            return "it keeps its data in another file"
    return ""
