"""The guest programs: committed images and parameters."""

from __future__ import annotations

import shutil

import pytest

from tests.support import require
from vmferry.errors import ConfigError
from vmferry.machines.microvm.guests import PROGRAMS, Program
from vmferry.machines.microvm.guests.build import assemble


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_the_committed_image_is_what_its_source_gives(program: Program) -> None:
    """Nobody can change a source and forget the image."""
    require(shutil.which("as") and shutil.which("objcopy"), "GNU as and objcopy")
    assert program.image_path.read_bytes() == assemble(program)


def test_parameters_take_their_slots() -> None:
    """A value goes where the program looks for it; others stay unset."""
    assert PROGRAMS["writer"].slots({"full-pages": "1"}) == [None, None, 1]


@pytest.mark.parametrize(
    "given", [{"speed": "1"}, {"tick-us": "-1"}, {"tick-us": "x"}, {"tick-us": "4294967296"}]
)
def test_wrong_parameters_are_refused(given: dict[str, str]) -> None:
    """Unknown names and values that are no whole numbers are the user's mistake, and told."""
    with pytest.raises(ConfigError):
        PROGRAMS["canary"].slots(given)
