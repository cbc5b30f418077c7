"""Two hosts on this computer, to show and to try things: real services with real certificates, on loopback.

Promise: everything that was started is ended, and every file is removed, however the demonstration ends; only what
``keep`` asks for stays. Nothing outside of these folders is touched.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from vmferry.cli.machine import directory_of
from vmferry.cli.output import say
from vmferry.config import HostConfig, render_config
from vmferry.errors import (
    InsufficientMemoryError,
    InvalidArgumentError,
    MachineFailedError,
    ServiceStoppingError,
    VmferryError,
)
from vmferry.machines.launcher import stop_machine
from vmferry.security.authority import init_authority, issue
from vmferry.security.identity import Identity, Kind

TRUST_DOMAIN: Final = "demo.vmferry.example"

SHARED_MEMORY: Final = Path("/dev/shm")  # noqa: S108 - guest memory belongs on tmpfs; our folder there is private
_READY_S: Final = 60.0
_END_S: Final = 15.0
_KILL_S: Final = 5.0
_TAIL_BYTES: Final = 4096
_MIB: Final = 1024 * 1024


@dataclass(frozen=True)
class Ports:
    """Where the services of one host listen; 0 is any free port."""

    source: int = 0
    dest: int = 0
    source_http: int | None = None
    """Where the source's page is; by default on a socket that a browser cannot reach."""
    dest_http: int | None = None

    def with_pages(self, config: HostConfig) -> HostConfig:
        """The configuration with the pages where they are wanted."""
        if self.source_http is not None:
            config = replace(config, source_http_listen=f"127.0.0.1:{self.source_http}")
        if self.dest_http is not None:
            config = replace(config, dest_http_listen=f"127.0.0.1:{self.dest_http}")
        return config


ANY_PORTS: Final = MappingProxyType({"a": Ports(), "b": Ports()})


@dataclass(frozen=True)
class Place:
    """Where in the network a host is: by default on loopback, with everybody else."""

    listen: str = "127.0.0.1"
    reached_at: str = "127.0.0.1"
    """Its address for those who give orders."""
    data_at: str = "127.0.0.1"
    """Its address for the other host."""
    within: tuple[str, ...] = ()
    """A command that runs others there."""


HERE: Final = Place()
ALL_HERE: Final = MappingProxyType({"a": HERE, "b": HERE})


class Service:
    """One service process of a host."""

    def __init__(self, role: str, host: DemoHost, log: Path) -> None:
        self.name = f"{role}-{host.name}"
        self.port = 0
        self.log = log
        self._module = {"source": "source_svc", "dest": "dest_svc"}[role]
        self._host = host
        self._at = {"source": host.place.reached_at, "dest": host.place.data_at}[role]
        self._process: asyncio.subprocess.Process | None = None

    @property
    def address(self) -> str:
        """Where those who have business with it find it."""
        return f"{self._at}:{self.port}"

    @property
    def pid(self) -> int:
        """Its process, which was started."""
        assert self._process is not None
        return self._process.pid

    async def start(self) -> None:
        """Start it, and return when it takes calls.

        Raises:
            ServiceStoppingError: it ended at once, or said nothing in time.
        """
        with self.log.open("wb") as log:
            # A session of its own: Ctrl-C is for the demonstration, which ends its services in order.
            self._process = await asyncio.create_subprocess_exec(
                *self._host.place.within,
                *(sys.executable, "-m", self._module, "--config", str(self._host.config_file)),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
        assert self._process.stdout is not None
        try:
            async with asyncio.timeout(_READY_S):
                line = await self._process.stdout.readline()
            self.port = int(json.loads(line)["port"])
        except (TimeoutError, ValueError, KeyError, TypeError) as error:
            raise ServiceStoppingError(
                f"the service {self.name} did not start", remedy=f"Its log says:\n{self.log_tail()}"
            ) from error

    def peak_rss_mib(self) -> float:
        """The most memory it ever had resident, guest memory that it mapped included."""
        for line in Path(f"/proc/{self.pid}/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return round(int(line.split()[1]) / 1024, 1)
        raise ServiceStoppingError(f"the service {self.name} has ended")

    async def stop(self) -> None:
        """End it; by force if it does not go."""
        process = self._process
        if process is None:
            return
        for send, patience_s in ((process.terminate, _END_S), (process.kill, _KILL_S)):
            if process.returncode is not None:
                break
            with contextlib.suppress(ProcessLookupError):
                send()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), patience_s)

    def log_tail(self) -> str:
        """The last lines of its log."""
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
                return file.read().decode("utf-8", errors="replace").strip()
        except FileNotFoundError:
            return ""


@dataclass(frozen=True)
class DemoHost:
    """One host, with both its services."""

    name: str
    identity: Identity
    config: HostConfig
    config_file: Path
    place: Place = HERE


@dataclass(frozen=True)
class Shore:
    """A host together with its running services."""

    host: DemoHost
    source: Service
    dest: Service


@dataclass(frozen=True)
class TwoHosts:
    """All there is in a demonstration."""

    a: Shore
    b: Shore
    admin_tls: Path
    trace_dir: Path
    images: Path
    """Where the files of QEMU machines may lie; removed at the end."""

    @property
    def services(self) -> tuple[Service, ...]:
        """All four."""
        return (self.a.source, self.b.dest, self.b.source, self.a.dest)

    async def stop_services(self) -> None:
        """End all services, which write out what they still hold; machines live on."""
        await asyncio.gather(*(service.stop() for service in self.services))


