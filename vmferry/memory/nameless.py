"""Files without a name.

Promise: nobody else can open one, and the kernel removes it when it is closed, also by its process's death.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def open_nameless(folder: Path) -> int:
    """The descriptor of a new, empty one, to be read and written by its owner alone; raises OSError."""
    # Made and removed in one step where the file system can; elsewhere one after the other.
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        return os.dup(file.fileno())
