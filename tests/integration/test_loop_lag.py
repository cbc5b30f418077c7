"""The event loops of both services stay free while memory is copied: whoever asks them is answered at once."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path

import pytest

from tests.integration.hosts import MIB, World
from tests.integration.services import eventually
from vmferry.v1 import migration_pb2 as pb

pytestmark = pytest.mark.usefixtures("tidy")

MEMORY_MIB, FILLED_MIB = 160, 128
LONGEST_MS = 20.0
_MONITOR = """
import asyncio, atexit, json, os, signal, time

run, slowest, since = asyncio.events.Handle._run, [0.0, "nothing"], [0.0]

def timed(handle):
    before = time.thread_time()
    run(handle)
    took = time.thread_time() - before
    if took > slowest[0] and before > since[0]:
        task = getattr(handle._callback, "__self__", None)
        frames = task.get_stack() if isinstance(task, asyncio.Task) else ()
        where = [f"{frame.f_code.co_qualname}:{frame.f_lineno}" for frame in frames]
        slowest[:] = took, f"{handle!r}: {task!r}"[:800] + f" now in {where}"

def begin(*_):
    since[:] = [time.thread_time()]
    slowest[:] = 0.0, "nothing"
    open(f"{FOLDER}/{os.getpid()}.began", "w").close()

asyncio.events.Handle._run = timed
signal.signal(signal.SIGUSR1, begin)
atexit.register(lambda: json.dump(slowest, open(f"{FOLDER}/{os.getpid()}.json", "w")))
"""


@pytest.mark.parametrize("compression", ["none", "zstd"])
async def test_no_callback_keeps_a_loop_for_long(world: World, tmp_path: Path, compression: str) -> None:
    """What a callback costs is measured in processor time, so that it does not matter how busy the computer is."""
    monitor = tmp_path / "sitecustomize.py"
    monitor.write_text(f"FOLDER = {str(tmp_path)!r}\n{_MONITOR}", encoding="ascii")
    sources = str(Path(__file__).parents[2])
    services = (world.a.source, world.b.dest)
    guest = await world.run(
        memory_mib=MEMORY_MIB, program="writer", params={"dirty-mib-per-s": "1", "working-set-mib": "1"}
    )
    with world.a.directory.paths(guest.spec).ram.open("r+b") as ram:
        ram.seek((MEMORY_MIB - FILLED_MIB) * MIB)
        for _ in range(FILLED_MIB):
            ram.write(os.urandom(MIB // 2) + bytes(range(256)) * (MIB // 512))
    pids = {}
    try:
        for service in services:
            service.environment = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{sources}"}
            await service.restart()
            pids[service] = service.pid
            service.signal(signal.SIGUSR1)
            await eventually((tmp_path / f"{service.pid}.began").exists, "it is watched")
        migration = await world.migrate(guest, world.a, world.b, compression=compression)
        assert migration.outcome == pb.MIGRATION_OUTCOME_COMPLETED, migration
    finally:
        for service in services:
            service.environment = {}
        await asyncio.gather(*(service.restart() for service in services))
    for service, pid in pids.items():
        seconds, callback = json.loads((tmp_path / f"{pid}.json").read_text(encoding="utf-8"))
        print(f"{service.role}: {seconds * 1e3:.1f} ms in {callback}")
        assert 0.0 < seconds * 1e3 < LONGEST_MS, callback
