"""Slowing a guest down so that it writes less.

Where its process has a cgroup to itself, that gets less processor time (``cpulimit``). Everywhere else the guest is
held still for a part of every tenth of a second::

    |<-------------- 100 ms -------------->|
    | stop: held, N per cent | cont: it runs |

Promise: the guest is let go only with a permit of its own kind, minted anew each time from the journals, which
exists only while its machine is being copied and nothing of it is sealed; nothing here can undo a hand-off's pause.
After :meth:`Throttle.end` the guest runs and is never held again, whatever failed before; a guest that was held when
this process was killed is resumed by the next one, as every guest is whose machine did not leave.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Final

from vmferry.errors import VmferryError
from vmferry.handoff.gate import ResumePermit
from vmferry.machines.cpulimit import CpuLimit
from vmferry.machines.port import Machine, RunState
from vmferry.machines.qmp import QmpMachine
from vmferry.together import to_the_end

_PERIOD_S: Final = 0.1


class Means(enum.StrEnum):
    """How a guest is slowed down."""

    CPU_LIMIT = "cpu.max"
    """Or what is the same in a cgroup of version 1."""
    DUTY_CYCLE = "stop and cont"


Permitted = Callable[[], AbstractAsyncContextManager[ResumePermit]]


class Throttle:
    """Holds one machine's guest back, by as much as it was last told."""

    def __init__(
        self,
        machine: Machine,
        permitted: Permitted,
        find_limit: Callable[[], CpuLimit | None],
    ) -> None:
        self.used = False
        """Whether the guest was ever held, even if nobody said that it was."""
        self._machine = machine
        self._permitted = permitted
        self._find_limit = find_limit
        self._limit: CpuLimit | None = None
        self._percent = 0
        self._held = False
        self._ending = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._failure: VmferryError | None = None

    @classmethod
    def of(cls, machine: QmpMachine, permitted: Permitted) -> Throttle:
        """For a machine of this host, by whatever means there are."""

        def find_limit() -> CpuLimit | None:
            return CpuLimit.find(machine.pid, machine.paths.home, machine.spec.vcpus)

        return cls(machine, permitted, find_limit)

    @property
    def percent(self) -> int:
        """What part of its time is taken from the guest."""
        return self._percent

    @property
    def means(self) -> Means:
        """How that is done."""
        return Means.CPU_LIMIT if self._limit is not None else Means.DUTY_CYCLE

    def set(self, percent: int) -> None:
        """Take so much of its time from the guest from now on.

        Raises:
            VmferryError: what went wrong with what was asked for before.
        """
        if self._failure is not None:
            raise self._failure
        if self._ending.is_set():
            return
        before, self._percent = self._percent, percent
        if self._limited(before):
            return
        if percent and self._task is None:
            self.used = True
            self._task = asyncio.create_task(self._hold_back(), name=f"throttle-{self._machine.spec.name}")

    def _limited(self, before: int) -> bool:
        """Whether the machine's processor time is what it should be now; there may be no way to that."""
        if not before and self._percent and self._task is None:
            self._limit = self._find_limit()
        if self._limit is None:
            return False
        try:
            if self._percent != before:
                self._limit.take(self._percent)
        except OSError:
            self._limit.give_back()
            self._limit = None
        return self._limit is not None

    async def end(self) -> None:
        """Let the guest run at full speed, for good; safe to call twice.

        Raises:
            VmferryError: the guest is held and cannot be let go now.
        """
        self._ending.set()
        await to_the_end(self._end())

    async def _end(self) -> None:
        if self._task is not None:
            # It is not interrupted: a command whose answer nobody waits for would break the connection.
            await asyncio.wait({self._task})
        self._percent = 0
        if self._limit is not None:
            self._limit.give_back()
            self._limit = None
        if self._held:
            await self._let_go()

    async def _hold_back(self) -> None:
        try:
            while not self._ending.is_set():
                await self._turn()
        except VmferryError as error:
            self._failure = error

    async def _turn(self) -> None:
        share = self._percent / 100
        if share and await self._machine.run_state() is RunState.RUNNING:
            self._held = True
            await self._machine.stop()
            await self._sleep(_PERIOD_S * share)
            await self._let_go()
        await self._sleep(_PERIOD_S * (1 - share))

    async def _let_go(self) -> None:
        async with self._permitted() as permit:
            await self._machine.cont(permit)
        self._held = False

    async def _sleep(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._ending.wait()
