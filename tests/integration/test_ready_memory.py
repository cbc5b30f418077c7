"""Machines that arrive where memory is kept ready for them, and the measurement that uses it."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys

from tests.integration.hosts import Host, World, eventually, open_world
from vmferry.machines import readymemory
from vmferry.security.tls import open_channel
from vmferry.v1 import compatibility_pb2, handoff_pb2, handoff_pb2_grpc

MIB = 1024 * 1024


async def until_ready(host: Host, size_mib: int) -> None:
    """Wait until a host has a file of that size ready."""
    folder = host.config.ram_dir
    await eventually(lambda: readymemory.ready_files(folder) == [size_mib], "memory is ready")


async def offer(world: World) -> compatibility_pb2.HostOffer:
    """What host b offers."""
    async with open_channel(world.b.dest.address, world.b.identity, world.material("a")) as channel:
        stub = handoff_pb2_grpc.DestinationServiceStub(channel)
        return (await stub.Negotiate(handoff_pb2.NegotiateRequest(), timeout=20)).offer


async def test_machines_go_back_and_forth_over_memory_that_was_ready() -> None:
    """Each crossing takes the file that was kept, which held nobody's memory; the offer says what there is."""
    async with open_world(ready_memory_mib=(32,)) as world:
        guest = await world.run(memory_mib=32)
        here, there = world.a, world.b
        for _ in range(3):
            await until_ready(there, 32)
            (kept,) = (there.config.ram_dir / readymemory.FOLDER).glob("*.ready")
            number = kept.stat().st_ino
            if there is world.b:
                said = await offer(world)
                assert said.ready_memory_bytes == 32 * MIB
                assert said.available_memory_bytes > 32 * MIB
            await world.assert_crosses(guest, here, there)
            ram = there.directory.paths(guest.spec).ram
            assert ram.stat().st_ino == number
            assert ram.stat().st_blocks * 512 == 32 * MIB
            here, there = there, here
        for host in (world.a, world.b):
            await host.dest.stop()
            assert not (host.config.ram_dir / readymemory.FOLDER).exists()


async def test_the_bench_pumps_and_migrates() -> None:
    """``vmferry bench transport`` prints one document with the rate of the bare pump and what is made of it."""
    command = [sys.executable, "-c", "from vmferry.cli.main import main; raise SystemExit(main())"]
    process = await asyncio.create_subprocess_exec(
        *command,
        *("bench", "transport", "--mib", "32", "--runs", "2", "--lanes", "3", "--json"),
        stdout=subprocess.PIPE,
    )
    told, _ = await process.communicate()
    assert process.returncode == 0
    found = json.loads(told)
    assert found["lanes"] == 3
    assert found["mb_per_s"] > 0
    assert found["pump"]["mb_per_s"]["min"] <= found["mb_per_s"] <= found["pump"]["mb_per_s"]["max"]
    assert found["ratio"] == round(found["migration_mb_per_s"] / found["mb_per_s"], 3)
    assert 20 < found["services_peak_mib"] < 200
