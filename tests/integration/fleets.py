"""A fleet of hosts with machines, the plan for its update, and what its commands have noted."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.integration.hosts import Guest, World
from tests.integration.services import Host
from vmferry.drain.record import DrainFile
from vmferry.errors import ConfigError
from vmferry.events.files import BoardFiles
from vmferry.machines.beside import paths_beside
from vmferry.machines.paths import MAX_SOCKET_PATH_BYTES, MachinePaths

UPDATE = """\
#!/bin/sh
# Stands for what replaces a host's software: notes that it ran, and fails or waits where a file says so.
echo "$1" >>log
while [ -e "hold-$1" ]; do touch "held-$1"; sleep 0.05; done
[ ! -e "broken-$1" ]
"""
CHECK = """\
#!/bin/sh
[ ! -e "sick-$1" ]
"""
SETTINGS = {"drain_look_s": 1.0, "drain_retry_s": 0.5, "drain_measure_s": 0.5, "reconnect_timeout_s": 1.0}


@dataclass
class Fleet:
    """Hosts with machines, and a plan for them."""

    world: World
    folder: Path
    domains: dict[str, int]
    """The update domain of each host."""
    how: list[str] = field(default_factory=list)
    """Lines of the plan's table [update]."""
    sets: dict[str, list[str]] = field(default_factory=dict)
    guests: dict[str, list[Guest]] = field(default_factory=dict)

    @property
    def log(self) -> list[str]:
        """The hosts whose software was replaced, in order."""
        return self.read("log")

    def read(self, name: str) -> list[str]:
        """What a command has noted."""
        path = self.folder / name
        return path.read_text().split() if path.exists() else []

    def write(self) -> None:
        """The plan and its commands."""
        for name, text in (("update.sh", UPDATE), ("check.sh", CHECK)):
            (self.folder / name).write_text(text)
            (self.folder / name).chmod(0o755)
        lines = [
            "[update]",
            f'command = ["{self.folder}/update.sh", "{{name}}"]',
            "health_timeout_s = 1",
            "patience_s = 5",
            *self.how,
            *("[[health]]", 'kind = "grpc"'),
            *("[[health]]", 'kind = "command"', f'command = ["{self.folder}/check.sh", "{{name}}"]'),
        ]
        for name, hosts in self.sets.items():
            lines += ["[[availability_sets]]", f'name = "{name}"', f"hosts = {json.dumps(hosts)}"]
        for name, number in self.domains.items():
            host = self.world.hosts[name]
            lines += [
                "[[hosts]]",
                f'name = "{name}"',
                f'host = "{host.identity.uri}"',
                f'source = "{host.source.address}"',
                f'destination = "{host.dest.address}"',
                f"update_domain = {number}",
            ]
        (self.folder / "plan.toml").write_text("\n".join(lines) + "\n")

    @contextlib.asynccontextmanager
    async def running(self, *options: str) -> AsyncIterator[asyncio.subprocess.Process]:
        """The command, as an operator runs it; killed at the end if it has not ended."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "vmferry.cli.main", "fleet", "update", "--plan", "plan.toml"),
            *("--tls", str(self.world.tls_dir("controller")), *options),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            cwd=self.folder,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        )
        try:
            yield process
        finally:
            if process.returncode is None:
                process.kill()
            await process.communicate()

    async def run(self, *options: str) -> tuple[int, Any, str]:
        """Run it to its end: exit code, document, and what it said."""
        async with self.running("--json", *options) as process:
            out, said = await process.communicate()
        assert process.returncode is not None
        assert b"Traceback" not in said, said
        return process.returncode, json.loads(out) if out else None, said.decode()

    def stages(self, document: Any) -> dict[str, str]:
        """How far each host has come."""
        return {one["name"]: one["stage"] for domain in document["order"] for one in domain["hosts"]}

    async def assert_home(self) -> None:
        """Every machine runs where it was, undamaged, and nowhere else; every host takes newcomers."""
        for name, guests in self.guests.items():
            host = self.world.hosts[name]
            assert not DrainFile(host.config.state_dir).draining
            for guest in guests:
                assert self.at(guest) == [host]
                await guest.assert_clean(host)

    def at(self, guest: Guest) -> list[Host]:
        """The hosts that may run a machine."""
        return [host for host in self.world.hosts.values() if host.ledger.rights(guest.id).permitted]

    def told(self, guest: Guest) -> list[str]:
        """What a guest was told, in all."""
        boards = [BoardFiles(host.config.events_dir).load(guest.id) for host in self.world.hosts.values()]
        return list({one.event.id: one.event.description for board in boards for one in board.ended}.values())

    async def rigid(self, name: str) -> Guest:
        """A machine that cannot be updated in place: its sockets' paths leave no room for another folder."""
        host = self.world.hosts[name]
        length = next(
            number
            for number in range(20, 64)
            if len(os.fsencode(_paths(host, "r" * number).state_socket)) == MAX_SOCKET_PATH_BYTES
        )
        with pytest.raises(ConfigError):
            paths_beside(_paths(host, "r" * length))
        return await self.world.run(host, name=f"r{uuid.uuid4().hex}".ljust(length, "r"))


def _paths(host: Host, name: str) -> MachinePaths:
    return MachinePaths.of(host.directory.root, host.directory.ram_root, name=name, uuid=str(uuid.uuid4()))
