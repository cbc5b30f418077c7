"""What memory is filled with: pages that cannot be compressed, or those of real files."""

from __future__ import annotations

import enum
import os

from vmferry.bench.guest import real_files


class Contents(enum.StrEnum):
    """Kinds of it."""

    RANDOM = "random"
    FILES = "files"


def contents(kind: str, size_bytes: int) -> bytes:
    """So many bytes of a kind."""
    return os.urandom(size_bytes) if kind == Contents.RANDOM else real_files(size_bytes)
