"""The other side of a migration: a hypervisor that waits, and loads what it is sent.

Promise: a load is over when the hypervisor says that its guest stands still with all that was sent; what it says else
is raised. A connection that was opened beforehand carries one load, and the hypervisor has taken the memory for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable
from typing import Final

from vmferry.errors import MachineDeadError, MachineFailedError, VmferryError
from vmferry.machines.migrating import Fail, MigrationControl
from vmferry.machines.paths import MachinePaths
from vmferry.machines.port import RunState
from vmferry.machines.state_socket import MAX_STATE_BYTES, connected, send_all, temporary
from vmferry.memory.surgery import touch_own_memory
from vmferry.telemetry.logs import get_logger
from vmferry.together import to_the_end

_LOG: Final = get_logger(__name__)
_COMMAND: Final = "migrate-incoming"
_POLL_S: Final = 0.001
_WATCH_S: Final = 0.05
"""The guest stands still meanwhile, so only a load that takes longer is asked whether it failed."""
_SETTLES_S: Final = 0.2
"""QEMU gives back what lies unused in its heap within 60 ms of doing something: before that it would be in vain."""
_LOADED: Final = frozenset({RunState.PAUSED, RunState.PRELAUNCH})


class Loading:
    """The loads of one hold of a machine; callers take turns."""

    def __init__(
        self,
        migration: MigrationControl,
        paths: MachinePaths,
        run_state: Callable[[], Awaitable[RunState]],
        fail: Fail,
        *,
        timeout_s: float,
    ) -> None:
        self._migration = migration
        self._paths = paths
        self._run_state = run_state
        self._fail = fail
        self._timeout_s = timeout_s
        self._link: socket.socket | None = None
        self._taking: asyncio.Task[None] | None = None
        """Has the hypervisor take memory of its own; once."""

    @property
    def waits(self) -> bool:
        """The hypervisor waits at an open connection, which nothing was sent over yet."""
        return self._link is not None

    async def open(self, pid: int) -> asyncio.Task[None] | None:
        """Have the hypervisor, process ``pid``, wait at an open connection: loading is sending then.

        Returns what ends when it has taken its memory, too; None if it does not wait for a load. A load before that
        does not wait for it to begin.
        """
        if self._link is None and await self._run_state() is RunState.INMIGRATE:
            try:
                self._link = await self._waiting()
            except OSError as error:
                raise self._unreachable(error) from error
        if self._taking is None and self._link is not None:
            self._taking = asyncio.create_task(_take_memory(pid))
        return self._taking

    async def load(self, data: bytes) -> None:
        """Load a device state."""
        await self._migration.prepare_device_state()
        await self._let_alone()
        try:
            async with asyncio.timeout(self._timeout_s):
                link, self._link = self._link or await self._waiting(), None
                with link:  # until it is loaded, so that its end is never taken for a fault
                    await send_all(link, data)
                    await _hung_up(link)
                    await self._until_loaded()
        except TimeoutError as error:
            raise self._late() from error
        except OSError as error:
            raise self._unreachable(error) from error
        except MachineDeadError as error:
            raise self.refused() from error

    async def end_of_stream(self) -> None:
        """Wait until the hypervisor has loaded a stream that it was given to its end."""
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._until_loaded()
        except TimeoutError as error:
            raise self._late() from error
        except MachineDeadError as error:
            raise self.refused() from error

    def refused(self) -> MachineFailedError:
        """QEMU ends itself over a state it does not understand, and says why in its log."""
        words = f"the process ended while loading; its log ends with:\n{self._paths.log_tail()}"
        return self._fail(_COMMAND, words)

    async def close(self) -> None:
        """Close a connection that was opened and not used; more than once does no harm."""
        await self._let_alone()
        if self._link is not None:
            self._link.close()
            self._link = None

    async def _let_alone(self) -> None:
        """Have nobody do anything to the hypervisor's process from here on."""
        if self._taking is not None:
            self._taking.cancel()
            await asyncio.wait([self._taking])

    async def _waiting(self) -> socket.socket:
        path = self._paths.state_socket
        with temporary(path):
            await self._migration.receive(path)
            link = await connected(path)
        # As much as the host allows: a state that fits is handed over in one go.
        link.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MAX_STATE_BYTES)
        return link

    async def _until_loaded(self) -> None:
        loop = asyncio.get_running_loop()
        look_after = loop.time() + _WATCH_S
        while (state := await self._run_state()) is RunState.INMIGRATE:
            if loop.time() > look_after:
                await self._migration.completed(_COMMAND)
            await asyncio.sleep(_POLL_S)
        if state not in _LOADED:
            raise self._fail(_COMMAND, f"the machine is {state} after loading")

    def _unreachable(self, error: OSError) -> MachineFailedError:
        return self._fail(_COMMAND, f"its socket cannot be reached: {error}")

    def _late(self) -> MachineFailedError:
        return self._fail(_COMMAND, f"not loaded within {self._timeout_s:g} s")


async def _take_memory(pid: int) -> None:
    """Have it take the memory that it needs for loading, which else comes page by page while its guest waits."""
    await asyncio.sleep(_SETTLES_S)
    try:
        await to_the_end(asyncio.to_thread(touch_own_memory, pid))
    except (VmferryError, OSError) as error:  # that it has died is said by whoever asks it something
        _LOG.info("the hypervisor's own memory is not taken beforehand", detail=str(error))


async def _hung_up(link: socket.socket) -> None:
    """Wait until the hypervisor has hung up, which it does when it has loaded, or failed; but not for long.

    To be woken by that is sooner than to ask again and again.
    """
    with contextlib.suppress(TimeoutError, OSError):
        async with asyncio.timeout(_WATCH_S):
            await asyncio.get_running_loop().sock_recv(link, 1)
