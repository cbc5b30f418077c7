"""A service's life between its first call and its last: signals, reloading, and the time it takes to stop.

Promise: SIGTERM or SIGINT ends the service in order, a second one without waiting for running migrations. SIGHUP
reads the certificates and the log level again; what is unusable changes nothing and is said in the log and to the
service manager. Told to stop, a service takes nothing new, and waits ``stop_timeout_s`` for the migrations that run.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

from vmferry.config import load_config
from vmferry.errors import VmferryError
from vmferry.rpc.notify import Notifier
from vmferry.security.material import TlsFiles
from vmferry.telemetry import logs

_LOG: Final = logs.get_logger(__name__)
_LOOK_S: Final = 0.2
_GIVING_BACK_S: Final = 60.0
"""What the service manager is told to grant for giving machines back, beyond what migrations are waited for."""


class Lifetime:
    """When a service is to end, and what it is told meanwhile."""

    def __init__(self, notifier: Notifier, config_file: Path | None, tls: TlsFiles) -> None:
        self._notifier = notifier
        self._config_file = config_file
        self._tls = tls
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._status = ""
        self._reloads: set[asyncio.Task[None]] = set()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._asked_to_stop)
        loop.add_signal_handler(signal.SIGHUP, self._asked_to_reload)

    def end_now(self) -> None:
        """End the service without waiting for anything: it cannot vouch for its state any more."""
        self._hurry.set()
        self._stop.set()

    async def until_stopped(self, status: str) -> None:
        """The service is ready: say so, and return when it is to end."""
        self._status = status
        self._notifier.ready(status)
        await self._stop.wait()

    async def wind_down(self, count_running: Callable[[], Awaitable[int]], within_s: float) -> None:
        """Wait until nothing runs any more, for so long at most, or until the service is told again."""
        deadline = asyncio.get_running_loop().time() + within_s
        _LOG.info("stopping", running=await count_running(), within_s=within_s)
        while True:
            running = await count_running()
            self._notifier.stopping(f"stopping; {running} migrations still run", within_s + _GIVING_BACK_S)
            left_s = deadline - asyncio.get_running_loop().time()
            if not running or left_s <= 0 or self._hurry.is_set():
                return
            # Not wait_for, which before Python 3.12 may lose a cancellation.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(left_s, _LOOK_S)):
                    await self._hurry.wait()

    def _asked_to_stop(self) -> None:
        if self._stop.is_set():
            self._hurry.set()
        self._stop.set()

    def _asked_to_reload(self) -> None:
        task = asyncio.create_task(self._reload(), name="reload")
        self._reloads.add(task)
        task.add_done_callback(self._reloads.discard)

    async def _reload(self) -> None:
        self._notifier.reloading()
        try:
            material, config = await asyncio.to_thread(
                lambda: (self._tls.load(), load_config(self._config_file))
            )
        except VmferryError as error:
            _LOG.error("not reloaded, all stays as it was", field=error.field, error=error.message)
            self._notifier.ready(f"{self._status}; not reloaded: {error.message}")
            return
        logs.set_level(config.log_level)
        until = f"{material.not_after:%Y-%m-%dT%H:%M:%SZ}"
        # New connections use what the files hold by themselves; this tells that it can be used.
        _LOG.info("reloaded", log_level=config.log_level, certificate_not_after=until)
        self._notifier.ready(f"{self._status}; certificate until {until}")
