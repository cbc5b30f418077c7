"""The same protocol by another program: runs ``handoff.pml`` with Spin, whole and without its guards.

Promise: every file that Spin and the compiler make is in a temporary folder; a search that was cut short is an error,
never a success.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

SOURCE: Final = Path(__file__).with_name("handoff.pml")
NEEDED: Final = ("spin", "gcc")
SAFE: Final = {
    "two hosts, two attempts, two crashes": (),
    "three hosts, two attempts, a crash": ("-DHOSTS=3", "-DCRASHES=1"),
    "two hosts, three attempts, a crash": ("-DATTEMPTS=3", "-DCRASHES=1"),
    "two hosts, one may be forced when the other is off": ("-DOPERATOR",),
}
BROKEN: Final = (
    "BUG_TIMEOUT",
    "BUG_GO_FIRST",
    "BUG_DISCARD",
    "BUG_NO_ORDER",
    "BUG_CLOSE_ALONE",
    "BUG_FREE_EARLY",
    "BUG_OPEN_GATE",
    "BUG_NO_COPY",
    "BUG_RELEASE_ARRIVED",
    "BUG_FORCE_UNFENCED",
    "BUG_FORCE_WITH_MEMORY",
)
_LIMIT_S: Final = 120
_FOUND: Final = re.compile(
    r"errors: (\d+)\n\s+(\d+) states, stored.*?\n.*?\n?\s+(\d+) transitions", re.DOTALL
)


@dataclass(frozen=True)
class Searched:
    """What Spin found."""

    errors: int
    states: int
    transitions: int
    trace: tuple[str, ...] = ()


def missing() -> list[str]:
    """The commands that are not installed here."""
    return [command for command in NEEDED if shutil.which(command) is None]


def search(*defines: str) -> Searched:
    """Search all states of the model with these definitions; with an error, for its shortest trace."""
    with tempfile.TemporaryDirectory(prefix="vmferry-spin-") as folder:
        shutil.copy(SOURCE, folder)
        _run(folder, "spin", *defines, "-a", SOURCE.name)
        shortest = any(define.startswith("-DBUG") for define in defines)
        _run(folder, "gcc", "-O1", "-w", "-DSAFETY", *(["-DREACH"] if shortest else []), "-o", "pan", "pan.c")
        said = _run(folder, "./pan", "-m10000", *(["-i"] if shortest else []))
        found = _FOUND.search(said)
        if found is None or (not shortest and "depth too small" in said):
            raise RuntimeError(f"the search was cut short: {said[-2000:]}")
        errors, states, transitions = map(int, found.groups())
        trace: tuple[str, ...] = ()
        if errors:
            told = _run(folder, "spin", "-t", *defines, SOURCE.name)
            trace = tuple(re.findall(r"^\s+(\S+@\d)$", told, re.MULTILINE))
        return Searched(errors, states, transitions, trace)


def _run(folder: str, *command: str) -> str:
    done = subprocess.run(  # noqa: S603 - commands of this module only
        command, cwd=folder, capture_output=True, text=True, timeout=_LIMIT_S, check=False
    )
    if done.returncode and command[0] != "./pan":
        raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
    return done.stdout
