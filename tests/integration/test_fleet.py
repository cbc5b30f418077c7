"""A fleet of micro-VM hosts that is updated for real: machines leave, come back, and a host that fails ends it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.integration.hosts import Guest, World, open_world
from tests.integration.services import Host, eventually
from vmferry.events.files import BoardFiles

pytestmark = [pytest.mark.timeout(240)]

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


@dataclass
class Fleet:
    """Hosts a, b and c, each with one machine, in three update domains."""

    world: World
    folder: Path
    guests: dict[str, Guest] = field(default_factory=dict)

    @property
    def log(self) -> list[str]:
        """The hosts whose software was replaced, in order."""
        path = self.folder / "log"
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
            *("[[health]]", 'kind = "grpc"'),
            *("[[health]]", 'kind = "command"', f'command = ["{self.folder}/check.sh", "{{name}}"]'),
            *("[[availability_sets]]", 'name = "web"', 'hosts = ["a", "b", "c"]'),
        ]
        for number, (name, host) in enumerate(self.world.hosts.items()):
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
        """Every machine runs where it was, undamaged, and nowhere else."""
        for name, guest in self.guests.items():
            host = self.world.hosts[name]
            assert host.ledger.rights(guest.id).permitted
            await guest.assert_clean(host)

    def at(self, guest: Guest) -> list[Host]:
        """The hosts that may run a machine."""
        return [host for host in self.world.hosts.values() if host.ledger.rights(guest.id).permitted]


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    """The three hosts, and nothing is left of them."""
    async with open_world("abc") as world:
        made = Fleet(world, tmp_path)
        for name, host in world.hosts.items():
            made.guests[name] = await world.run(host)
        made.write()
        yield made


async def test_a_host_that_fails_in_the_middle_ends_it_and_it_goes_on_when_mended(fleet: Fleet) -> None:
    """Its order is printed before; what comes behind the failure is not touched; nothing is done twice."""
    code, planned, _ = await fleet.run("--dry-run")
    assert code == 0
    assert [domain["hosts"][0]["name"] for domain in planned["order"]] == ["a", "b", "c"]
    assert fleet.log == []
    (fleet.folder / "sick-b").touch()
    code, document, said = await fleet.run()
    assert code == 1
    assert fleet.stages(document) == {"a": "done", "b": "failed", "c": "waiting"}
    assert "exit code 1" in document["halted"], said
    assert fleet.log == ["a", "b"]
    # The machine of the sick host is in safety elsewhere, and those of the others are at home.
    assert fleet.at(fleet.guests["b"]) == [fleet.world.hosts["a"]]
    assert fleet.at(fleet.guests["a"]) == [fleet.world.hosts["a"]]
    assert document["order"][1]["hosts"][0]["away"] == {fleet.guests["b"].id: "a"}
    code, document, _ = await fleet.run()
    assert (code, fleet.stages(document)["b"], fleet.log) == (1, "failed", ["a", "b"])
    (fleet.folder / "sick-b").unlink()
    code, document, said = await fleet.run()
    assert (code, document["finished"], document["halted"]) == (0, True, ""), said
    assert fleet.log == ["a", "b", "c"]
    await fleet.assert_home()
    # Each machine went away and came back, and its guest was told of both.
    for name, guest in fleet.guests.items():
        boards = [BoardFiles(host.config.events_dir).load(guest.id) for host in fleet.world.hosts.values()]
        assert len({one.event.id for board in boards for one in board.ended}) == 2, name


async def test_a_run_that_is_killed_is_gone_on_with(fleet: Fleet) -> None:
    """Killed while a host's software is being replaced; the next run replaces it, and brings its machine back.

    A host that was updated and fell sick since keeps everything else from beginning.
    """
    (fleet.folder / "hold-b").touch()
    async with fleet.running() as process:
        await eventually((fleet.folder / "held-b").exists, "host b is being updated", seconds=60)
        assert fleet.at(fleet.guests["b"]) != [fleet.world.hosts["b"]]
        process.kill()
        await process.wait()
    (fleet.folder / "hold-b").unlink()
    (fleet.folder / "sick-a").touch()
    code, document, said = await fleet.run()
    assert code == 1, said
    assert fleet.stages(document) == {"a": "done", "b": "done", "c": "waiting"}
    assert "a was updated, and is not healthy" in document["halted"]
    (fleet.folder / "sick-a").unlink()
    code, document, said = await fleet.run()
    assert (code, document["finished"]) == (0, True), said
    assert fleet.log == ["a", "b", "b", "c"]
    await fleet.assert_home()
