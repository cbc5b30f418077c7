"""A hypervisor's own migration: what it is told before, while and after it sends or takes in a stream.

Promise: the capabilities that a way of migrating needs are set explicitly before each use, whatever an earlier
attempt left behind; nothing here ever lets a guest run. QEMU's own rules that this rests on:

- With ``pause-before-switchover`` it stops its guest and waits in ``pre-switchover``; it goes on when told to.
- A migration that fails or is cancelled resumes the guest only if the guest ran when QEMU stopped it; one that has
  completed never does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from vmferry.errors import MachineFailedError
from vmferry.machines.inspection import IGNORE_SHARED, LATE_ACTIVATE
from vmferry.machines.monitor import Monitor

PAUSE: Final = "pause-before-switchover"
SLOW_DOWN: Final = "auto-converge"
ACTIVE: Final = "active"
PAUSED: Final = "pre-switchover"
COMPLETED: Final = "completed"

_GOING_ON: Final = frozenset({"setup", ACTIVE, "device", PAUSED, "cancelling", "wait-unplug"})
_ENDED_BADLY: Final = frozenset({"failed", "cancelled", "cancelling"})
_UNFINISHED: Final = "finish-migrate"
_UNLIMITED_BYTES_PER_S: Final = 1 << 40
# With 0 QEMU would take the end of its first round for the end, without asking what was written meanwhile.
_OWN_DOWNTIME_MS: Final = 1
_LEAST_SLOW_DOWN: Final = 1
"""Its own value for as long as nobody wants more; it knows no less once it may do it at all."""
_POLL_S: Final = 0.001

Fail = Callable[[str, str], MachineFailedError]


@dataclass(frozen=True)
class StreamProgress:
    """How the hypervisor says that its stream stands."""

    status: str
    transferred_bytes: int = 0
    remaining_bytes: int = 0
    zero_pages: int = 0
    rounds: int = 0
    """How often it has collected what the guest wrote; its first round is 1."""
    throttle_percent: int = 0
    """How much of its time it takes from the guest."""


class MigrationControl:
    """The commands about migration of one hold of a machine; callers take turns."""

    def __init__(self, monitor: Monitor, fail: Fail, *, qemu: bool, disks: bool, timeout_s: float) -> None:
        self._monitor = monitor
        self._fail = fail
        self._qemu = qemu
        # A copy that has loaded its state takes its disks, and their locks, only when it is told to run.
        self._always = {LATE_ACTIVATE: True} if disks else {}
        self._timeout_s = timeout_s
        self._set: Mapping[str, bool] = {}

    @property
    def needed(self) -> list[str]:
        """The capabilities without which the machine cannot be moved."""
        return [IGNORE_SHARED, *self._always]

    async def prepare_device_state(self) -> None:
        """Keep RAM out of the stream: both ends have it in a shared file that vmferry copies itself."""
        await self._capabilities({IGNORE_SHARED: True, **({PAUSE: False} if self._qemu else {})})

    async def prepare_stream(self, *, slow_down: bool) -> None:
        """Let RAM travel in the stream, as fast as it is read, and never end by itself.

        Args:
            slow_down: whether the guest may be slowed down; how far is said by :meth:`slow_down`.
        """
        await self._capabilities({IGNORE_SHARED: False, PAUSE: True, SLOW_DOWN: slow_down})
        limits = {"max-bandwidth": _UNLIMITED_BYTES_PER_S, "downtime-limit": _OWN_DOWNTIME_MS}
        if slow_down:
            limits["cpu-throttle-initial"] = _LEAST_SLOW_DOWN
            limits |= _slow_down(_LEAST_SLOW_DOWN)
        await self._monitor.execute("migrate-set-parameters", limits, repeatable=True)

    async def slow_down(self, percent: int) -> None:
        """Let the hypervisor take so much of its time from the guest, if it writes too fast; undone at the end."""
        await self._monitor.execute("migrate-set-parameters", _slow_down(percent), repeatable=True)

    async def prepare_incoming_stream(self) -> None:
        """Take in RAM that comes in the stream."""
        await self._capabilities({IGNORE_SHARED: False})

    async def send(self, path: Path) -> None:
        """Begin to send to the socket at ``path``; this returns at once."""
        await self._monitor.execute("migrate", {"uri": f"unix:{path}"})

    async def receive(self, path: Path) -> None:
        """Listen at ``path`` for a stream."""
        await self._monitor.execute("migrate-incoming", {"uri": f"unix:{path}"})

    async def go_on(self) -> None:
        """Send the rest, for a migration that has paused by agreement."""
        await self._monitor.execute("migrate-continue", {"state": PAUSED})

    async def status(self) -> str:
        """What the hypervisor calls its state; empty if it has never migrated."""
        return str((await self._answer()).get("status", ""))

    async def completed(self, command: str) -> bool:
        """Whether the hypervisor says it is through; raises its words if it failed."""
        return self._judged(await self._answer(), command) == COMPLETED

    async def progress(self) -> StreamProgress:
        """How the stream stands; raises the hypervisor's words if it failed."""
        answer = await self._answer()
        status = self._judged(answer, "migrate")
        ram = answer.get("ram", {})
        try:
            return StreamProgress(
                status,
                transferred_bytes=int(ram.get("transferred", 0)),
                remaining_bytes=int(ram.get("remaining", 0)),
                zero_pages=int(ram.get("duplicate", 0)),
                rounds=int(ram.get("dirty-sync-count", 0)),
                throttle_percent=int(answer.get("cpu-throttle-percentage", 0)),
            )
        except (TypeError, ValueError, AttributeError) as error:
            raise self._fail("query-migrate", f"an answer without sense: {error!r}") from error

    async def end(self) -> None:
        """End whatever goes on, maybe since another process began it, and wait until it has ended."""
        try:
            async with asyncio.timeout(self._timeout_s):
                while True:
                    if await self.status() in _GOING_ON:
                        if self._qemu:
                            await self._monitor.execute("migrate_cancel", repeatable=True)
                    elif not await self._unfinished():
                        return
                    await asyncio.sleep(_POLL_S)
        except TimeoutError as error:
            raise self._fail("migrate_cancel", f"no end within {self._timeout_s:g} s") from error

    async def _unfinished(self) -> bool:
        """Whether the hypervisor, done with its migration, has yet to settle what its vCPUs do."""
        answer = await self._monitor.execute("query-status", repeatable=True)
        return isinstance(answer, dict) and answer.get("status") == _UNFINISHED

    async def _capabilities(self, way: Mapping[str, bool]) -> None:
        wanted = {**way, **self._always}
        if all(self._set.get(name) is state for name, state in wanted.items()):
            return
        await self._monitor.execute(
            "migrate-set-capabilities",
            {"capabilities": [{"capability": name, "state": state} for name, state in wanted.items()]},
            repeatable=True,
        )
        # For as long as this hold lasts: nobody else gives commands meanwhile.
        self._set = {**self._set, **wanted}

    async def _answer(self) -> dict[str, Any]:
        answer = await self._monitor.execute("query-migrate", repeatable=True)
        return answer if isinstance(answer, dict) else {}

    def _judged(self, answer: Mapping[str, Any], command: str) -> str:
        status = str(answer.get("status", ""))
        if status in _ENDED_BADLY:
            raise self._fail(command, str(answer.get("error-desc", "")) or status)
        return status


def _slow_down(percent: int) -> dict[str, int]:
    return {"max-cpu-throttle": percent, "cpu-throttle-increment": percent}
