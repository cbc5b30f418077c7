"""Memory that is taken before anybody needs it: who gets it, when it is made, and when it is given up."""

from __future__ import annotations

import asyncio
import stat
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dest_svc.room import Room
from vmferry.config import HostConfig
from vmferry.errors import MachineExistsError
from vmferry.machines.directory import MachineDirectory
from vmferry.machines.readymemory import FOLDER, ReadyMemory, filling_files, ready_files
from vmferry.machines.spec import new_spec
from vmferry.memory.regions import RamFile

MIB = 1024 * 1024
PLENTY = 1 << 40


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder for guest memory."""
    with tempfile.TemporaryDirectory(prefix="vf-", dir="/dev/shm") as name:
        yield Path(name)


@dataclass
class Host:
    """What a host would say of itself."""

    busy: bool = False
    closed: bool = False
    available: int = PLENTY

    def ready(self, folder: Path, *sizes: int, headroom: int = 0) -> ReadyMemory:
        """Memory that it keeps ready."""
        return ReadyMemory(
            folder,
            sizes,
            headroom_bytes=headroom,
            busy=lambda: self.busy,
            closed=lambda: self.closed,
            available=lambda: self.available,
        )


async def until(condition: Callable[[], object], limit_s: float = 60.0) -> None:
    """Return when something has come about."""
    async with asyncio.timeout(limit_s):
        while not condition():  # noqa: ASYNC110 - nobody tells when a file system has changed
            await asyncio.sleep(0.01)  # looked at from outside, by the file system


def names(folder: Path) -> list[str]:
    """What is there."""
    return sorted(path.name for path in folder.iterdir())


def allocated(path: Path) -> int:
    """Memory that a file has."""
    return path.stat().st_blocks * 512


async def test_a_machine_finds_its_memory_ready(folder: Path) -> None:
    """It gets a file of exactly its size, zero, private, and taken already; another one is made in its place."""
    ready = Host().ready(folder, 16)
    ready.start()
    try:
        await until(lambda: ready_files(folder) == [16])
        assert (ready.held_bytes, ready.ready_bytes) == (16 * MIB, 16 * MIB)
        ram = folder / "machine.ram"
        assert ready.take(ram, 16 * MIB) == 16 * MIB
        assert (ram.stat().st_size, allocated(ram)) == (16 * MIB, 16 * MIB)
        assert stat.S_IMODE(ram.stat().st_mode) == 0o600
        assert ram.stat().st_nlink == 1
        with RamFile.open(ram, 16 * MIB) as file:
            assert not file.data_runs(), (
                "what nobody wrote is known to be zero, and need not be looked through"
            )
        assert ram.read_bytes() == bytes(16 * MIB)
        ram.write_bytes(b"a secret of the first machine" * 1000)
        await until(lambda: ready_files(folder) == [16])
        other = folder / "other.ram"
        assert ready.take(other, 16 * MIB) == 16 * MIB
        assert other.stat().st_ino != ram.stat().st_ino
        assert other.read_bytes() == bytes(16 * MIB)
    finally:
        await ready.close()
    assert names(folder) == ["machine.ram", "other.ram"]


async def test_the_file_that_suits_best_is_given(folder: Path) -> None:
    """The smallest that is large enough, cut to size; else the largest, made larger; never one far too large."""
    ready = Host().ready(folder, 8, 16, 64)
    ready.start()
    try:
        await until(lambda: ready_files(folder) == [8, 16, 64])
        await ready.close()  # nothing is made anew meanwhile
        ready = Host().ready(folder, 8, 16, 64)
        ready.start()
        await until(lambda: ready_files(folder) == [8, 16, 64])
        assert ready.take(folder / "tiny.ram", 3 * MIB) == 0
        assert not (folder / "tiny.ram").exists()
        assert ready.take(folder / "cut.ram", 12 * MIB) == 12 * MIB
        assert (folder / "cut.ram").stat().st_size == allocated(folder / "cut.ram") == 12 * MIB
        assert ready.take(folder / "larger.ram", 100 * MIB) == 64 * MIB
        assert (folder / "larger.ram").stat().st_size == 100 * MIB
        assert allocated(folder / "larger.ram") == 64 * MIB
    finally:
        await ready.close()


async def test_a_file_that_is_there_is_not_replaced(folder: Path) -> None:
    """The machine's own file may hold a guest."""
    ready = Host().ready(folder, 8)
    ready.start()
    try:
        await until(lambda: ready_files(folder) == [8])
        ram = folder / "machine.ram"
        ram.write_bytes(b"a guest")
        with pytest.raises(MachineExistsError):
            ready.take(ram, 8 * MIB)
        assert ram.read_bytes() == b"a guest"
    finally:
        await ready.close()


