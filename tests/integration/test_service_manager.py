"""Services below a service manager: what they tell it, how they reload, and how they stop."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.integration.hosts import World, configured
from tests.integration.proxy import Proxy
from tests.integration.services import DEADLINE_S, Service, eventually, refusal
from vmferry.security.authority import issue
from vmferry.v1 import migration_pb2 as pb

pytestmark = pytest.mark.usefixtures("tidy")

WATCHDOG_S = 0.6
SLOW = 3e6


class Manager:
    """The receiving end of the notify protocol."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.setblocking(False)
        self.said: list[dict[str, str]] = []
        self.fed_at = 0.0
        asyncio.get_running_loop().add_reader(self._socket, self._receive)

    def _receive(self) -> None:
        lines = self._socket.recv(4096).decode().splitlines()
        message = dict(line.split("=", 1) for line in lines)
        if "WATCHDOG" in message:
            self.fed_at = time.monotonic()
        else:
            self.said.append(message)

    async def hears(self, key: str) -> dict[str, str]:
        """Wait for a message with this key; what came before it is forgotten."""

        def find() -> dict[str, str] | None:
            return next((message for message in self.said if key in message), None)

        found = await eventually(find, f"the service says {key}")
        assert found is not None
        del self.said[: self.said.index(found) + 1]
        return found

    def close(self) -> None:
        """Take nothing more."""
        asyncio.get_running_loop().remove_reader(self._socket)
        self._socket.close()


@contextlib.asynccontextmanager
async def managed(service: Service, folder: Path) -> AsyncIterator[Manager]:
    """A service that was started by a service manager; without one again afterwards."""
    manager = Manager(folder / "notify")
    service.environment = {"NOTIFY_SOCKET": str(manager.path), "WATCHDOG_USEC": str(int(WATCHDOG_S * 1e6))}
    try:
        await service.restart()
        yield manager
    finally:
        service.environment = {}
        if service.running:
            service.signal(signal.SIGCONT)
        await service.restart()
        manager.close()


@pytest.mark.parametrize("role", ["source", "dest"])
async def test_the_manager_hears_of_start_reload_and_stop(world: World, tmp_path: Path, role: str) -> None:
    """READY comes once calls are taken; SIGHUP gives RELOADING and READY again; SIGTERM gives STOPPING."""
    service = getattr(world.a, role)
    async with managed(service, tmp_path) as manager:
        ready = await manager.hears("READY")
        assert f"on port {service.port}" in ready["STATUS"]
        before = time.monotonic_ns() // 1000
        service.signal(signal.SIGHUP)
        reloading = await manager.hears("RELOADING")
        assert before < int(reloading["MONOTONIC_USEC"]) <= time.monotonic_ns() // 1000
        again = await manager.hears("READY")
        assert "certificate until" in again["STATUS"]
        assert await service.stop() == 0
        stopping = await manager.hears("STOPPING")
        assert int(stopping["EXTEND_TIMEOUT_USEC"]) > 0


async def test_the_watchdog_is_fed_by_the_event_loop(world: World, tmp_path: Path) -> None:
    """It is fed several times within its limit as long as the loop turns, and not at all while it stands."""
    async with managed(world.a.source, tmp_path) as manager:
        await manager.hears("READY")
        for _ in range(3):
            last = manager.fed_at
            await eventually(lambda last=last: manager.fed_at > last, "it is fed again", seconds=WATCHDOG_S)
        world.a.source.signal(signal.SIGSTOP)
        await eventually(lambda: world.a.source.status("State").startswith("T"), "it stands")
        stood = time.monotonic()
        await eventually(lambda: time.monotonic() - max(stood, manager.fed_at) > WATCHDOG_S, "it starves")
        world.a.source.signal(signal.SIGCONT)
        await eventually(lambda: manager.fed_at > stood + WATCHDOG_S, "it is fed again")


