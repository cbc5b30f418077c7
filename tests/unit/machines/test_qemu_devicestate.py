"""Telling the state of a QEMU apart, on streams built by the rules of the format; tests/integration has real ones."""

from __future__ import annotations

import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmferry.machines.qemu.devicestate import StateFormatError, parse

HEADER = b"QEVM" + struct.pack(">I", 3)
devices = st.lists(
    st.tuples(
        st.text("abc/:0", min_size=1, max_size=6),
        st.integers(0, 3),
        st.integers(0, 2**31),
        st.binary(max_size=40),
    ),
    max_size=5,
    unique_by=lambda device: device[:2],
)


def section(number: int, name: str, instance: int, version: int, payload: bytes) -> bytes:
    """One device's state."""
    head = struct.pack(">BIB", 4, number, len(name)) + name.encode() + struct.pack(">II", instance, version)
    return head + payload + struct.pack(">BI", 0x7E, number)


def stream(found: list[tuple[str, int, int, bytes]], preamble: bytes = b"") -> bytes:
    """A whole stream."""
    body = b"".join(section(number, *device) for number, device in enumerate(found, start=5))
    named = [{"name": name, "instance_id": instance} for name, instance, _, _ in found]
    words = json.dumps({"page_size": 4096, "devices": named}).encode()
    return HEADER + preamble + body + b"\0\x06" + struct.pack(">I", len(words)) + words


@given(devices)
def test_every_section_is_found_by_name_and_no_byte_is_lost(
    found: list[tuple[str, int, int, bytes]],
) -> None:
    """Names, instances and versions are those written, and the parts joined are the stream."""
    data = stream(found, preamble=b"\x07configuration and firmware")
    state = parse(data)
    told = [(one.name, one.instance, one.version) for one in state.sections]
    assert told == [device[:3] for device in found]
    assert state.joined() == data


@given(devices, st.integers(1, 200))
def test_a_stream_that_is_cut_short_is_refused(found: list[tuple[str, int, int, bytes]], cut: int) -> None:
    """However much of its end is missing."""
    data = stream(found)
    with pytest.raises(StateFormatError):
        parse(data[: max(0, len(data) - cut)])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        HEADER,
        stream([("cpu", 0, 1, b"x")]).replace(b"QEVM", b"QEVN"),
        stream([("cpu", 0, 1, b"x")]).replace(b"\x7e", b"\x7f"),
        stream([("cpu", 0, 1, b"x")]).replace(b"\x03cpu", b"\x03cpv"),
        stream([("cpu", 0, 1, b"x")]).replace(b'"devices"', b'"devicez"'),
        stream([("cpu", 0, 1, b"x")])[:-1] + b"]",
    ],
)
def test_what_is_no_state_is_refused(data: bytes) -> None:
    """Another magic, a footer or a section that is missing, and a description that cannot be read."""
    with pytest.raises(StateFormatError):
        parse(data)
