"""A fleet of micro-VM hosts that is updated for real: machines leave, come back, and a host that fails ends it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import sys
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.integration.hosts import Guest, World, open_world
from tests.integration.services import Host, eventually
from vmferry.drain.record import DrainFile
from vmferry.errors import ConfigError
from vmferry.events import policy
from vmferry.events.files import BoardFiles
from vmferry.machines.beside import paths_beside
from vmferry.machines.paths import MAX_SOCKET_PATH_BYTES, MachinePaths

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


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    """Hosts a, b and c in three update domains, with a machine each."""
    async with open_world("abc", **SETTINGS) as world:
        made = Fleet(world, tmp_path, {"a": 0, "b": 1, "c": 2}, sets={"web": ["a", "b", "c"]})
        for name, host in world.hosts.items():
            made.guests[name] = [await world.run(host)]
        made.write()
        yield made


async def test_a_host_that_fails_in_the_middle_ends_it_and_it_goes_on_when_mended(fleet: Fleet) -> None:
    """Its order is printed before; what comes behind the failure is not touched; nothing is done twice."""
    code, planned, _ = await fleet.run("--dry-run")
    assert code == 0
    assert [domain["hosts"][0]["name"] for domain in planned["order"]] == ["a", "b", "c"]
    machines = [domain["hosts"][0]["machines"] for domain in planned["order"]]
    assert [(one["id"], one["in_place"]) for (one,) in machines] == [
        (guest.id, False) for (guest,) in fleet.guests.values()
    ]
    assert fleet.log == []
    (fleet.folder / "sick-b").touch()
    code, document, said = await fleet.run()
    assert code == 1
    assert fleet.stages(document) == {"a": "done", "b": "failed", "c": "waiting"}
    assert "exit code 1" in document["halted"], said
    assert fleet.log == ["a", "b"]
    # The machine of the sick host is in safety elsewhere, that takes no newcomers; those of the others are at home.
    (guest,) = fleet.guests["b"]
    assert fleet.at(guest) == [fleet.world.hosts["a"]]
    assert DrainFile(fleet.world.hosts["b"].config.state_dir).draining
    assert fleet.at(fleet.guests["a"][0]) == [fleet.world.hosts["a"]]
    assert document["order"][1]["hosts"][0]["away"] == {guest.id: "a"}
    code, document, _ = await fleet.run()
    assert (code, fleet.stages(document)["b"], fleet.log) == (1, "failed", ["a", "b"])
    (fleet.folder / "sick-b").unlink()
    code, document, said = await fleet.run()
    assert (code, document["finished"], document["halted"]) == (0, True, ""), said
    assert fleet.log == ["a", "b", "c"]
    await fleet.assert_home()
    # Each machine went away and came back, and its guest was told of both.
    for (guest,) in fleet.guests.values():
        assert fleet.told(guest) == [policy.MIGRATION] * 2


async def test_machines_stay_that_can_and_the_others_leave(fleet: Fleet) -> None:
    """In place where the host says that it can be, away and back where not; the dry run says so of each, and why."""
    fleet.how = ["in_place = true"]
    fleet.write()
    rigid = await fleet.rigid("b")
    before = {
        guest.id: fleet.world.hosts[name].machine_pid(guest.id) for name, (guest,) in fleet.guests.items()
    }
    fleet.guests["b"].append(rigid)
    code, planned, said = await fleet.run("--dry-run")
    assert code == 0, said
    listed = {one["id"]: one for domain in planned["order"] for one in domain["hosts"][0]["machines"]}
    assert {machine: one["in_place"] for machine, one in listed.items()} == dict.fromkeys(before, True) | {
        rigid.id: False
    }
    assert "update.no-place" in listed[rigid.id]["why"]
    (fleet.folder / "hold-b").touch()
    async with fleet.running() as process:
        await eventually((fleet.folder / "held-b").exists, "host b is being updated", seconds=60)
        b = fleet.world.hosts["b"]
        assert fleet.at(fleet.guests["b"][0]) == [b]
        assert fleet.at(rigid) == [fleet.world.hosts["a"]]
        process.kill()
        await process.wait()
    (fleet.folder / "hold-b").unlink()
    code, document, said = await fleet.run()
    assert (code, document["finished"]) == (0, True), said
    assert fleet.log == ["a", "b", "b", "c"]
    await fleet.assert_home()
    for name, guests in fleet.guests.items():
        assert fleet.world.hosts[name].machine_pid(guests[0].id) != before[guests[0].id]
        assert fleet.told(guests[0]) == [policy.MAINTENANCE]
    assert fleet.told(rigid) == [policy.MIGRATION] * 2


async def test_a_run_that_is_killed_is_gone_on_with(fleet: Fleet) -> None:
    """Killed while a host's software is being replaced; the next run replaces it, and brings its machine back.

    A host that was updated and fell sick since keeps everything else from beginning.
    """
    (fleet.folder / "hold-b").touch()
    async with fleet.running() as process:
        await eventually((fleet.folder / "held-b").exists, "host b is being updated", seconds=60)
        assert fleet.at(fleet.guests["b"][0]) != [fleet.world.hosts["b"]]
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


async def test_a_host_whose_services_are_dead(fleet: Fleet) -> None:
    """Machines of others go elsewhere, its own turn ends the update, and its machine never notices anything."""
    dead = fleet.world.hosts["c"]
    await asyncio.gather(dead.source.kill(), dead.dest.kill())
    code, planned, said = await fleet.run("--dry-run")
    assert code == 0, said
    assert "cannot be asked" in planned["order"][2]["hosts"][0]["problem"]
    code, document, said = await fleet.run()
    assert code == 1
    assert fleet.stages(document) == {"a": "done", "b": "done", "c": "failed"}, said
    assert document["halted"].startswith("c: "), said
    assert fleet.log == ["a", "b"]
    await fleet.assert_home()


@pytest.mark.parametrize("seed", [7])
async def test_a_random_plan_with_a_host_that_fails(tmp_path: Path, seed: int) -> None:
    """Executed with real machines, killed at random, and with a host that fails in a random way until it is mended.

    By the journal and by what the commands noted, no two domains of a set were ever down together.
    """
    choose = random.Random(seed)
    domains = dict(zip("abcd", choose.sample([0, 0, 1, choose.choice([1, 2])], 4), strict=True))
    async with open_world("abcd", **SETTINGS) as world:
        pairs = [[one, other] for one in "abcd" for other in "abcd" if domains[one] < domains[other]]
        fleet = Fleet(world, tmp_path, domains, ["in_place = true", f"parallel = {choose.randint(1, 2)}"])
        fleet.sets = {f"s{number}": hosts for number, hosts in enumerate(choose.sample(pairs, 2))}
        fleet.guests = {name: [await world.run(host)] for name, host in world.hosts.items()}
        moves = choose.choice("abcd")
        fleet.guests[moves].append(await fleet.rigid(moves))
        fleet.write()
        failing, how = choose.choice("abcd"), choose.choice(["broken", "sick"])
        (tmp_path / f"{how}-{failing}").touch()
        document: Any = {"finished": False}
        for _ in range(12):
            await _killed_at(fleet, choose.randint(2, 25))
            code, document, said = await fleet.run()
            if code:
                assert failing in document["halted"], said
                assert fleet.stages(document)[failing] == "failed"
                (tmp_path / f"{how}-{failing}").unlink()
            if document["finished"]:
                break
        assert document["finished"]
        assert set(fleet.log) == set("abcd")
        await fleet.assert_home()
        _never_two_domains(fleet)


async def _killed_at(fleet: Fleet, lines: int) -> None:
    """Run it, and kill it once its journal has so many more lines, unless it ends before."""
    path = fleet.folder / "plan.journal"

    def written() -> int:
        return path.read_bytes().count(b"\n") if path.exists() else 0

    begun = written()
    async with fleet.running() as process:
        await eventually(
            lambda: written() >= begun + lines or process.returncode is not None, "it gets on", seconds=90
        )
        if process.returncode is None:
            process.kill()


def _never_two_domains(fleet: Fleet) -> None:
    """Told from the journal's lines alone, without the code that wrote them."""
    down: set[str] = set()
    for line in (fleet.folder / "plan.journal").read_text().splitlines()[1:]:
        said = json.loads(line)
        down.add(said["host"])
        for hosts in fleet.sets.values():
            assert len({fleet.domains[name] for name in hosts if name in down}) <= 1, said
        if said["kind"] == "done":
            down.discard(said["host"])
    assert not down
    # A command began only when those before it in other domains had ended, or were killed and begun again.
    order = fleet.log
    first = {name: order.index(name) for name in "abcd"}
    last = {name: len(order) - 1 - order[::-1].index(name) for name in "abcd"}
    for one in "abcd":
        for other in "abcd":
            if fleet.domains[one] < fleet.domains[other]:
                assert last[one] < first[other], order
