"""What a service tells the service manager that started it (sd_notify): that it is ready, reloads, stops, and lives.

Promise: one datagram for each message, to the socket that the environment names, and nothing at all where none is
named. The watchdog is fed by the event loop itself: a loop that hangs starves it, and the manager starts the service
anew, which leaves machines alone. What was started by this process never finds the socket in its environment.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import AsyncIterator, MutableMapping
from typing import Final, Self

from vmferry.telemetry.logs import get_logger

_LOG: Final = get_logger(__name__)
_US: Final = 1_000_000
_VARIABLES: Final = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")


class Notifier:
    """The way to the service manager, if there is one."""

    def __init__(self, address: str = "", watchdog_s: float = 0.0) -> None:
        self._address = f"\0{address[1:]}" if address.startswith("@") else address
        self._watchdog_s = watchdog_s

    @classmethod
    def take(cls, environment: MutableMapping[str, str]) -> Self:
        """Read the variables that a service manager sets, and remove them."""
        address, microseconds, pid = (environment.pop(name, "") for name in _VARIABLES)
        meant = pid in ("", str(os.getpid())) and microseconds.isdecimal()
        return cls(address, int(microseconds) / _US if meant else 0.0)

    def ready(self, status: str) -> None:
        """The service takes calls; also said after each reload."""
        self._tell("READY=1", f"STATUS={status}")

    def reloading(self) -> None:
        """Certificates and settings are being read again."""
        # The time is what Type=notify-reload of newer managers tells the answer to its signal by.
        self._tell("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self, status: str, within_s: float) -> None:
        """The service takes nothing new, and has not stopped within ``within_s`` only if something is wrong."""
        self._tell("STOPPING=1", f"STATUS={status}", f"EXTEND_TIMEOUT_USEC={int(within_s * _US)}")

    @contextlib.asynccontextmanager
    async def alive(self) -> AsyncIterator[None]:
        """Feed the watchdog meanwhile, if there is one."""
        feeding = asyncio.create_task(self._feed()) if self._address and self._watchdog_s else None
        try:
            yield
        finally:
            if feeding is not None:
                feeding.cancel()
                await asyncio.gather(feeding, return_exceptions=True)

    async def _feed(self) -> None:
        while True:
            self._tell("WATCHDOG=1")
            await asyncio.sleep(self._watchdog_s / 3)

    def _tell(self, *lines: str) -> None:
        if not self._address:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
            channel.setblocking(False)  # a manager that does not read must not stop a service
            try:
                channel.sendto("\n".join(lines).encode(), self._address)
            except OSError as error:
                _LOG.warning("the service manager cannot be told", lines=list(lines), error=str(error))
