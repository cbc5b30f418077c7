"""What becomes of a guest's connections when it crosses: those over a bridge live on."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from tests.integration.hosts import World, open_world
from tests.integration.network import TAP, switched_hosts
from tests.integration.qemu.conftest import SPEAKS_S, LinuxGuest, boot, linux_spec
from tests.integration.services import Host, eventually
from vmferry.machines.qemu import guest as linux
from vmferry.machines.qemu.spec import NicSpec
from vmferry.machines.spec import MachineSpec, new_mac

pytestmark = [pytest.mark.timeout(180)]

ECHO = 7
BY_QEMU = "10.0.2.15"
"""The address that QEMU's own stack gives its guest."""
HOST_BY_QEMU = "10.0.2.2"


@pytest.fixture(scope="module")
def networked(images: Path, card_modules: list[Path]) -> Path:
    """An initial file system with what drives a network card, beside the other images."""
    path = images / "initrd-net"
    path.write_bytes(linux.initramfs(modules=card_modules))
    return path


def networked_spec(images: Path, initrd: Path, nic: NicSpec, **parameters: object) -> MachineSpec:
    """A description of the Linux guest with a network card and parameters for it."""
    spec = linux_spec(images, writes=2)
    assert spec.qemu is not None
    append = " ".join([spec.qemu.append, *(f"vf.{key}={value}" for key, value in parameters.items())])
    return replace(spec, qemu=replace(spec.qemu, initrd=str(initrd), append=append, nics=(nic,)))


@dataclass
class Caller:
    """One TCP connection over which numbered lines go, each of which must come back, once and in order."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    answered: int = 0
    times: list[float] = field(default_factory=list)

    async def talk(self) -> None:
        """Send the next line when the one before came back."""
        while True:
            line = b"line %d\n" % self.answered
            self.writer.write(line)
            assert await self.reader.readexactly(len(line)) == line
            self.answered += 1
            self.times.append(time.monotonic())
            await asyncio.sleep(0.01)

    async def answers(self, lines: int) -> None:
        """Wait until so many more lines came back."""
        wanted = self.answered + lines
        await eventually(lambda: self.answered >= wanted, "the guest answers", seconds=SPEAKS_S)

    def longest_gap_s(self) -> float:
        """The longest time between two answers."""
        return max(after - before for before, after in zip(self.times, self.times[1:], strict=False))


@asynccontextmanager
async def calling(address: str, port: int) -> AsyncIterator[Caller]:
    """A connection that talks all the time; whatever broke it fails the test."""
    async with asyncio.timeout(SPEAKS_S):
        while True:
            try:
                reader, writer = await asyncio.open_connection(address, port)
                break
            except OSError:
                await asyncio.sleep(0.05)
    caller = Caller(reader, writer)
    talking = asyncio.create_task(caller.talk())
    try:
        yield caller
        assert not talking.done(), talking.exception()
    finally:
        talking.cancel()
        await asyncio.gather(talking, return_exceptions=True)
        writer.close()


async def test_a_connection_over_a_bridge_survives(images: Path, networked: Path) -> None:
    """Hosts with a tap and a bridge each: no byte of a TCP connection is lost or repeated while its guest crosses."""
    with switched_hosts() as network:
        async with open_world(
            places=network.places, image_roots=(images,), taps=(TAP,), downtime_limit_ms=1000
        ) as world:
            nic = NicSpec(backend="tap", tap=TAP, mac=new_mac())
            spec = networked_spec(images, networked, nic, ip=f"{network.guest}/24", echo=ECHO)
            guest = await boot(world, spec)
            async with calling(network.guest, ECHO) as caller:
                for here, there in ((world.a, world.b), (world.b, world.a)):
                    await caller.answers(20)
                    caller.times.clear()
                    migration = await world.assert_crosses(guest, here, there)
                    await caller.answers(20)
                    print(
                        f"longest time without an answer {caller.longest_gap_s() * 1e3:.0f} ms, "
                        f"downtime {migration.downtime.ToMilliseconds()} ms"
                    )


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Send back each line."""
    try:
        while line := await reader.readline():
            writer.write(line)
            await writer.drain()
    except OSError:
        pass  # the hypervisor through which it came has ended
    finally:
        writer.close()


async def calls_are_answered(guest: LinuxGuest, host: Host) -> None:
    """Each connection that the guest made on a host brought back what went over it, and there are some."""

    def answers() -> list[tuple[str, str]]:
        return re.findall(r"^dial n=(\d+) answer=call (\d+)\r?$", guest.serial(host), re.MULTILINE)

    await eventually(lambda: len(answers()) > 2, "calls are answered", seconds=SPEAKS_S)
    assert all(number == told for number, told in answers())


@pytest.mark.usefixtures("tidy")
@pytest.mark.parametrize("own", [False, True], ids=["to the outside", "to itself"])
async def test_connections_through_qemus_own_stack(
    world: World, images: Path, networked: Path, own: bool
) -> None:
    """New ones work wherever the guest is; an old one ends if its other end was held by the QEMU that was left."""
    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        port = ECHO if own else server.sockets[0].getsockname()[1]
        spec = networked_spec(
            images,
            networked,
            NicSpec(backend="user", mac=new_mac()),
            ip=f"{BY_QEMU}/24",
            echo=ECHO,
            dial=f"{BY_QEMU if own else HOST_BY_QEMU}:{port}",
        )
        guest = await boot(world, spec)
        for here, there in ((world.a, world.b), (world.b, world.a)):
            await calls_are_answered(guest, here)
            await world.assert_crosses(guest, here, there)
            await calls_are_answered(guest, there)
            if there is world.b and not own:
                await eventually(lambda: "held n=" in guest.serial(world.b), "the old connection ends")
            else:
                assert "held" not in guest.serial(there)
