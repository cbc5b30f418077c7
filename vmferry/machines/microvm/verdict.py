"""What the canary guest says about itself, read from its serial output.

Promise: anything the canary reports as bad makes the verdict not ok, however much good came before or after; a
canary that has said nothing yet is not ok either. An unfinished last line is left for later.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

_FIELD: Final = re.compile(r"([a-z_]+)=([a-z]+|\d+)(?= |$)")


@dataclass(frozen=True)
class CanaryLine:
    """A regular sign of life."""

    tick: int
    sweep: int
    pos: int
    checked: int
    bad: int
    gap_us: int
    """Largest wall-clock distance between two ticks since the line before: shows a pause as the guest saw it."""


@dataclass(frozen=True)
class CanaryProblem:
    """One thing the canary found wrong."""

    kind: str
    page: int
    want: int
    got: int


@dataclass(frozen=True)
class CanaryVerify:
    """The result of a check of all pages."""

    pages: int
    working: int
    bad: int


@dataclass(frozen=True)
class CanaryVerdict:
    """All of it in one."""

    ok: bool
    bad: int
    ticks: int
    largest_gap_us: int
    problems: tuple[CanaryProblem, ...]
    verifies: tuple[CanaryVerify, ...]


def lines(serial: str) -> list[CanaryLine]:
    """The signs of life in ``serial``, oldest first."""
    return [CanaryLine(**_numbers(line)) for line in _complete(serial) if line.startswith("canary tick=")]


def latest(serial: str) -> CanaryLine | None:
    """The newest sign of life."""
    found = lines(serial)
    return found[-1] if found else None


def verdict(serial: str) -> CanaryVerdict:
    """What the whole of ``serial`` says."""
    signs = lines(serial)
    complete = _complete(serial)
    problems = tuple(_problem(line) for line in complete if line.startswith("canary BAD "))
    verifies = tuple(CanaryVerify(**_numbers(line)) for line in complete if line.startswith("canary verify "))
    bad = max([len(problems), *(line.bad for line in signs), *(verify.bad for verify in verifies)])
    failed = any(line.startswith("canary error") for line in complete)
    return CanaryVerdict(
        ok=bool(signs) and not bad and not failed,
        bad=bad,
        ticks=signs[-1].tick if signs else 0,
        largest_gap_us=max((line.gap_us for line in signs), default=0),
        problems=problems,
        verifies=verifies,
    )


def _complete(serial: str) -> list[str]:
    return serial.split("\n")[:-1]


def _numbers(line: str) -> dict[str, int]:
    return {key: int(value) for key, value in _FIELD.findall(line)}


def _problem(line: str) -> CanaryProblem:
    fields = dict(_FIELD.findall(line))
    return CanaryProblem(fields["kind"], int(fields["page"]), int(fields["want"]), int(fields["got"]))
