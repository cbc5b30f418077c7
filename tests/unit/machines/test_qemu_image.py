"""Images that need other files are found out by their headers."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from vmferry.machines.qemu.image import other_files


def header(version: int = 3, backing: int = 0, incompatible: int = 0, magic: bytes = b"QFI\xfb") -> bytes:
    """The beginning of an image."""
    fixed = struct.pack(">4sIQI", magic, version, backing, 8)
    return fixed.ljust(72, b"\0") + struct.pack(">QQQII", incompatible, 0, 0, 4, 104) + bytes(100)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (header(), ""),
        (header(version=2, incompatible=4), ""),  # these bytes mean something else in version 2
        (header(incompatible=1), ""),
        (header(backing=104), "backing file"),
        (header(version=2, backing=104), "backing file"),
        (header(incompatible=4), "another file"),
        (header(incompatible=5), "another file"),
        (header(version=4), "no qcow2"),
        (header(magic=b"raw "), "no qcow2"),
        (header()[:80], "too short"),
        (b"", "too short"),
    ],
)
def test_what_an_image_needs(tmp_path: Path, data: bytes, told: str) -> None:
    """A backing file and external data, in every version of the format; what is no image is said to be none."""
    path = tmp_path / "image"
    path.write_bytes(data)
    found = other_files(path)
    assert told in found
    assert bool(found) == bool(told)