async def test_a_reload_takes_certificates_and_log_level(world: World, tmp_path: Path) -> None:
    """After SIGHUP a new log level and a new certificate count; unusable ones change nothing, and are told."""
    service, tls = world.a.source, world.tls_dir("a")
    async with managed(service, tmp_path) as manager:
        first = (await manager.hears("READY"))["STATUS"]
        issue(world.tls_dir("authority"), world.a.identity, tls, days=3, force=True)
        world.a.write_config(log_level="error")
        service.signal(signal.SIGHUP)
        renewed = await manager.hears("READY")
        assert "certificate until" in renewed["STATUS"]
        async with world.source(world.a) as stub:
            await stub.ListMachines(pb.ListMachinesRequest(), timeout=DEADLINE_S)
        written = len(service.log_text())
        service.signal(signal.SIGHUP)
        await manager.hears("READY")
        assert '"event": "reloaded"' not in service.log_text()[written:], "the log level did not change"
        key = (tls / "tls.key").read_bytes()
        (tls / "tls.key").write_bytes(b"nothing")
        try:
            service.signal(signal.SIGHUP)
            refused = await manager.hears("READY")
            assert refused["STATUS"].startswith(first)
            assert "not reloaded" in refused["STATUS"]
            assert '"event": "not reloaded, all stays as it was"' in service.log_text()
        finally:
            (tls / "tls.key").write_bytes(key)
            world.a.write_config()


@pytest.mark.parametrize("role", ["source", "dest"])
async def test_a_stop_lets_running_migrations_end(world: World, link: Proxy, role: str) -> None:
    """Told to stop, either end of a migration takes no other and lets this one end; nothing was given back."""
    guest, other = await world.run(), await world.run()
    service = world.a.source if role == "source" else world.b.dest
    async with configured(service, stop_timeout_s=60.0):
        link.up_bytes_per_s = SLOW
        migration_id = await world.start(guest, world.a, world.b, address=link.address)
        await world.enters(world.a, migration_id, pb.MIGRATION_PHASE_PRECOPYING)
        stopping = asyncio.create_task(service.stop())
        await eventually(lambda: not_serving(service), "the service says that it stops")
        if role == "source":
            async with world.source(world.a) as stub:
                error = await refusal(
                    stub.StartMigration(world.order(other, world.a, world.b), timeout=DEADLINE_S)
                )
                assert error.reason == "SERVICE_STOPPING"
        link.up_bytes_per_s = None
        assert await stopping == 0
        await service.start()
    await world.assert_stays(guest, world.b, world.a)


async def test_a_stop_gives_back_what_takes_too_long(world: World, link: Proxy) -> None:
    """When the time is over, the migration ends and the guest runs on where it was."""
    guest = await world.run()
    async with configured(world.a.source, stop_timeout_s=0.5):
        link.up_bytes_per_s = SLOW / 10
        migration_id = await world.start(guest, world.a, world.b, address=link.address)
        await world.enters(world.a, migration_id, pb.MIGRATION_PHASE_PRECOPYING)
        assert await world.a.source.stop() == 0
        link.up_bytes_per_s = None
        await world.a.source.start()
    await world.assert_stays(guest, world.a, world.b)


async def test_a_second_signal_waits_for_nothing(world: World, link: Proxy) -> None:
    """Told again while it waits for a migration, the service gives it back at once."""
    guest = await world.run()
    async with configured(world.a.source, stop_timeout_s=600.0):
        link.up_bytes_per_s = SLOW / 10
        migration_id = await world.start(guest, world.a, world.b, address=link.address)
        await world.enters(world.a, migration_id, pb.MIGRATION_PHASE_PRECOPYING)
        stopping = asyncio.create_task(world.a.source.stop())
        await eventually(lambda: not_serving(world.a.source), "the service says that it stops")
        world.a.source.signal(signal.SIGTERM)
        assert await stopping == 0
        link.up_bytes_per_s = None
        await world.a.source.start()
    await world.assert_stays(guest, world.a, world.b)


def not_serving(service: Service) -> bool:
    """Whether it has said in its log that it stops."""
    return '"event": "stopping"' in service.log_text().rpartition('"event": "ready"')[2]
