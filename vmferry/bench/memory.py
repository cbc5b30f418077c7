"""Where guests of a comparison have their memory: the computer's shared memory, or huge pages.

Promise: all movers have the same. What is mounted here is removed again, with all that is in it.
"""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from vmferry.cli.demo_hosts import SHARED_MEMORY, shared_memory_bytes
from vmferry.errors import InvalidArgumentError

_COMMAND_S: Final = 20


@contextlib.contextmanager
def opened(*, huge_pages: bool) -> Iterator[Path]:
    """A folder for memory files, which is there until the end.

    Raises:
        InvalidArgumentError: a file system with huge pages may not be mounted.
    """
    if not huge_pages:
        yield SHARED_MEMORY
        return
    with tempfile.TemporaryDirectory(prefix="vmferry-bench-") as folder:
        # As a host would: a page is huge where all of it lies within its file.
        _run(
            "mount",
            "-t",
            "tmpfs",
            "-o",
            f"mode=0700,huge=within_size,size={shared_memory_bytes()}",
            "none",
            folder,
        )
        try:
            yield Path(folder)
        finally:
            _run("umount", folder)


def _run(*command: str) -> None:
    done = subprocess.run(  # noqa: S603 - fixed programs, arguments made here
        command, check=False, capture_output=True, text=True, timeout=_COMMAND_S
    )
    if done.returncode:
        raise InvalidArgumentError(
            f"'{' '.join(command)}' failed: {done.stderr.strip()}",
            field="--huge-pages",
            remedy="Be root (in a container: with SYS_ADMIN), or have /dev/shm mounted with huge=within_size.",
        )
