"""Hosts as processes: the two services of each, and what machines have on it.

Promise: only processes that were started here are ever signalled, and each can be ended, killed and started again.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import grpc
import grpc.aio
import pytest

import vmferry
from vmferry.cli.machine import directory_of, run_machine
from vmferry.config import HostConfig, render_config
from vmferry.errors import VmferryError
from vmferry.handoff.ledger import HostLedger
from vmferry.machines.directory import MachineDirectory, MachineRecord
from vmferry.machines.spec import MachineSpec
from vmferry.rpc.status import from_rpc_error
from vmferry.security.identity import Identity, Kind

DOMAIN = "test.vmferry.example"
READY_S = 60.0
DEADLINE_S = 45.0
_END_S = 40.0
_TRACEBACK_LINES = 20
_SOURCES = str(Path(vmferry.__file__).parents[1])
Answer = TypeVar("Answer")


async def eventually(condition: Callable[[], Answer], what: str, *, seconds: float = DEADLINE_S) -> Answer:
    """Poll ``condition`` until it holds and return what it gave; fail naming ``what`` when the time is over."""

    async def ask() -> Answer:
        return condition()

    return await eventually_async(ask, what, seconds=seconds)


async def eventually_async(
    condition: Callable[[], Awaitable[Answer]], what: str, *, seconds: float = DEADLINE_S
) -> Answer:
    """The same for a condition that has to be awaited."""
    deadline = time.monotonic() + seconds
    while not (found := await condition()):
        if time.monotonic() > deadline:
            pytest.fail(f"{what}: not within {seconds:g} s (last seen: {found!r})")
        await asyncio.sleep(0.005)
    return found


async def refusal(call: Awaitable[object]) -> VmferryError:
    """The error that a call ends with; it must be one of the catalogue, told by the service itself."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    error = from_rpc_error(caught.value)
    assert "grpc_code" not in error.metadata, f"no named error: {caught.value}"
    return error


@dataclasses.dataclass(frozen=True)
class Place:
    """Where in the network a host is: by default on loopback, with everybody else."""

    address: str = "127.0.0.1"
    namespace: str = ""
    """The network namespace that its services and machines live in."""

    def command(self, *command: str) -> list[str]:
        """A command line, to be run there."""
        return [*(("ip", "netns", "exec", self.namespace) if self.namespace else ()), *command]


class Service:
    """One service process."""

    def __init__(self, role: str, host: Host, log: Path) -> None:
        self.role = role
        self.port = 0
        self.http = ""
        """Where its HTTP listener is: ``unix:/path``, or ``address:port``."""
        self.log = log
        self.host = host
        self.environment: dict[str, str] = {}
        """What it finds in its environment beyond what the tests have."""
        self.within: tuple[str, ...] = ()
        """A command that runs it in other surroundings."""
        self._process: asyncio.subprocess.Process | None = None

    @property
    def address(self) -> str:
        """Where it listens."""
        return f"{self.host.place.address}:{self.port}"

    @property
    def pid(self) -> int:
        """Its process."""
        assert self._process is not None
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether it was started and has not ended."""
        return self._process is not None and self._process.returncode is None

    async def start(self) -> None:
        """Start it, and return when it takes calls."""
        with self.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self.within,
                *self.host.place.command(
                    sys.executable, "-m", f"{self.role}_svc", "--config", str(self.host.config_file)
                ),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                cwd=self.log.parent,
                env=os.environ | {"PYTHONPATH": _SOURCES} | self.environment,
                start_new_session=True,
            )
        assert self._process.stdout is not None
        line = await asyncio.wait_for(self._process.stdout.readline(), READY_S)
        assert line, f"the {self.role} service of {self.host.name} did not start:\n{self.log_text()[-3000:]}"
        ready = json.loads(line)
        assert ready["service"] == self.role
        assert ready["host"] == self.host.identity.uri
        self.port = ready["port"]
        self.http = ready["http"]

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to exactly this process."""
        assert self._process is not None
        self._process.send_signal(number)

    def hold(self) -> None:
        """Let it stand still until :meth:`resume`."""
        self.signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        self.signal(signal.SIGCONT)

    async def kill(self) -> None:
        """End it without notice."""
        assert self._process is not None
        self._process.kill()
        await self._process.wait()

    async def restart(self) -> None:
        """End it in order if it runs, and start it."""
        if self.running:
            await self.stop()
        await self.start()

    async def stop(self) -> int:
        """End it in order; returns its exit code. Fails if it does not go, which nobody waits for in vain."""
        process = self._process
        assert process is not None
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            try:
                await asyncio.wait_for(process.wait(), _END_S)
            except TimeoutError:
                await self.kill()
                pytest.fail(
                    f"the {self.role} service of {self.host.name} did not end:\n{self.log_text()[-3000:]}"
                )
        assert process.returncode is not None
        return process.returncode

    def status(self, field: str) -> str:
        """A line of /proc/PID/status."""
        text = Path(f"/proc/{self.pid}/status").read_text(encoding="ascii")
        return next(line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith(field))

    def unexpected(self) -> list[str]:
        """Tracebacks in its log, except of what libraries say only when asked for everything.

        The one that talks to hypervisors also logs those of theirs that die.
        """
        lines = self.log_text().splitlines()
        return [
            "\n".join(lines[number : number + _TRACEBACK_LINES])
            for number, line in enumerate(lines)
            if "Traceback" in line
            and not (line.startswith("{") and ("/qemu/" in line or '"level": "debug"' in line))
        ]

    def log_text(self) -> str:
        """All it wrote to its log."""
        return self.log.read_text(encoding="utf-8", errors="replace")


