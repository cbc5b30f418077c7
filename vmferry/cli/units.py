"""Rates as people write them.

Promise: what is understood means the same everywhere; anything else is refused with examples of what would be.
"""

from __future__ import annotations

import re
from typing import Final

from vmferry.errors import InvalidArgumentError

_RATE: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([kKMGT]?)(i?)(B|bit)?(?:/s)?")
_STEPS: Final = {"": 0, "k": 1, "K": 1, "M": 2, "G": 3, "T": 4}
_BITS: Final = 8


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
