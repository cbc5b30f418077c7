"""The device state of a micro-VM as a stream of named, versioned sections.

Promise: :func:`parse` returns exactly what :func:`render` was given, or raises :class:`DeviceStateError`; a stream
cut short or changed in any byte is never accepted. The module is pure. All numbers are little-endian::

    stream       magic "VMFERRYD" | format u16 | section ... | description
    section      "S" | name length u8 | name | version u32 | payload length u32 | payload | hash u64
    description  "D" | length u32 | hash u64 | JSON {"format": 1, "sections": [{"name", "version", "size"}, ...]}

A section's hash (XXH3-64) covers the section before it; the description's covers the whole stream before it, and
the JSON. The stream ends with the description, so that a reader who knows nothing else can name what is inside.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

import xxhash

from vmferry.errors import DeviceStateError

__all__ = ["MAGIC", "MAX_STREAM_BYTES", "DeviceStateError", "Section", "parse", "render", "upgraded"]

MAGIC: Final = b"VMFERRYD"
FORMAT: Final = 1
MAX_STREAM_BYTES: Final = 16 << 20
"""Far above any real state; bounds what a reader keeps in memory."""

_HEADER = struct.Struct("<8sH")
_VERSION_AND_LENGTH = struct.Struct("<II")
_LENGTH = struct.Struct("<I")
_HASH = struct.Struct("<Q")
_SECTION: Final = b"S"
_DESCRIPTION: Final = b"D"


@dataclass(frozen=True)
class Section:
    """The state of one part of the machine."""

    name: str
    version: int
    payload: bytes


class _Reader:
    """Takes pieces off a stream; every piece is there in full or the stream is refused."""

    def __init__(self, stream: bytes) -> None:
        self.stream = stream
        self.at = 0

    def take(self, length: int, what: str) -> bytes:
        piece = self.stream[self.at : self.at + length]
        if len(piece) != length:
            raise DeviceStateError(f"the device state ends inside {what}", offset=self.at)
        self.at += length
        return piece

    def unpack(self, layout: struct.Struct, what: str) -> tuple[int, ...]:
        return layout.unpack(self.take(layout.size, what))


def render(sections: Iterable[Section]) -> bytes:
    """The stream that holds ``sections`` in their order."""
    listed = list(sections)
    out = bytearray(_HEADER.pack(MAGIC, FORMAT))
    for section in listed:
        name = section.name.encode()
        record = bytearray(_SECTION)
        record += bytes([len(name)]) + name
        record += _VERSION_AND_LENGTH.pack(section.version, len(section.payload)) + section.payload
        out += record + _HASH.pack(xxhash.xxh3_64_intdigest(bytes(record)))
    description = json.dumps(_describe(listed), separators=(",", ":")).encode()
    out += _DESCRIPTION + _LENGTH.pack(len(description))
    return bytes(out) + _HASH.pack(xxhash.xxh3_64_intdigest(bytes(out) + description)) + description


def parse(stream: bytes) -> list[Section]:
    """The sections of ``stream``.

    Raises:
        DeviceStateError: the stream is damaged, cut short, of another format, or lists something else than it holds.
    """
    if len(stream) > MAX_STREAM_BYTES:
        raise DeviceStateError(f"the device state is larger than {MAX_STREAM_BYTES} bytes", size=len(stream))
    reader = _Reader(stream)
    if reader.take(len(MAGIC), "the magic number") != MAGIC:
        raise DeviceStateError("this is not the device state of a micro-VM: the magic number is missing")
    version = int.from_bytes(reader.take(2, "the format number"), "little")
    if version != FORMAT:
        raise DeviceStateError(
            f"device state of format {version}, this machine reads {FORMAT}", format=version
        )
    sections: list[Section] = []
    while (kind := reader.take(1, "the list of sections")) == _SECTION:
        sections.append(_parse_section(reader))
    if kind != _DESCRIPTION:
        raise DeviceStateError(f"unknown record {kind!r} in the device state", offset=reader.at - 1)
    _check_description(reader, sections)
    names = [section.name for section in sections]
    for name in set(names):
        if names.count(name) > 1:
            raise DeviceStateError(f"section {name!r} is there twice", section=name)
    return sections


def upgraded(section: Section, version: int, steps: Mapping[int, Callable[[bytes], bytes]]) -> bytes:
    """The payload of ``section`` in the layout of ``version``; ``steps[n]`` turns layout n into n + 1.

    Raises:
        DeviceStateError: the section is newer than ``version``, or too old for the known steps.
    """
    payload = section.payload
    for step in range(section.version, version):
        if step not in steps:
            break
        payload = steps[step](payload)
    else:
        if section.version <= version:
            return payload
    raise DeviceStateError(
        f"section {section.name!r} has version {section.version}, this machine reads {version}",
        section=section.name,
        version=section.version,
    )


def _describe(sections: list[Section]) -> dict[str, object]:
    listed = [{"name": s.name, "version": s.version, "size": len(s.payload)} for s in sections]
    return {"format": FORMAT, "sections": listed}


def _parse_section(reader: _Reader) -> Section:
    start = reader.at - 1
    name_bytes = reader.take(reader.take(1, "a section")[0], "the name of a section")
    what = f"section {name_bytes.decode(errors='replace')!r}"
    version, length = reader.unpack(_VERSION_AND_LENGTH, what)
    payload = reader.take(length, what)
    record = reader.stream[start : reader.at]
    if reader.unpack(_HASH, what)[0] != xxhash.xxh3_64_intdigest(record):
        raise DeviceStateError(f"{what} is damaged: its hash does not fit", offset=start)
    try:
        return Section(name_bytes.decode(), version, payload)
    except UnicodeDecodeError as error:
        raise DeviceStateError(f"{what} has a name that is not UTF-8", offset=start) from error


def _check_description(reader: _Reader, sections: list[Section]) -> None:
    (length,) = reader.unpack(_LENGTH, "the description")
    before = reader.stream[: reader.at]
    (hashed,) = reader.unpack(_HASH, "the description")
    text = reader.take(length, "the description")
    if reader.at != len(reader.stream):
        raise DeviceStateError("the device state goes on behind its description", offset=reader.at)
    if hashed != xxhash.xxh3_64_intdigest(before + text):
        raise DeviceStateError("the device state is damaged: the hash of the whole does not fit")
    try:
        described = json.loads(text)
    except ValueError as error:
        raise DeviceStateError("the description of the device state is not JSON") from error
    if described != _describe(sections):
        raise DeviceStateError("the description of the device state lists other sections than there are")
