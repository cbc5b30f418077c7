"""What QEMU saves of a machine besides its RAM, told apart into named, versioned sections.

::

    "QEVM" version, configuration | RAM blocks that are not shared (firmware, ROMs) | section ... section | 0
    section:      4, id, name, instance, version, payload, 0x7e, id
    at the end:   6, length, a description of all sections in JSON

Promise: pure; not one byte is changed or left out, so the parts joined together are what QEMU wrote. A stream that
does not end with its description, or does not hold what that names, is refused.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

MAGIC: Final = b"QEVM"
STREAM_VERSION: Final = 3

_SECTION_FULL: Final = b"\x04"
_DESCRIPTION: Final = b"\x06"
_FOOTER: Final = b"\x7e"
_END: Final = b"\x00"
_U32: Final = struct.Struct(">I")
_HEADER: Final = struct.Struct(">4sI")
_TRIES: Final = 64


class StateFormatError(ValueError):
    """The bytes are not what a QEMU writes."""


@dataclass(frozen=True)
class Section:
    """The state of one device."""

    name: str
    instance: int
    version: int
    data: bytes
    """Exactly as written, with its header and footer."""


@dataclass(frozen=True)
class DeviceState:
    """A whole stream in its parts."""

    preamble: bytes
    """Header, configuration, and the RAM blocks that are not in a shared file."""
    sections: tuple[Section, ...]
    description: bytes
    """The end of the stream, as written."""

    def joined(self) -> bytes:
        """The stream as it was."""
        return b"".join([self.preamble, *(section.data for section in self.sections), self.description])


def parse(stream: bytes) -> DeviceState:
    """Tell a stream apart.

    Raises:
        StateFormatError: it is not a whole stream of a QEMU.
    """
    if stream[: _HEADER.size] != _HEADER.pack(MAGIC, STREAM_VERSION):
        raise StateFormatError("it does not begin like the state of a QEMU")
    end, described = _description(stream)
    starts = list(_starts(stream, end, described))
    sections = []
    for number, (start, name, instance, version) in enumerate(starts):
        stop = starts[number + 1][0] if number + 1 < len(starts) else end
        if stream[stop - 5 : stop - 4] != _FOOTER or stream[stop - 4 : stop] != stream[start + 1 : start + 5]:
            raise StateFormatError(f"the section {name} does not end where it should")
        sections.append(Section(name, instance, version, stream[start:stop]))
    first = starts[0][0] if starts else end
    return DeviceState(stream[:first], tuple(sections), stream[end:])


def _description(stream: bytes) -> tuple[int, list[tuple[str, int]]]:
    """Where the last section ends, and the names and instances of all."""
    at = len(stream)
    # The description is text and holds no such byte, so this is found at once or after its length's bytes.
    for _ in range(_TRIES):
        at = stream.rfind(_DESCRIPTION, 0, at)
        if at < 1:
            break
        if stream[at + 1 : at + 5] == _U32.pack(max(0, len(stream) - at - 5)):
            if stream[at - 1 : at] != _END:
                break
            return at - 1, _names(stream[at + 5 :])
    raise StateFormatError("it does not end with a description of its sections")


def _names(text: bytes) -> list[tuple[str, int]]:
    try:
        devices: list[Any] = json.loads(text)["devices"]
        return [(str(device["name"]), int(device["instance_id"])) for device in devices]
    except (ValueError, KeyError, TypeError) as error:
        raise StateFormatError(f"its description cannot be read: {error!r}") from error


def _starts(stream: bytes, end: int, described: list[tuple[str, int]]) -> Iterator[tuple[int, str, int, int]]:
    """Where each described section begins, and its version."""
    position = 0
    for name, instance in described:
        words = name.encode()
        label = bytes([len(words)]) + words + _U32.pack(instance)
        found = stream.find(label, position, end)
        # A header has a type and an id before its name.
        while found >= 0 and stream[found - 5 : found - 4] != _SECTION_FULL:
            found = stream.find(label, found + 1, end)
        after = found + len(label)
        if found < 0 or after + _U32.size > end:
            raise StateFormatError(f"the section {name} is described, and missing")
        (version,) = _U32.unpack_from(stream, after)
        yield found - 5, name, instance, version
        position = after + _U32.size
