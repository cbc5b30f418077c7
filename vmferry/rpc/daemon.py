"""What both services do around their work: command line, logs, traces, signals, and the line that says ready.

Promise: a service says that it is ready, once, as one JSON line on its standard output; SIGTERM and SIGINT end it in
order; an error at the start is one sentence with its remedy and the catalogue's exit code.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from vmferry.config import HostConfig, load_config
from vmferry.errors import ExitCode, VmferryError
from vmferry.rpc.server import RunningServers
from vmferry.security.identity import Identity
from vmferry.security.material import TlsFiles
from vmferry.telemetry import logs, tracing

_LOG: Final = logs.get_logger(__name__)


@dataclass
class Daemon:
    """A running service, as its work sees it."""

    role: str
    config: HostConfig
    tls: TlsFiles
    own: Identity
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    exit_code: int = 0

    def broken(self, error: VmferryError) -> None:
        """End the service: it cannot vouch for its journals any more."""
        _LOG.critical("ending the service", reason=error.reason, detail=error.message)
        self.exit_code = int(error.exit_code)
        self.stop.set()

    def ready(self, servers: RunningServers) -> None:
        """Tell whoever started the service where it listens."""
        line = {"service": self.role, "port": servers.port, "host": self.own.uri}
        print(json.dumps(line), flush=True)  # noqa: T201 - the one line of output
        _LOG.info("ready", port=servers.port)


Serve = Callable[[Daemon], Awaitable[None]]


def run_daemon(role: str, serve: Serve) -> int:
    """Run ``serve`` until it ends or the process is told to stop; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog=f"vmferry-{role}", description=f"The {role} service of a vmferry host."
    )
    parser.add_argument("--config", type=Path, help="configuration file of this host (TOML)")
    arguments = parser.parse_args()
    try:
        config = load_config(arguments.config)
        tls = TlsFiles(config.tls_dir)
        own = tls.load().identity
        logs.configure(f"vmferry-{role}", host=own.name, level=config.log_level)
        finish = tracing.configure(f"vmferry-{role}", config.trace_dir, host=own.name)
        try:
            return asyncio.run(_run(Daemon(role, config, tls, own), serve))
        finally:
            finish()
    except VmferryError as error:
        where = f" ({error.field})" if error.field else ""
        print(f"vmferry-{role}: {error.message}{where}. {error.instance_remedy}", file=sys.stderr)  # noqa: T201
        return int(error.exit_code or ExitCode.FAILED)


async def _run(daemon: Daemon, serve: Serve) -> int:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, daemon.stop.set)
    await serve(daemon)
    return daemon.exit_code
