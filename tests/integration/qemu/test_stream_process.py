"""What the hand-off relies on in a QEMU that streams: when it goes on by itself, and when it never does."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.integration.qemu.conftest import QEMU
from tests.integration.services import eventually_async
from tests.support import require
from vmferry.errors import MachineFailedError
from vmferry.handoff.ledger import HostLedger
from vmferry.machines.directory import MachineDirectory
from vmferry.machines.launcher import start_machine, stop_machine
from vmferry.machines.migrating import PAUSED
from vmferry.machines.port import RunState
from vmferry.machines.qemu import devicestate, probe
from vmferry.machines.qemu.spec import QemuSpec
from vmferry.machines.qmp import QmpMachine
from vmferry.machines.spec import new_qemu_spec
from vmferry.machines.stream_socket import StreamSink, StreamSource

MEMORY_MIB = 32
PIECE_BYTES = 1 << 20


@pytest.fixture
def directory() -> Iterator[MachineDirectory]:
    """An empty host."""
    with (
        tempfile.TemporaryDirectory(prefix="vf-") as run,
        tempfile.TemporaryDirectory(prefix="vf-", dir="/dev/shm") as ram,
    ):
        yield MachineDirectory(Path(run) / "m", Path(ram) / "r")


@pytest.fixture
async def machine(directory: MachineDirectory, tmp_path: Path) -> AsyncIterator[QmpMachine]:
    """A QEMU whose firmware runs."""
    require(QEMU.exists(), f"no {QEMU} (apt install qemu-system-x86)")
    spec = probe.resolve(new_qemu_spec("vm", MEMORY_MIB, 1, QemuSpec(accelerator="tcg")))
    machine = await start_machine(spec, directory)
    try:
        await machine.cont(HostLedger(tmp_path).birth(spec.uuid))
        yield machine
    finally:
        await stop_machine(machine, directory)


async def read_all(source: StreamSource, found: bytearray) -> None:
    """Take everything that the hypervisor sends."""
    await source.accept()
    while data := await source.read(PIECE_BYTES):
        found += data


class Streaming:
    """A stream that is read by nobody but this test."""

    def __init__(self, machine: QmpMachine) -> None:
        self.data = bytearray()
        self._machine = machine
        self._source = StreamSource(machine.paths.stream_socket)
        self._reading: asyncio.Task[None] | None = None

    async def begin(self) -> None:
        """Have the machine stream until it pauses for its last part."""
        await self._machine.get_ready_to_stream()
        self._source.listen()
        self._reading = asyncio.create_task(read_all(self._source, self.data))
        await self._machine.begin_stream(self._machine.paths.stream_socket)

        async def waits() -> bool:
            return (await self._machine.stream_progress()).status == PAUSED

        await eventually_async(waits, "it waits, paused")

    async def finish(self) -> bytes:
        """Have it send the rest; returns the whole stream."""
        assert self._reading is not None
        await self._machine.finish_stream()
        await self._reading
        await self._machine.wait_stream_completed()
        self._source.close()
        return bytes(self.data)

    async def close(self) -> None:
        """Hang up."""
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)
        self._source.close()


@pytest.fixture
async def stream(machine: QmpMachine) -> AsyncIterator[Streaming]:
    """A stream of the machine."""
    stream = Streaming(machine)
    yield stream
    await stream.close()


async def test_a_completed_stream_never_resumes_the_guest(
    machine: QmpMachine, stream: Streaming, tmp_path: Path
) -> None:
    """Neither an end that comes too late nor time moves it; a permit does."""
    await stream.begin()
    await stream.finish()
    for _ in range(3):
        await machine.end_stream()
        assert await machine.run_state() is RunState.POSTMIGRATE
    await machine.cont(HostLedger(tmp_path).permit(machine.spec.uuid))
    assert await machine.run_state() is RunState.RUNNING


async def test_a_guest_that_was_paused_before_stays_paused_when_its_stream_ends(
    machine: QmpMachine, stream: Streaming, tmp_path: Path
) -> None:
    """QEMU goes on by itself only where it was QEMU that interrupted a running guest."""
    await machine.stop()
    await stream.begin()
    await machine.end_stream()
    assert await machine.run_state() in {RunState.PAUSED, RunState.POSTMIGRATE}
    await machine.cont(HostLedger(tmp_path).permit(machine.spec.uuid))
    assert await machine.run_state() is RunState.RUNNING


async def test_a_guest_that_the_hypervisor_paused_goes_on_when_the_stream_is_ended(
    machine: QmpMachine, stream: Streaming
) -> None:
    """It is settled when that is answered, so that whoever asks next gets the truth."""
    await stream.begin()
    assert await machine.run_state() is RunState.PAUSED
    await machine.end_stream()
    assert await machine.run_state() is RunState.RUNNING
    with pytest.raises(MachineFailedError):
        await machine.stream_progress()


async def test_each_way_finds_the_settings_that_it_needs(
    machine: QmpMachine, directory: MachineDirectory, stream: Streaming, tmp_path: Path
) -> None:
    """Device state after a stream has no memory in it, and a stream after device state has all, in one process."""
    permit = HostLedger(tmp_path).permit(machine.spec.uuid)
    for _ in range(2):
        await machine.get_ready()
        await machine.stop()
        assert devicestate.parse(await machine.save_device_state()).sections
        await machine.cont(permit)
        stream.data.clear()
        await stream.begin()
        assert len(await stream.finish()) > MEMORY_MIB * (1 << 20) // 4096 * 8
        await machine.cont(permit)
    other = directory.open(directory.find(machine.spec.uuid))
    await machine.close()
    try:  # a hold that knows nothing of what was set before
        await other.stop()
        assert devicestate.parse(await other.save_device_state()).sections
    finally:
        await other.close()


async def test_a_stream_is_loaded_by_another(
    machine: QmpMachine, directory: MachineDirectory, stream: Streaming
) -> None:
    """All of it, memory too, and the other one stands paused then; its socket's name is gone at once."""
    await stream.begin()
    data = await stream.finish()
    there = MachineDirectory(directory.root.parent / "n", directory.ram_root.parent / "s")
    other = await start_machine(machine.spec, there, incoming=True)
    sink = StreamSink()
    try:
        await other.receive_stream(other.paths.stream_socket)
        await sink.connect(other.paths.stream_socket)
        assert not other.paths.stream_socket.exists()
        await sink.write(data)
        sink.end()
        await other.wait_stream_loaded()
        assert await other.run_state() is RunState.PAUSED
        assert other.paths.ram.read_bytes() == machine.paths.ram.read_bytes()
    finally:
        sink.close()
        await stop_machine(other, there)