class Host:
    """One host with both its services."""

    def __init__(
        self, name: str, config: HostConfig, config_file: Path, logs: Path, place: Place | None = None
    ) -> None:
        self.name = name
        self.place = place or Place()
        self.identity = Identity(DOMAIN, Kind.VMHOST, name)
        self.config = config
        self.config_file = config_file
        self.source = Service("source", self, logs / f"source-{name}.log")
        self.dest = Service("dest", self, logs / f"dest-{name}.log")
        self.write_config()

    def write_config(self, **settings: Any) -> None:
        """Give services that start from now on other settings; without any, its own."""
        text = render_config(dataclasses.replace(self.config, **settings))
        self.config_file.write_text(text, encoding="utf-8")

    async def run(self, spec: MachineSpec) -> MachineRecord:
        """Start a machine here, in this host's network, and let its guest run."""
        if not self.place.namespace:
            return await run_machine(spec, self.config)
        description = self.config_file.with_name(f"{spec.name}.toml")
        description.write_text(spec.to_toml(), encoding="utf-8")
        process = await asyncio.create_subprocess_exec(
            *self.place.command(sys.executable, "-m", "vmferry.cli.main", "machine", "run"),
            *(str(description), "--config", str(self.config_file)),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": _SOURCES},
        )
        _, said = await process.communicate()
        assert process.returncode == 0, said.decode()
        return self.record(spec.uuid)

    @property
    def directory(self) -> MachineDirectory:
        """Its machines."""
        return directory_of(self.config)

    @property
    def ledger(self) -> HostLedger:
        """Its journals, for reading."""
        return HostLedger(self.config.journal_dir)

    def record(self, machine_id: str) -> MachineRecord:
        """One of its machines."""
        return self.directory.find(machine_id)

    def machine_pid(self, machine_id: str) -> int:
        """The hypervisor's process, once there is one."""
        process = self.record(machine_id).process
        return process.pid if process else 0

    def holdings(self, machine: MachineSpec | None = None) -> list[str]:
        """Everything that a machine, or any machine, has on this host: folder, memory file, process."""
        folders = [self.config.machines_dir, self.config.ram_dir]
        if self.config.huge_root is not None:
            folders.append(self.config.huge_root)
        files = [path for folder in folders if folder.exists() for path in folder.iterdir()]
        processes = processes_with(str(self.config.machines_dir))
        if machine is not None:
            files = [path for path in files if path.stem in (machine.name, machine.uuid)]
            processes = [pid for pid in processes if pid in processes_with(machine.uuid)]
        return [str(path) for path in files] + [f"process {pid}" for pid in processes]


def processes_with(text: str) -> list[int]:
    """Processes whose command line contains ``text``; ended ones that nobody waited for have none."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal() and int(folder.name) != os.getpid():
            with contextlib.suppress(OSError):
                if text.encode() in (folder / "cmdline").read_bytes():
                    found.append(int(folder.name))
    return found


def descriptors(pid: int) -> list[str]:
    """What the open descriptors of a process are."""
    found = []
    for path in list(Path(f"/proc/{pid}/fd").iterdir()):
        with contextlib.suppress(FileNotFoundError):
            found.append(str(path.readlink()))
    return sorted(found)


def open_trackers(pid: int) -> list[str]:
    """Descriptors of a process that belong to write tracking, or to a memory file."""
    return [
        target
        for target in descriptors(pid)
        if "userfaultfd" in target or ".ram" in target or target.endswith("/pagemap")
    ]
