"""What both ways of moving the guest have in common: where it is, how it is asked, and whether it is well.

Promise: a guest is called right only if, where it arrived, it has summed all its memory again, and its writer has
been over its whole set, without a single fault; silence is not health.
"""

from __future__ import annotations

import abc
import asyncio
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from qemu.qmp import ConnectError, QMPClient

from vmferry.bench.guest import Wishes
from vmferry.bench.ticks import Line, last_line
from vmferry.errors import TimedOutError

_BOOT_S: Final = 180.0
_ANSWER_S: Final = 30.0
_S_PER_MIB: Final = 0.1
"""How long the guest may take to look at a MiB; far longer than it does."""
_POLL_S: Final = 0.05
_TAIL_BYTES: Final = 4096
_CONNECT_S: Final = 20.0
_PAGES_PER_MIB: Final = 256
_MIB: Final = 1024 * 1024
_BLOCK_BYTES: Final = 512
_KEY: Final = {"keys": [{"type": "qcode", "data": "v"}]}


@dataclass(frozen=True)
class Moved:
    """How a migration came out, in the mover's own words; times in milliseconds."""

    outcome: str
    prepare_ms: float | None = None
    total_ms: float | None = None
    downtime_ms: float | None = None
    sent_bytes: int | None = None
    rounds: int | None = None

    @property
    def completed(self) -> bool:
        """Whether the guest is at the destination."""
        return self.outcome == "completed"


class Mover(abc.ABC):
    """A running guest that can be moved to the other host, and from there back."""

    one_way = False
    """It is not moved back: it begins anew where it was."""

    def __init__(self, wishes: Wishes) -> None:
        self.wishes = wishes

    @property
    @abc.abstractmethod
    def serials(self) -> tuple[Path, Path]:
        """Where the guest speaks now, and where it will."""

    @property
    @abc.abstractmethod
    def ram(self) -> Path:
        """Its memory where it is now."""

    @property
    @abc.abstractmethod
    def pids(self) -> list[int]:
        """All processes that there are for it now."""

    @property
    @abc.abstractmethod
    def services(self) -> list[int]:
        """Those of them that are services."""

    @property
    @abc.abstractmethod
    def hypervisor(self) -> int:
        """The process that runs the guest."""

    @property
    @abc.abstractmethod
    def socket(self) -> Path:
        """Where that process takes commands."""

    @abc.abstractmethod
    async def boot(self) -> None:
        """Start the guest anew, on whichever host."""

    @abc.abstractmethod
    async def move(self, variant: str, limit_s: float) -> Moved:
        """Move it to the other host."""

    @abc.abstractmethod
    async def get_ready(self) -> None:
        """Return when the other host can take it as the measurement has it; nothing else goes on then."""

    async def pause(self) -> None:
        """Have it stand still while others are measured."""
        await execute(self.socket, "stop")

    async def go_on(self) -> None:
        """Let it run, with all of its memory set aside where it is."""
        await asyncio.to_thread(set_aside, self.ram, self.wishes.memory_mib * _MIB)
        await execute(self.socket, "cont")

    async def wait_ready(self) -> None:
        """Wait until it has booted and has all that it is to hold."""
        wishes = self.wishes
        mib = wishes.resident_mib + wishes.files_mib + wishes.set_mib
        await self._until(_speaks, _BOOT_S + mib * _S_PER_MIB, "boot")

    async def check(self, before: Line | None) -> bool:
        """Whether it is right, asked where it is now."""
        wishes, arrived = self.wishes, await self._until(_speaks, _ANSWER_S, "speak")
        await execute(self.socket, "send-key", _KEY)
        visited = arrived.pages_written + wishes.set_mib * _PAGES_PER_MIB
        seconds = _ANSWER_S + (wishes.resident_mib + wishes.files_mib + wishes.set_mib) * _S_PER_MIB
        line = await self._until(
            lambda line: line.done > arrived.done and line.pages_written >= visited,
            seconds,
            "look at its memory",
        )
        return line.bad == (before.bad if before else 0)

    def last_line(self) -> Line | None:
        """What it last said of itself where it is."""
        return last_line(_tail(self.serials[0]))

    async def _until(self, enough: Callable[[Line], bool], limit_s: float, verb: str) -> Line:
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            line = self.last_line()
            if line is not None and enough(line):
                return line
            await asyncio.sleep(_POLL_S)
        raise TimedOutError(
            f"the guest did not {verb} within {limit_s:.0f} s: {_tail(self.serials[0])[-300:]!r}"
        )


async def execute(socket: Path, command: str, arguments: Mapping[str, Any] | None = None) -> Any:
    """One command to a hypervisor."""
    client = await connected(socket)
    try:
        return await client.execute(command, arguments)
    finally:
        await client.disconnect()


async def connected(socket: Path) -> QMPClient:
    """A connection to a hypervisor, which may just have been started."""
    deadline = time.monotonic() + _CONNECT_S
    while True:
        client = QMPClient("bench")
        try:
            async with asyncio.timeout(_CONNECT_S):
                await client.connect(str(socket))
            return client
        except (ConnectError, TimeoutError) as error:
            if time.monotonic() > deadline:
                raise TimedOutError(f"nobody answers at {socket} within {_CONNECT_S:.0f} s") from error
            await asyncio.sleep(_POLL_S / 5)


def set_aside(ram: Path, size_bytes: int) -> None:
    """Have all memory of a file set aside, so that no guest pays for what it touches for the first time.

    Only once: memory that is set aside again is zeroed by the kernel and counts as written from then on.
    """
    descriptor = os.open(ram, os.O_RDWR | os.O_CLOEXEC)
    try:
        if os.fstat(descriptor).st_blocks * _BLOCK_BYTES < size_bytes:
            os.posix_fallocate(descriptor, 0, size_bytes)
    finally:
        os.close(descriptor)


def _speaks(_line: Line) -> bool:
    """Anything will do."""
    return True


def _tail(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            return file.read().decode("ascii", errors="replace")
    except FileNotFoundError:
        return ""
