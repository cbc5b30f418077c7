"""The table of exit codes in the documentation is the one in the code."""

from __future__ import annotations

import re
from pathlib import Path

from vmferry.errors import ExitCode, catalogue

DOCS = Path(__file__).parents[3] / "docs" / "cli.md"


def test_the_table_is_complete_and_right() -> None:
    """docs/cli.md has one row per exit code, with its number, name and reasons, and no other."""
    rows = re.findall(r"^\| (\d+) \| `([A-Z]+)` \| [^|]+ \|([^|]*)\|$", DOCS.read_text("utf-8"), re.MULTILINE)

    documented = {
        int(number): (name, set(re.findall(r"`([A-Z_]+)`", reasons))) for number, name, reasons in rows
    }
    known: dict[int, tuple[str, set[str]]] = {code.value: (code.name, set()) for code in ExitCode}
    for reason, error in catalogue().items():
        known[error.exit_code][1].add(reason)
    assert documented == known
