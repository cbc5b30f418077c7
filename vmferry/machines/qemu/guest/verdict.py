"""What the Linux guest says about itself on its serial port.

Promise: pure; a line counts only if it is whole, a kernel that complains is not well, and silence is not health.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

_TICK: Final = re.compile(r"^tick n=(\d+) up=(\d+)\.(\d\d) gap=(\d+) wall=(\d+) bad=(\d+)\r?$", re.MULTILINE)
_CHECK: Final = re.compile(r"^check n=(\d+) begun=(\d+) bad=(\d+)\r?$", re.MULTILINE)
_WRITTEN: Final = re.compile(r"^disk n=(\d+) name=(\w+) md5=([0-9a-f]{32}) bad=(\d+)\r?$", re.MULTILINE)
_TOLD: Final = re.compile(r"^events n=(\d+) number=(\d+) status=(\w+) id=([\w-]+)\r?$", re.MULTILINE)
_APPROVED: Final = re.compile(r"^approved id=([\w-]+) answer=(.*?)\r?$", re.MULTILINE)
_READY: Final = re.compile(r"^ready files=(\d+)\r?$", re.MULTILINE)
_FAULT: Final = re.compile(
    r"^.*(?:BAD |Kernel panic|BUG: |Oops|general protection|segfault|soft lockup|rcu: INFO"
    r"|EXT4-fs error|I/O error).*$",
    re.MULTILINE,
)


@dataclass(frozen=True)
class Tick:
    """One sign of life."""

    number: int
    uptime_cs: int
    gap_cs: int
    """Time since the one before, by the guest's own clock."""
    wall_s: int
    bad: int


@dataclass(frozen=True)
class Check:
    """All files were read once more."""

    begun_tick: int
    bad: int


@dataclass(frozen=True)
class Written:
    """A file that is on the guest's disk."""

    number: int
    name: str
    md5: str
    bad: int


@dataclass(frozen=True)
class Told:
    """What the metadata service said that was new."""

    times_asked: int
    number: int
    """Of the document."""
    status: str
    """Of its first event; ``none`` if it has none."""
    event_id: str


@dataclass(frozen=True)
class Verdict:
    """What the guest said, as far as it is whole."""

    ready: bool
    ticks: tuple[Tick, ...]
    checks: tuple[Check, ...]
    faults: tuple[str, ...]
    written: tuple[Written, ...] = ()
    told: tuple[Told, ...] = ()
    approved: tuple[tuple[str, str], ...] = ()
    """Events that it approved, each with the first line that came back."""

    @property
    def ok(self) -> bool:
        """It lives, counts without a hole, its clock never went back, and it found no fault."""
        steps = zip(self.ticks, self.ticks[1:], strict=False)
        counts = all(
            after.number == before.number + 1 and after.uptime_cs >= before.uptime_cs
            for before, after in steps
        )
        bad = any(
            (
                *(tick.bad for tick in self.ticks),
                *(check.bad for check in self.checks),
                *(file.bad for file in self.written),
            )
        )
        return bool(self.ticks) and counts and not bad and not self.faults

    def checked_after(self, tick: int) -> bool:
        """Whether it read all its files since a tick, and found them as they were."""
        return any(check.begun_tick >= tick and not check.bad for check in self.checks)


def verdict(serial: str) -> Verdict:
    """Read what was written to a serial port."""
    whole = serial[: serial.rfind("\n") + 1]
    ticks = (
        Tick(int(n), int(s + cs), int(gap), int(wall), int(bad))
        for n, s, cs, gap, wall, bad in _TICK.findall(whole)
    )
    checks = tuple(Check(int(begun), int(bad)) for _, begun, bad in _CHECK.findall(whole))
    return Verdict(
        ready=bool(_READY.search(whole)),
        ticks=tuple(ticks),
        checks=checks,
        faults=tuple(_FAULT.findall(whole)),
        written=tuple(Written(int(n), name, md5, int(bad)) for n, name, md5, bad in _WRITTEN.findall(whole)),
        told=tuple(
            Told(int(n), int(number), status, event_id)
            for n, number, status, event_id in _TOLD.findall(whole)
        ),
        approved=tuple(_APPROVED.findall(whole)),
    )
