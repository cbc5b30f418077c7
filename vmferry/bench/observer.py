"""Times what a guest says on its serial port, at the host it leaves and at the one it comes to.

A process of its own, so that nothing else that is measured makes it late:
``python -m vmferry.bench.observer FILE FILE``. It says ``ready``, and when its standard input ends it prints what
arrived since: one list of port, time by the monotonic clock, and text. A file that is there at the beginning counts
from its end, and one that appears later from its beginning.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import sys
import time
from pathlib import Path
from typing import Final

from vmferry.bench.ticks import Piece, Signs, read

_STEP_S: Final = 0.0005
_READ_BYTES: Final = 65_536
_PRIORITY: Final = 10
_PATIENCE_S: Final = 30.0


class Observer:
    """An observing process, begun and ended by the caller."""

    def __init__(self, *files: Path) -> None:
        self._files = files
        self._process: asyncio.subprocess.Process | None = None

    async def begin(self) -> None:
        """Observe from now on."""
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", __name__, *map(str, self._files)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        assert self._process.stdout is not None
        async with asyncio.timeout(_PATIENCE_S):
            await self._process.stdout.readline()

    async def end(self) -> Signs:
        """Stop observing; everything that was seen."""
        assert self._process is not None
        async with asyncio.timeout(_PATIENCE_S):
            out, _ = await self._process.communicate(b"")
        return read([Piece(*piece) for piece in json.loads(out)])

    async def close(self) -> None:
        """End the process, if it has not ended."""
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.communicate()


def observe(files: list[Path]) -> list[tuple[int, int, str]]:
    """Read the files as they grow, until standard input ends."""
    descriptors: dict[int, int] = {}
    for port, file in enumerate(files):
        with contextlib.suppress(FileNotFoundError):
            descriptors[port] = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            os.lseek(descriptors[port], 0, os.SEEK_END)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    found: list[tuple[int, int, str]] = []
    ending = False
    while not ending:
        ending = bool(select.select([sys.stdin], [], [], _STEP_S)[0])
        for port, file in enumerate(files):
            if port not in descriptors:
                with contextlib.suppress(FileNotFoundError):
                    descriptors[port] = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            if port in descriptors and (data := os.read(descriptors[port], _READ_BYTES)):
                found.append((port, time.monotonic_ns(), data.decode("ascii", errors="replace")))
    return found


def main() -> None:
    """Observe the files that the command line names."""
    # Whoever may not be in time first observes as well as it can.
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(_PRIORITY))
    json.dump(observe([Path(name) for name in sys.argv[1:]]), sys.stdout)


if __name__ == "__main__":
    main()
