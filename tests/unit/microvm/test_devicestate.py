"""The device-state stream: what goes in comes out, and nothing damaged comes in."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmferry.errors import DeviceStateError
from vmferry.machines.microvm.devicestate import MAX_STREAM_BYTES, Section, parse, render, upgraded

NAMES = st.text(min_size=1, max_size=20).filter(lambda name: len(name.encode(errors="ignore")) <= 255)
SECTIONS = st.lists(
    st.builds(
        Section,
        name=NAMES.filter(lambda name: name.isprintable()),
        version=st.integers(0, (1 << 32) - 1),
        payload=st.binary(max_size=200),
    ),
    max_size=5,
    unique_by=lambda section: section.name,
)
SAMPLE = render([Section("cpu", 1, bytes(range(40))), Section("clock", 2, b"tick"), Section("empty", 1, b"")])


@given(SECTIONS)
def test_parse_gives_back_what_was_rendered(sections: list[Section]) -> None:
    """Rendering and parsing are inverse for any names, versions and payloads."""
    assert parse(render(sections)) == sections


@pytest.mark.parametrize("length", range(len(SAMPLE)))
def test_a_stream_cut_anywhere_is_refused(length: int) -> None:
    """No prefix of a stream passes for a whole one."""
    with pytest.raises(DeviceStateError):
        parse(SAMPLE[:length])


@given(position=st.integers(0, len(SAMPLE) - 1), change=st.integers(1, 255))
def test_a_changed_byte_is_refused(position: int, change: int) -> None:
    """Whatever byte is changed in whatever way, the stream is refused."""
    damaged = bytearray(SAMPLE)
    damaged[position] ^= change
    with pytest.raises(DeviceStateError):
        parse(bytes(damaged))


@given(st.binary(max_size=300))
def test_arbitrary_bytes_raise_nothing_but_the_one_error(data: bytes) -> None:
    """A hostile stream cannot make the parser fail in another way."""
    for stream in (data, SAMPLE[:10] + data, SAMPLE[:-1] + data):
        if stream != SAMPLE:
            with pytest.raises(DeviceStateError):
                parse(stream)


def test_bytes_behind_the_description_are_refused() -> None:
    """The description is the end."""
    with pytest.raises(DeviceStateError, match="goes on"):
        parse(SAMPLE + b"\0")


def test_two_sections_of_one_name_are_refused() -> None:
    """A name stands for one part of the machine."""
    with pytest.raises(DeviceStateError, match="twice"):
        parse(render([Section("cpu", 1, b"a"), Section("cpu", 1, b"b")]))


def test_a_stream_above_the_limit_is_refused() -> None:
    """The limit holds even when everything else is right."""
    with pytest.raises(DeviceStateError, match="larger"):
        parse(render([Section("cpu", 1, bytes(MAX_STREAM_BYTES))]))


def test_the_stream_ends_with_a_readable_description() -> None:
    """A reader who knows only JSON can name the sections with version and size."""
    described = json.loads(SAMPLE[SAMPLE.rindex(b'{"format"') :])
    assert described["sections"][:2] == [
        {"name": "cpu", "version": 1, "size": 40},
        {"name": "clock", "version": 2, "size": 4},
    ]


def test_an_older_section_is_brought_up_step_by_step() -> None:
    """Each step turns one version into the next."""
    steps = {1: lambda payload: payload + b"2", 2: lambda payload: payload + b"3"}
    assert upgraded(Section("x", 1, b"1"), 3, steps) == b"123"
    assert upgraded(Section("x", 3, b"same"), 3, steps) == b"same"


@pytest.mark.parametrize("version", [0, 4], ids=["too old", "too new"])
def test_a_section_of_an_unknown_version_is_refused_by_name(version: int) -> None:
    """The error says which section it is."""
    with pytest.raises(DeviceStateError, match=rf"'x' has version {version}"):
        upgraded(Section("x", version, b""), 3, {1: bytes, 2: bytes})
