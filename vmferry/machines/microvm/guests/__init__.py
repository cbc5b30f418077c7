"""The guest programs: what each is called, which boot parameters it takes, and its assembled image.

The images are committed, so that nobody needs an assembler to use them; ``build`` makes them from the sources and
tells whether they still fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vmferry.errors import ConfigError

SOURCES: Final = Path(__file__).parent
IMAGE_BASE: Final = 0x10000
"""Where in guest memory an image is placed, and where its first instruction is."""
_MAX_PARAMETER: Final = (1 << 32) - 1


@dataclass(frozen=True)
class Program:
    """One guest program."""

    name: str
    parameters: tuple[str, ...]
    """Names of the boot parameters, in the order of their slots; values are whole numbers."""

    @property
    def image_path(self) -> Path:
        """The committed image."""
        return SOURCES / f"{self.name}.bin"

    def slots(self, given: Mapping[str, str]) -> list[int | None]:
        """Parameter values by slot; None for those not given."""
        if unknown := sorted(set(given) - set(self.parameters)):
            known = ", ".join(self.parameters)
            raise ConfigError(f"{self.name} has no parameter {unknown[0]!r}, only {known}", field="param")
        return [_number(name, given[name]) if name in given else None for name in self.parameters]


def _number(name: str, text: str) -> int:
    if not text.isdecimal() or int(text) > _MAX_PARAMETER:
        raise ConfigError(f"{name}={text!r} is not a whole number from 0 to {_MAX_PARAMETER}", field="param")
    return int(text)


PROGRAMS: Final = {
    program.name: program
    for program in (
        Program("canary", ("resident-mib", "tick-us", "dirty-mib-per-s", "working-set-mib", "full-pages")),
        Program("asker", ("poll-us", "approve")),
        Program("writer", ("dirty-mib-per-s", "working-set-mib", "full-pages")),
    )
}
