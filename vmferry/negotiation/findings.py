"""One line of a compatibility report. Pure."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Severity(enum.IntEnum):
    """How much a finding matters; the values are those of ``vmferry.v1.Severity``."""

    NOTE = 1
    WARNS = 2
    BLOCKS = 3


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    severity: Severity
    id: str
    message: str
    object: str
    remedy: str
