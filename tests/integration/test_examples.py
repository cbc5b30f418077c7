"""The example scheduler, as a user runs it: a program of its own against running hosts."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import pytest

import vmferry
from tests.integration.hosts import World
from tests.integration.services import Host

EXAMPLE = Path(__file__).parents[2] / "examples" / "balance.py"
BUSY = {"dirty-mib-per-s": "20", "working-set-mib": "4"}

pytestmark = pytest.mark.usefixtures("tidy")


def example() -> Any:
    """The example as a module."""
    spec = importlib.util.spec_from_file_location("balance", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["balance"] = module
    spec.loader.exec_module(module)
    return module


def place(host: Host) -> str:
    return f"{host.name}={host.identity.uri},{host.source.address},{host.dest.address}"


async def test_the_example_scheduler_evens_out_the_load_and_then_leaves_everybody_alone(world: World) -> None:
    """Two busy guests on a, none on b: one crosses, unharmed, and another round moves nothing."""
    first = await world.run(world.a, program="writer", params=BUSY)
    second = await world.run(world.a, program="writer", params=BUSY)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(EXAMPLE), "--tls", str(world.tls_dir("controller")), "--rounds", "3"),
        *("--host", place(world.a), "--host", place(world.b), "--interval-s", "0.1", "--rest-s", "0"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(Path(vmferry.__file__).parents[1])},
    )
    out, err = await process.communicate()

    assert process.returncode == 0, err.decode()
    moved = [line for line in out.decode().splitlines() if "a to b, paused for" in line]
    assert len(moved) == 1, out.decode() + err.decode()
    assert "b to a" not in out.decode()
    owners = sorted(
        next(host.name for host in (world.a, world.b) if host.ledger.rights(guest.id).permitted)
        for guest in (first, second)
    )
    assert owners == ["a", "b"]
    for guest in (first, second):
        owner = next(host for host in (world.a, world.b) if host.ledger.rights(guest.id).permitted)
        await guest.assert_clean(owner)


def test_the_example_moves_only_what_makes_the_busiest_host_calmer() -> None:
    """One busy machine alone is not sent to and fro; of two the better one goes; small differences are left."""
    balance = example()
    move = balance.choose

    assert move({"a": {"m": 50.0}, "b": {}}, least_gain=5.0) is None
    assert move({"a": {"m": 50.0, "n": 20.0}, "b": {}}, least_gain=5.0) == balance.Move("n", "a", "b")
    assert move({"a": {"m": 50.0, "n": 4.0}, "b": {}}, least_gain=5.0) is None
    assert move({"a": {}, "b": {"m": 30.0, "n": 30.0}, "c": {}}, least_gain=5.0).source == "b"
    assert move({"a": {}, "b": {}}, least_gain=5.0) is None
