"""Rates and times as people write them.

Promise: what is understood means the same everywhere; anything else is refused with examples of what would be.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Final

from vmferry.errors import InvalidArgumentError

_RATE: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([kKMGT]?)(i?)(B|bit)?(?:/s)?")
_STEPS: Final = {"": 0, "k": 1, "K": 1, "M": 2, "G": 3, "T": 4}
_BITS: Final = 8
_SPAN: Final = re.compile(r"([0-9]{1,9}(?:\.[0-9]+)?) ?([smhd])")
_SPANS_S: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def bytes_per_second(text: str, *, field: str) -> int:
    """Read a rate: ``100M`` is 100 000 000 bytes per second, ``100Mi`` 104 857 600, ``100Mbit`` 12 500 000.

    Raises:
        InvalidArgumentError: it is something else.
    """
    match = _RATE.fullmatch(text.strip())
    if match is None:
        raise InvalidArgumentError(
            f"{text!r} is no rate",
            field=field,
            remedy="Give bytes per second such as 100M, 1.5G or 64MiB, or bits such as 800Mbit.",
        )
    number, prefix, binary, unit = match.groups()
    if binary and not prefix:
        raise InvalidArgumentError(f"{text!r} is no rate: 'i' follows K, M, G or T", field=field)
    value = float(number) * (1024 if binary else 1000) ** _STEPS[prefix]
    return int(value / _BITS if unit == "bit" else value)


def moment(text: str, *, field: str, ahead: bool, now: datetime | None = None) -> datetime:
    """Read a time such as ``2026-11-28T14:00:00Z``, or a span from now such as ``90s``, ``15m``, ``2h``, ``7d``.

    Args:
        text: what was written; without a zone it is UTC.
        field: the option it was given to.
        ahead: whether a span leads from now into the future, or back from now.
        now: for tests.

    Raises:
        InvalidArgumentError: it is something else.
    """
    now = now or datetime.now(UTC)
    text = text.strip()
    try:
        if match := _SPAN.fullmatch(text):
            span = timedelta(seconds=float(match[1]) * _SPANS_S[match[2]])
            return now + span if ahead else now - span
        found = datetime.fromisoformat(text)
    except (ValueError, OverflowError):
        raise InvalidArgumentError(
            f"{text!r} is no time",
            field=field,
            remedy="Give a time such as 2026-11-28T14:00:00Z, or a span such as 90s, 15m, 2h or 7d.",
        ) from None
    return found if found.tzinfo is not None else found.replace(tzinfo=UTC)
