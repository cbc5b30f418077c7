"""The guest of a demonstration, and what it says about itself on its serial port.

Promise: the guest is believed only about what it said where it is now; silence is never taken for health.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from vmferry.cli.demo_hosts import DemoHost
from vmferry.cli.machine import directory_of
from vmferry.errors import MachineDeadError, MachineFailedError, TimedOutError
from vmferry.machines.microvm import verdict
from vmferry.machines.spec import MachineSpec

_GAVE_UP: Final = "canary error"
_POLL_S: Final = 0.02
_ANSWER_S: Final = 30.0
_S_PER_MIB: Final = 0.1
"""How long the guest may take to write or check a MiB; far longer than it does, even on a slow computer."""


class Guest:
    """One canary, wherever it is."""

    def __init__(self, spec: MachineSpec, resident_mib: int) -> None:
        self.spec = spec
        self._whole_s = _ANSWER_S + resident_mib * _S_PER_MIB

    async def wait_ready(self, host: DemoHost) -> None:
        """Wait until it has filled its memory and begun to check it."""
        await self._until(host, lambda serial: bool(verdict.lines(serial)), self._whole_s, "get ready")

    async def gap_ms(self, host: DemoHost) -> float:
        """The gap it saw in its own clock when it came to this host; waits until it has said so."""
        serial = await self._until(host, lambda text: bool(verdict.lines(text)), _ANSWER_S, "go on")
        return verdict.lines(serial)[0].gap_us / 1000

    async def check_everything(self, host: DemoHost) -> verdict.CanaryVerdict:
        """Ask it to check every page and register it has, and return what it said since it came to this host."""
        directory = directory_of(host.config)
        machine = directory.open(directory.find(self.spec.uuid))
        try:
            await machine.send_serial("v")
        finally:
            await machine.close()
        return await self._verdict(host, lambda text: bool(verdict.verdict(text).verifies))

    async def latest_verdict(self, host: DemoHost) -> verdict.CanaryVerdict:
        """What it said since it came to this host."""
        return await self._verdict(host, lambda text: bool(verdict.lines(text)))

    async def _verdict(self, host: DemoHost, enough: Callable[[str], bool]) -> verdict.CanaryVerdict:
        return verdict.verdict(await self._until(host, enough, self._whole_s, "answer"))

    async def _until(self, host: DemoHost, enough: Callable[[str], bool], limit_s: float, verb: str) -> str:
        directory = directory_of(host.config)
        path = directory.paths(self.spec).serial
        try:
            async with asyncio.timeout(limit_s):
                while not enough(text := path.read_text(encoding="ascii", errors="replace")):
                    if _GAVE_UP in text:
                        raise MachineFailedError(f"the guest gave up: {text.strip()}", machine=self.spec.uuid)
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
