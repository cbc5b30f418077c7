"""A fleet of micro-VM hosts that is updated for real: machines leave, come back, and a host that fails ends it."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.fleets import SETTINGS, Fleet
from tests.integration.hosts import open_world
from tests.integration.services import eventually
from vmferry.drain.record import DrainFile
from vmferry.events import policy

pytestmark = [pytest.mark.timeout(240)]


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
