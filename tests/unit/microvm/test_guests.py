"""The guest programs: committed images and parameters."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.support import require
from vmferry.errors import ConfigError
from vmferry.machines.microvm.guests import PROGRAMS
from vmferry.machines.microvm.guests.build import IMAGES, assemble


@pytest.mark.parametrize("image", IMAGES, ids=lambda path: path.stem)
def test_the_committed_image_is_what_its_source_gives(image: Path) -> None:
    """Nobody can change a source and forget the image."""
    require(shutil.which("as") and shutil.which("objcopy"), "GNU as and objcopy")
    assert image.read_bytes() == assemble(image)


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
