"""Where guests of a comparison have their memory: in huge pages, as a host should, or in what there is.

Promise: all movers have the same. What is mounted here is removed again, with all that is in it.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vmferry.bench.commands import run
from vmferry.cli.demo_hosts import SHARED_MEMORY, shared_memory_bytes
from vmferry.errors import InvalidArgumentError

_OPTION: Final = "--huge-pages"
_REMEDY: Final = "Be root (in a container: with SYS_ADMIN), or have /dev/shm mounted with huge=within_size."


@dataclass(frozen=True)
class GuestMemory:
    """What there is for guests."""

    folder: Path
    huge_pages: bool
    """Whether it was mounted for that; otherwise it is the computer's own, however that is mounted."""


_AS_IT_IS: Final = GuestMemory(SHARED_MEMORY, huge_pages=False)


@contextlib.contextmanager
def opened(*, huge_pages: bool | None = None) -> Iterator[GuestMemory]:
    """Memory that is there until the end.

    Args:
        huge_pages: whether it has huge pages; ``None``: if that may be.

    Raises:
        InvalidArgumentError: a file system with huge pages may not be mounted.
    """
    memory = _AS_IT_IS
    with contextlib.ExitStack() as undo:
        if huge_pages is not False:
            try:
                memory = undo.enter_context(_huge_pages())
            except InvalidArgumentError:
                if huge_pages:
                    raise
        yield memory


@contextlib.contextmanager
def _huge_pages() -> Iterator[GuestMemory]:
    with tempfile.TemporaryDirectory(prefix="vmferry-bench-") as folder:
        # As a host would: a page is huge where all of it lies within its file.
        options = f"nosuid,nodev,mode=0700,huge=within_size,size={shared_memory_bytes()}"
        run("mount", "-t", "tmpfs", "-o", options, "none", folder, option=_OPTION, remedy=_REMEDY)
        try:
            yield GuestMemory(Path(folder), huge_pages=True)
        finally:
            # A hypervisor that is just ending is not waited for.
            run("umount", "--lazy", folder, option=_OPTION)