async def test_nothing_is_filled_while_somebody_arrives(folder: Path) -> None:
    """Processors are needed otherwise; afterwards it goes on."""
    host = Host(busy=True)
    ready = host.ready(folder, 8)
    ready.start()
    try:
        with pytest.raises(TimeoutError):
            await until(lambda: ready.held_bytes > 0, 0.6)
        host.busy = False
        await until(lambda: ready_files(folder) == [8])
    finally:
        await ready.close()


async def test_what_has_to_stay_free_stays_free(folder: Path) -> None:
    """A host without memory beyond its headroom keeps nothing, and begins when it has."""
    host = Host(available=20 * MIB)
    ready = host.ready(folder, 16, headroom=8 * MIB)
    ready.start()
    try:
        with pytest.raises(TimeoutError):
            await until(lambda: ready.held_bytes > 0, 0.6)
        host.available = 40 * MIB
        await until(lambda: ready_files(folder) == [16])
    finally:
        await ready.close()


async def test_it_is_given_up_for_who_cannot_use_it(folder: Path) -> None:
    """The smallest files first, and only as many as it takes."""
    host = Host()
    ready = host.ready(folder, 8, 16, 32, headroom=MIB)
    ready.start()
    try:
        await until(lambda: ready_files(folder) == [8, 16, 32])
        host.busy = True

        def available() -> int:
            return 57 * MIB - ready.held_bytes

        ready._available = available
        ready.make_room(0)
        assert ready.held_bytes == 56 * MIB
        ready.make_room(20 * MIB)
        assert ready_files(folder) == [32]
        ready.make_room(PLENTY)
        assert (ready.held_bytes, ready_files(folder)) == (0, [])
    finally:
        await ready.close()


async def test_a_host_that_takes_nobody_keeps_nothing_for_anybody(folder: Path) -> None:
    """What is ready and what is being made goes when the host is closed, and is made again when it is opened."""
    host = Host()
    ready = host.ready(folder, 8, 4096)
    ready.start()
    try:
        await until(lambda: ready_files(folder) == [8] and filling_files(folder))
        host.closed = True
        await until(lambda: (ready_files(folder), filling_files(folder)) == ([], 0))
        assert (ready.held_bytes, ready.take(folder / "machine.ram", 8 * MIB)) == (0, 0)
        host.closed = False
        await until(lambda: ready_files(folder) == [8])
    finally:
        await ready.close()
    assert not names(folder)


async def test_what_an_earlier_process_left_is_removed(folder: Path) -> None:
    """Nobody knows what became of it, so it is made anew."""
    left = folder / FOLDER / "8-0123.ready"
    left.parent.mkdir()
    left.write_bytes(b"who knows" * 1000)
    ready = Host().ready(folder, 8)
    ready.start()
    try:
        await until(lambda: ready_files(folder) == [8] and not filling_files(folder))
        assert not left.exists()
    finally:
        await ready.close()
    assert not names(folder)


async def test_a_host_that_keeps_none_makes_none(folder: Path) -> None:
    """The default."""
    ready = Host().ready(folder)
    ready.start()
    assert ready.take(folder / "machine.ram", 8 * MIB) == 0
    await ready.close()
    assert not names(folder)


async def test_newcomers_are_offered_it_and_have_it_given_up(folder: Path) -> None:
    """What is kept counts as free; whoever is promised more than the rest makes it go."""
    promised: dict[str, Any] = {}
    room = Room(
        HostConfig(ram_dir=folder, memory_headroom_mib=0, ready_memory_mib=(32,)),
        MachineDirectory(folder / "machines", folder),
        promised,
        closed=lambda: False,
    )
    room.ready.start()
    try:
        await until(lambda: ready_files(folder) == [32])
        assert room.ready.held_bytes == 32 * MIB
        left = {backing.name: backing.available_bytes for backing in room.backings()}
        receiver = SimpleNamespace(spec=new_spec("web", 1, "canary"), outstanding_bytes=MIB)
        promised["web"] = SimpleNamespace(receiver=receiver)
        assert room.ready._busy()
        room.make()
        assert ready_files(folder) == [32]
        receiver.outstanding_bytes = left["tmpfs"] + PLENTY
        room.make()
        assert ready_files(folder) == []
    finally:
        await room.ready.close()