@contextlib.asynccontextmanager
async def two_hosts(
    keep: Path | None,
    *,
    ports: Mapping[str, Ports] = ANY_PORTS,
    places: Mapping[str, Place] = ALL_HERE,
    settings: Mapping[str, Any] = MappingProxyType({}),
    own_settings: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
    option: str = "--keep",
    memory: Path = SHARED_MEMORY,
) -> AsyncIterator[TwoHosts]:
    """Hosts ``a`` and ``b`` with running services; ended and removed afterwards.

    Args:
        keep: folder for certificates, configurations, journals, traces and logs, which stay.
        ports: where each host's services listen; any free port by default.
        places: where in the network the hosts are.
        settings: what else both hosts are configured to.
        own_settings: the same, of one host, by its name.
        option: what the caller names the folder by.
        memory: where guest memory is made.
    """
    with _folders(keep, option, memory) as (files, run, ram):
        chosen = {name: {**settings, **own_settings.get(name, {})} for name in ("a", "b")}
        a, b = (_shore(host, files / "logs") for host in _prepare(files, run, ram, ports, places, chosen))
        world = TwoHosts(
            a, b, admin_tls=files / "tls" / "operator", trace_dir=files / "traces", images=run / "images"
        )
        try:
            await _start(world.services)
            yield world
        except VmferryError:
            show_logs(world)
            raise
        finally:
            await _clean_up(world)


def show_logs(world: TwoHosts) -> None:
    """Show the last lines that each service wrote to its log."""
    for service in world.services:
        tail = service.log_tail()
        if tail:
            say(f"--- the last lines of {service.name} ---\n{tail}")


def shared_memory_bytes() -> int:
    """What this computer has for guests."""
    return shutil.disk_usage(SHARED_MEMORY).free


def require_memory(machine_bytes: int, resident_bytes: int) -> None:
    """Refuse what this computer's shared memory cannot hold, before a guest meets the end of it.

    Raises:
        InsufficientMemoryError: with what there is.
    """
    free = shared_memory_bytes()
    # The destination takes all of its memory beforehand, and both hosts are this computer.
    needed = machine_bytes + resident_bytes
    if needed > free:
        raise InsufficientMemoryError(
            f"{SHARED_MEMORY} has {free // _MIB} MiB free, and the demonstration needs {needed // _MIB} MiB",
            field="--memory-mib",
            remedy="Ask for a smaller machine, or make /dev/shm larger (in a container: docker run --shm-size).",
        )


@contextlib.contextmanager
def _folders(keep: Path | None, option: str, memory: Path) -> Iterator[tuple[Path, Path, Path]]:
    with contextlib.ExitStack() as stack:
        # Sockets have short paths, so what runs is never below the folder to keep.
        run = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vmferry-demo-")))
        ram = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vmferry-demo-", dir=memory)))
        files = run / "files" if keep is None else _empty(keep.absolute(), option)
        (run / "images").mkdir(mode=0o700)
        for folder in ("logs", "tls", "traces"):
            (files / folder).mkdir(mode=0o700, parents=True, exist_ok=True)
        yield files, run, ram


def _empty(folder: Path, option: str) -> Path:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not any(folder.iterdir()):
            return folder
    except OSError as error:
        raise InvalidArgumentError(f"cannot use {folder}: {error.strerror}", field=option) from error
    raise InvalidArgumentError(
        f"{folder} is not empty",
        field=option,
        remedy=f"Remove it, unless what it belongs to still runs, or name another one by {option}.",
    )


def _prepare(
    files: Path,
    run: Path,
    ram: Path,
    ports: Mapping[str, Ports],
    places: Mapping[str, Place],
    settings: Mapping[str, Mapping[str, Any]],
) -> list[DemoHost]:
    authority = files / "tls" / "authority"
    init_authority(authority, TRUST_DOMAIN)
    issue(authority, Identity(TRUST_DOMAIN, Kind.ADMIN, "operator"), files / "tls" / "operator")
    hosts = []
    for name in settings:
        identity = Identity(TRUST_DOMAIN, Kind.VMHOST, name)
        issue(authority, identity, files / "tls" / name)
        config = HostConfig(
            tls_dir=files / "tls" / name,
            state_dir=files / "state" / name,
            run_dir=run / name,
            ram_dir=ram / name,
            trace_dir=files / "traces",
            source_listen=f"{places[name].listen}:{ports[name].source}",
            dest_listen=f"{places[name].listen}:{ports[name].dest}",
            image_roots=(run / "images",),
            **settings[name],
        )
        config = ports[name].with_pages(config)
        for folder in (config.state_dir, config.run_dir, config.ram_dir):
            folder.mkdir(mode=0o700, parents=True)
        config_file = files / f"host-{name}.toml"
        config_file.write_text(render_config(config), encoding="utf-8")
        hosts.append(DemoHost(name, identity, config, config_file, places[name]))
    return hosts


def _shore(host: DemoHost, logs: Path) -> Shore:
    source, dest = (Service(role, host, logs / f"{role}-{host.name}.log") for role in ("source", "dest"))
    return Shore(host, source, dest)


async def _start(services: tuple[Service, ...]) -> None:
    # All are waited for, so that none is still being started when the first failure ends the demonstration.
    outcomes = await asyncio.gather(*(service.start() for service in services), return_exceptions=True)
    for outcome in outcomes:
        if outcome is not None:
            raise outcome


async def _clean_up(world: TwoHosts) -> None:
    await world.stop_services()
    for shore in (world.a, world.b):
        directory = directory_of(shore.host.config)
        for record in directory.list():
            if record.alive:
                with contextlib.suppress(MachineFailedError):
                    await stop_machine(directory.open(record), directory)
