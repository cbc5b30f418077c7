"""What docs/grpcurl.md says: the blocks to paste, the calls in them, and what is to come of each."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "grpcurl.md"
_BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_CALL = re.compile(
    r"(?P<method>\b(?:vmferry|grpc)\.[\w.]+/\w+|(?<=[ ])list\b)(?P<rest>[^\n]*)$", re.MULTILINE
)
_REFUSED = re.compile(r"# refused: ([A-Z_]+)$")


@dataclass(frozen=True)
class Call:
    """One call of the page."""

    method: str
    refused: str
    """For what reason it is to be refused; empty if it is to be answered."""


def script() -> str:
    """All blocks, as somebody would paste them one after the other."""
    return "\n".join(_BLOCK.findall(PAGE.read_text(encoding="utf-8")))


def calls() -> list[Call]:
    """The calls, in the order of the page."""
    found = []
    for match in _CALL.finditer(script()):
        refused = _REFUSED.search(match["rest"])
        found.append(Call(match["method"], refused[1] if refused else ""))
    return found
