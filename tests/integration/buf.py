"""The command that speaks gRPC by reflection alone, wherever it is kept."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

ROOT = Path(__file__).parents[2]


def find_buf() -> str | None:
    """The buf command: named by VMFERRY_BUF, on the PATH, or where the lint of the contract keeps it."""
    kept = sorted(ROOT.glob(".tools/buf-*/node_modules/.bin/buf"))
    return os.environ.get("VMFERRY_BUF") or shutil.which("buf") or (str(kept[-1]) if kept else None)
