"""Which release of the micro-VM this is, as it answers ``query-version``; promise: one place says it."""

from __future__ import annotations

from typing import Any, Final

_NUMBERS: Final = {"major": 1, "minor": 0, "micro": 0}
VERSION: Final[dict[str, Any]] = {"qemu": _NUMBERS, "package": "vmferry-microvm"}
TEXT: Final = f"{VERSION['package']} {'.'.join(map(str, _NUMBERS.values()))}"
