"""What both services do around their work: command line, logs, traces, signals, and the line that says ready.

Promise: a service says that it is ready, once, as one JSON line on its standard output, and to a service manager that
asks for it (``notify``); signals end it in order or have it reload (``lifetime``); an error at the start is one
sentence with its remedy and the catalogue's exit code.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

import grpc.aio

from vmferry import failpoints
from vmferry.config import HostConfig, load_config
from vmferry.errors import VmferryError
from vmferry.handoff.ledger import HostLedger, Role
from vmferry.machines.directory import MachineDirectory
from vmferry.memory.probe import TrackerFinding, probe_trackers
from vmferry.rpc.allocator import keep_buffers
from vmferry.rpc.lifetime import Lifetime
from vmferry.rpc.measures import measured
from vmferry.rpc.notify import Notifier
from vmferry.rpc.server import start_server
from vmferry.security.identity import Identity
from vmferry.security.material import TlsFiles
from vmferry.security.tls import server_credentials
from vmferry.telemetry import logs, tracing
from vmferry.web.app import Site
from vmferry.web.listener import serve_http
from vmferry.web.view import View

_LOG: Final = logs.get_logger(__name__)
_GRACE_S: Final = 2.0
SWITCH_INTERVAL_S: Final = 0.0005
"""How long a thread that reads or hashes memory may keep the others waiting: the guest's pause is one of them."""


@dataclass(frozen=True)
class Host:
    """What every service of a host stands on."""

    config: HostConfig
    tls: TlsFiles
    own: Identity
    """Who this host is, by its certificate."""
    ledger: HostLedger
    directory: MachineDirectory
    trackers: Sequence[TrackerFinding]
    """What was found out about write tracking here when the service started."""
    journal_broken: Callable[[VmferryError], None]
    """To be told when a journal could not be written: the service ends, it cannot vouch for its state any more."""
    views: list[View] = field(default_factory=list)
    """What the service shows of itself, for metrics and web page; a service adds itself."""


class Service(Protocol):
    """One of a host's services, as its process runs it."""

    def register(self, server: grpc.aio.Server) -> Sequence[str]:
        """Add the methods to a server; returns the full names of the gRPC services."""

    async def recover(self) -> None:
        """Go on where the journals say that an earlier process stopped; before the first call."""

    async def wind_down(self) -> int:
        """Take nothing new; returns how many migrations still run here."""

    async def stop(self) -> None:
        """Take nothing new and give back what can be given back; calls may still come."""

    async def close(self) -> None:
        """Let go of everything; no call comes any more."""


def run_daemon(role: str, ledger_role: Role, make_service: Callable[[Host], Service]) -> int:
    """Run a host's service until the process is told to stop; returns the exit code."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    keep_buffers()
    parser = argparse.ArgumentParser(
        prog=f"vmferry-{role}", description=f"The {role} service of a vmferry host."
    )
    parser.add_argument("--config", type=Path, help="configuration file of this host (TOML)")
    arguments = parser.parse_args()
    notifier = Notifier.take(os.environ)
    try:
        failpoints.activate(os.environ)
        config = load_config(arguments.config)
        tls = TlsFiles(config.tls_dir)
        own = tls.load().identity
        logs.configure(f"vmferry-{role}", host=own.name, level=config.log_level)
        finish = tracing.configure(f"vmferry-{role}", config.trace_dir, host=own.name)
        try:
            return asyncio.run(_run(role, ledger_role, make_service, config, tls, arguments.config, notifier))
        finally:
            finish()
    except VmferryError as error:
        where = f" ({error.field})" if error.field else ""
        print(f"vmferry-{role}: {error.message}{where}. {error.instance_remedy}", file=sys.stderr)  # noqa: T201
        return int(error.exit_code)


async def _run(
    role: str,
    ledger_role: Role,
    make_service: Callable[[Host], Service],
    config: HostConfig,
    tls: TlsFiles,
    config_file: Path | None,
    notifier: Notifier,
) -> int:
    failures = list[VmferryError]()
    lifetime = Lifetime(notifier, config_file, tls)

    def journal_broken(error: VmferryError) -> None:
        _LOG.critical("ending the service", reason=error.reason, detail=error.message)
        failures.append(error)
        lifetime.end_now()

    ledger = HostLedger(config.journal_dir)
    with contextlib.closing(ledger.lock_role(ledger_role)):
        host = Host(
            config,
            tls,
            tls.load().identity,
            ledger,
            MachineDirectory(
                config.machines_dir, config.ram_dir, config.huge_root, qmp_timeout_s=config.qmp_timeout_s
            ),
            await asyncio.to_thread(probe_trackers),
            journal_broken,
        )
        async with notifier.alive():
            await _serve(role, host, make_service(host), lifetime)
    return int(failures[0].exit_code) if failures else 0


async def _serve(role: str, host: Host, service: Service, lifetime: Lifetime) -> None:
    listen = host.config.source_listen if role == "source" else host.config.dest_listen
    site = Site(role, host.own.uri, host.config, host.views)
    try:
        await service.recover()
        async with serve_http(site, host.config.http_target(role)) as http, measured(host.views, host.tls):
            servers = await start_server(
                listen=listen,
                credentials=server_credentials(host.tls),
                own=host.own,
                services=service.register,
                admin_target=host.config.admin_target(role),
                role=role,
            )
            line = {"service": role, "port": servers.port, "host": host.own.uri, "http": http}
            print(json.dumps(line), flush=True)  # noqa: T201 - the one line that tells the starter it is ready
            _LOG.info("ready", port=servers.port, http=http)
            # What is there now stays; walking it again and again would hold up the one moment that matters.
            gc.collect()
            gc.freeze()
            await lifetime.until_stopped(f"{role} service of {host.own} on port {servers.port}")
            await servers.say_not_serving()
            await lifetime.wind_down(service.wind_down, host.config.stop_timeout_s)
            await service.stop()
            await servers.stop(_GRACE_S)
    finally:
        await service.close()
