"""The guest of a demonstration, and what it says about itself on its serial port.

Promise: the guest is believed only about what it said where it is now; silence is never taken for health.
"""

from __future__ import annotations

import abc
import asyncio
from collections.abc import Callable
from typing import Final

from vmferry.cli.demo_hosts import DemoHost
from vmferry.cli.machine import directory_of
from vmferry.errors import MachineDeadError, MachineFailedError, TimedOutError
from vmferry.machines.microvm import verdict
from vmferry.machines.qemu.guest import verdict as linux
from vmferry.machines.spec import MachineSpec

_GAVE_UP: Final = ("canary error", "Kernel panic")
_POLL_S: Final = 0.02
_ANSWER_S: Final = 30.0
_BOOT_S: Final = 120.0
_S_PER_MIB: Final = {"microvm": 0.1, "qemu": 1.0}
"""How long the guest may take to write or check a MiB; far longer than it does, even on a slow computer."""
_TICKS: Final = 3
_MS_PER_CS: Final = 10


class Guest(abc.ABC):
    """One guest that checks itself, wherever it is."""

    def __init__(self, spec: MachineSpec, resident_mib: int) -> None:
        self.spec = spec
        self._whole_s = _ANSWER_S + resident_mib * _S_PER_MIB[spec.kind]

    @abc.abstractmethod
    async def wait_ready(self, host: DemoHost) -> None:
        """Wait until it has filled its memory and begun to check it."""

    @abc.abstractmethod
    async def gap_ms(self, host: DemoHost) -> float:
        """The gap it saw in its own clock when it came to this host; waits until it has said so."""

    @abc.abstractmethod
    async def next_work(self, host: DemoHost) -> int:
        """How far it had counted, by its next sign of life on this host."""

    @abc.abstractmethod
    async def check_everything(self, host: DemoHost) -> tuple[bool, str]:
        """Whether it finds all it has as it left it, checked once more here, and what it says."""

    @abc.abstractmethod
    async def well(self, host: DemoHost) -> bool:
        """Whether it lives here and has found nothing wrong."""

    async def _until(self, host: DemoHost, enough: Callable[[str], bool], limit_s: float, verb: str) -> str:
        directory = directory_of(host.config)
        path = directory.paths(self.spec).serial
        try:
            async with asyncio.timeout(limit_s):
                while not enough(text := path.read_text(encoding="ascii", errors="replace")):
                    if any(words in text for words in _GAVE_UP):
                        raise MachineFailedError(
                            f"the guest gave up: {text.strip()[-500:]}", machine=self.spec.uuid
                        )
                    record = directory.find(self.spec.uuid)
                    if not record.alive:
                        raise MachineDeadError(
                            f"the guest ended; its log says:\n{record.paths.log_tail()}",
                            machine=self.spec.uuid,
                        )
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            raise TimedOutError(
                f"the guest on host {host.name} did not {verb} within {limit_s:.0f} s"
            ) from None
        return text


class Canary(Guest):
    """The guest program of that name, in a micro-VM."""

    async def wait_ready(self, host: DemoHost) -> None:
        """Wait for its first regular line."""
        await self._until(host, lambda serial: bool(verdict.lines(serial)), self._whole_s, "get ready")

    async def gap_ms(self, host: DemoHost) -> float:
        """What its first line here says."""
        serial = await self._until(host, lambda text: bool(verdict.lines(text)), _ANSWER_S, "go on")
        return verdict.lines(serial)[0].gap_us / 1000

    async def next_work(self, host: DemoHost) -> int:
        """Wait for one more of its lines."""
        seen = len(verdict.lines(await self._until(host, bool, _ANSWER_S, "go on")))
        more = await self._until(host, lambda text: len(verdict.lines(text)) > seen, _ANSWER_S, "go on")
        return verdict.lines(more)[-1].tick

    async def check_everything(self, host: DemoHost) -> tuple[bool, str]:
        """Ask it to check every page and register it has."""
        directory = directory_of(host.config)
        machine = directory.open(directory.find(self.spec.uuid))
        try:
            await machine.send_serial("v")
        finally:
            await machine.close()
        found = await self._verdict(host, lambda text: bool(verdict.verdict(text).verifies))
        pages = found.verifies[-1].pages + found.verifies[-1].working
        return found.ok, f"the guest checked its {pages} pages and its registers: {found.bad} are wrong"

    async def well(self, host: DemoHost) -> bool:
        """By its latest line."""
        return (await self._verdict(host, lambda text: bool(verdict.lines(text)))).ok

    async def _verdict(self, host: DemoHost, enough: Callable[[str], bool]) -> verdict.CanaryVerdict:
        return verdict.verdict(await self._until(host, enough, self._whole_s, "answer"))


class Linux(Guest):
    """A Linux kernel with a shell that checks itself, in QEMU; it cannot be asked, and checks all the time."""

    async def wait_ready(self, host: DemoHost) -> None:
        """Wait until it has booted, made its files and begun to count."""
        await self._ticks(host, self._whole_s + _BOOT_S)

    async def gap_ms(self, host: DemoHost) -> float:
        """The longest of its first steps here, by its own clock, which counts in hundredths of a second."""
        found = await self._ticks(host, _ANSWER_S)
        return float(max(tick.gap_cs for tick in found.ticks[:_TICKS]) * _MS_PER_CS)

    async def next_work(self, host: DemoHost) -> int:
        """Wait for one more tick."""
        seen = len((await self._ticks(host, _ANSWER_S)).ticks)
        more = await self._until(host, lambda text: len(linux.verdict(text).ticks) > seen, _ANSWER_S, "go on")
        return linux.verdict(more).ticks[-1].number

    async def check_everything(self, host: DemoHost) -> tuple[bool, str]:
        """Wait until it has read all its files once more, from the beginning to the end."""
        now = (await self._ticks(host, _ANSWER_S)).ticks[-1].number

        def checked(text: str) -> bool:
            return any(check.begun_tick >= now for check in linux.verdict(text).checks)

        found = linux.verdict(await self._until(host, checked, self._whole_s, "check itself"))
        bad = max(check.bad for check in found.checks) + len(found.faults)
        return found.ok, f"the guest read all its files and counted on without a hole: {bad} faults"

    async def well(self, host: DemoHost) -> bool:
        """By all that it said here."""
        return (await self._ticks(host, _ANSWER_S)).ok

    async def _ticks(self, host: DemoHost, limit_s: float) -> linux.Verdict:
        """What it has said, once it has counted a few steps here."""
        return linux.verdict(
            await self._until(host, lambda text: len(linux.verdict(text).ticks) >= _TICKS, limit_s, "go on")
        )
