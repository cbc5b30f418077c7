"""Whole hosts for tests: real service processes with real certificates, real machines, and what they leave behind.

Promise: what a test starts is ended and removed when it ends, however it ends; a test that leaves a process, a memory
file, a machine's folder or a tracker behind fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import tempfile
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.integration.proxy import Proxy, open_proxy
from tests.integration.services import (
    DEADLINE_S,
    DOMAIN,
    Host,
    Place,
    Service,
    eventually,
    open_trackers,
    processes_with,
)
from vmferry.cli.machine import end_machine, run_machine
from vmferry.config import HostConfig
from vmferry.errors import VmferryError
from vmferry.machines.microvm import verdict
from vmferry.machines.microvm.spec import MicrovmSpec
from vmferry.machines.spec import MachineSpec, new_mac
from vmferry.rpc.tracing import ClientTracingInterceptors
from vmferry.security.authority import init_authority, issue
from vmferry.security.identity import Identity, Kind
from vmferry.security.tickets import TicketSigner
from vmferry.security.tls import TlsFiles, TlsMaterial, open_channel
from vmferry.v1 import machine_pb2
from vmferry.v1 import migration_pb2 as pb
from vmferry.v1.migration_pb2_grpc import SourceServiceStub

if TYPE_CHECKING:  # the stub's type exists for checkers only
    from vmferry.v1.migration_pb2_grpc import SourceServiceAsyncStub

MIB = 1024 * 1024


@dataclass
class Guest:
    """A machine of a test, wherever it is."""

    spec: MachineSpec
    made_on: Host

    @property
    def id(self) -> str:
        """The machine's identity."""
        return self.spec.uuid

    def serial(self, host: Host) -> str:
        """What it said on a host."""
        return host.directory.paths(self.spec).serial.read_text(encoding="ascii", errors="replace")

    async def assert_clean(self, host: Host) -> None:
        """It executes on this host, and finds every page and register it checks as it left them."""
        record = host.record(self.id)
        before = len(self.serial(host))
        if self.spec.microvm is not None and self.spec.microvm.program == "canary":
            machine = host.directory.open(record)
            try:
                await machine.send_serial("v")
            finally:
                await machine.close()
            await eventually(
                lambda: verdict.verdict(self.serial(host)[before:]).verifies, "the canary checks itself"
            )
            found = verdict.verdict(self.serial(host))
            assert found.bad == 0, found
        await eventually(lambda: self.serial(host).count("\n", before) > 1, "the guest goes on speaking")
        assert "BAD" not in self.serial(host)


@dataclass
class World:
    """Hosts with certificates of one authority."""

    root: Path
    hosts: dict[str, Host]
    guests: list[Guest] = field(default_factory=list)
    bystander: Bystander | None = None

    @property
    def a(self) -> Host:
        """The host machines are made on."""
        return self.hosts["a"]

    @property
    def b(self) -> Host:
        """The host they go to."""
        return self.hosts["b"]

    @property
    def services(self) -> list[Service]:
        """All of all hosts."""
        return [service for host in self.hosts.values() for service in (host.source, host.dest)]

    @property
    def trace_dir(self) -> Path:
        """Where all services write their spans."""
        return self.root / "traces"

    def tls_dir(self, who: str) -> Path:
        """Certificates of ``a``, ``b``, ``c``, ``controller`` or ``admin``."""
        return self.root / "tls" / who

    def material(self, who: str) -> TlsMaterial:
        """The same, loaded."""
        return TlsFiles(self.tls_dir(who)).load()

    @contextlib.asynccontextmanager
    async def source(self, host: Host, who: str = "controller") -> AsyncIterator[SourceServiceAsyncStub]:
        """Calls to a host's source service, as one of the identities."""
        interceptors = ClientTracingInterceptors()
        async with open_channel(
            host.source.address, host.identity, self.material(who), interceptors=interceptors
        ) as channel:
            yield SourceServiceStub(channel)

    async def run(
        self,
        host: Host | None = None,
        memory_mib: int = 16,
        program: str = "canary",
        *,
        name: str = "",
        **changes: Any,
    ) -> Guest:
        """Start a machine of a fresh identity, and wait until its guest speaks."""
        host = host or self.a
        values: dict[str, Any] = {"params": {"resident-mib": "4"} if program == "canary" else {}}
        part = MicrovmSpec(program=program, mac=new_mac(), **(values | changes))
        name = name or f"vm-{uuid.uuid4().hex[:8]}"
        spec = MachineSpec(name=name, uuid=str(uuid.uuid4()), memory_mib=memory_mib, microvm=part)
        guest = Guest(spec, host)
        self.guests.append(guest)
        await run_machine(spec, host.config)
        await eventually(lambda: guest.serial(host).count("\n") > 1, "the guest speaks")
        return guest

    def ticket(self, guest: Guest, here: Host, there: Host, **changes: Any) -> bytes:
        """A ticket for a machine, as the controller signs it."""
        values: dict[str, Any] = {
            "machine_id": guest.id,
            "source": here.identity,
            "destination": there.identity,
            "max_memory_bytes": guest.spec.memory_mib * MIB,
            "max_vcpus": guest.spec.vcpus,
        }
        return TicketSigner.load(self.tls_dir("controller")).issue(**(values | changes))

    def order(
        self, guest: Guest, here: Host, there: Host, *, address: str = "", ticket: bytes = b"", **options: Any
    ) -> pb.StartMigrationRequest:
        """A request to move a machine."""
        return pb.StartMigrationRequest(
            machine=guest.spec.name,
            destination=pb.Destination(host=there.identity.uri, address=address or there.dest.address),
            request_id=str(uuid.uuid4()),
            ticket=ticket or self.ticket(guest, here, there),
            options=migration_options(**options),
        )

    async def start(self, guest: Guest, here: Host, there: Host, **how: Any) -> str:
        """Start a migration; returns its id."""
        async with self.source(here) as stub:
            request = self.order(guest, here, there, **how)
            return (await stub.StartMigration(request, timeout=DEADLINE_S)).migration.id

    async def state(self, host: Host, migration_id: str) -> pb.Migration:
        """A migration as it stands."""
        async with self.source(host) as stub:
            answer = await stub.GetMigration(pb.GetMigrationRequest(id=migration_id), timeout=DEADLINE_S)
        return answer.migration

    async def reaches(
        self, host: Host, migration_id: str, condition: Callable[[pb.Migration], object], what: str
    ) -> pb.Migration:
        """Watch a migration until a condition holds."""
        async with asyncio.timeout(2 * DEADLINE_S), self.source(host) as stub:
            async for answer in stub.WatchMigration(pb.WatchMigrationRequest(id=migration_id)):
                if condition(answer.migration):
                    return answer.migration
        pytest.fail(f"the migration ended before {what}: {answer.migration}")

    async def enters(self, host: Host, migration_id: str, phase: pb.MigrationPhase.ValueType) -> pb.Migration:
        """Watch a migration until it is in a phase."""
        name = pb.MigrationPhase.Name(phase)
        return await self.reaches(host, migration_id, lambda now: now.phase == phase, name)

    async def ended(self, host: Host, migration_id: str) -> pb.Migration:
        """Watch a migration to its end."""
        return await self.enters(host, migration_id, pb.MIGRATION_PHASE_ENDED)

    async def migrate(self, guest: Guest, here: Host, there: Host, **how: Any) -> pb.Migration:
        """Move a machine; returns how that came out."""
        return await self.ended(here, await self.start(guest, here, there, **how))

    async def machine(self, host: Host, guest: Guest) -> machine_pb2.Machine:
        """A machine as a host's source service tells of it."""
        async with self.source(host) as stub:
            request = pb.GetMachineRequest(machine=guest.id)
            return (await stub.GetMachine(request, timeout=DEADLINE_S)).machine

    async def assert_stays(self, guest: Guest, here: Host, there: Host) -> None:
        """The guest runs here, undamaged, and the other host holds nothing."""
        machine = await self.machine(here, guest)
        assert machine.right == machine_pb2.MACHINE_RIGHT_OWNED
        assert machine.state == machine_pb2.MACHINE_STATE_RUNNING
        assert machine.migration_id == ""
        await guest.assert_clean(here)
        await eventually(lambda: not there.holdings(guest.spec), "the other host holds nothing")
        assert not there.ledger.rights(guest.id).permitted

    async def assert_crosses(self, guest: Guest, here: Host, there: Host, **how: Any) -> pb.Migration:
        """A migration completes: the guest runs there, undamaged, and this host holds nothing."""
        migration = await self.migrate(guest, here, there, **how)
        assert migration.outcome == pb.MIGRATION_OUTCOME_COMPLETED, migration
        assert migration.owner == there.identity.uri
        machine = await self.machine(there, guest)
        assert machine.right == machine_pb2.MACHINE_RIGHT_OWNED
        assert machine.state == machine_pb2.MACHINE_STATE_RUNNING
        assert here.holdings(guest.spec) == []
        assert not here.ledger.rights(guest.id).permitted
        await guest.assert_clean(there)
        return migration

    async def assert_failed_and_well(
        self, guest: Guest, here: Host, there: Host, migration: pb.Migration, reason: str
    ) -> None:
        """A migration failed with this reason, did no harm, and the next one completes."""
        assert migration.outcome == pb.MIGRATION_OUTCOME_FAILED, migration
        assert migration.reason.reason == reason, migration.reason
        assert migration.reason.message
        assert migration.reason.remedy
        assert migration.owner == here.identity.uri
        await self.assert_stays(guest, here, there)
        await self.assert_crosses(guest, here, there)

    async def end_guests(self, *, but: Guest | None = None) -> list[str]:
        """End every machine that was made, but one; returns what is left of any."""
        stays = but.spec if but else None
        for guest in self.guests:
            if guest is but:
                continue
            for host in self.hosts.values():
                if any(record.spec.uuid == guest.id for record in host.directory.list()):
                    with contextlib.suppress(VmferryError):
                        await end_machine(guest.id, host.config)
        self.guests[:] = [guest for guest in self.guests if guest is but]
        with contextlib.suppress(pytest.fail.Exception):
            await eventually(lambda: not self._left(stays), "nothing is left", seconds=30)
        return self._left(stays)

    def _left(self, stays: MachineSpec | None) -> list[str]:
        left = [
            f"host {host.name}: {item}"
            for host in self.hosts.values()
            for item in host.holdings()
            if stays is None or item not in host.holdings(stays)
        ]
        for service in self.services:
            if service.running:
                left += [f"{service.role} service: {what}" for what in open_trackers(service.pid)]
        return left


def migration_options(**options: Any) -> pb.MigrationOptions:
    """Options of a migration; times in seconds."""
    message = pb.MigrationOptions()
    for name, value in options.items():
        if isinstance(value, float):
            getattr(message, name).FromNanoseconds(int(value * 1e9))
        else:
            setattr(message, name, value)
    return message


@contextlib.asynccontextmanager
async def open_world(
    names: str = "ab",
    places: Mapping[str, Place] | None = None,
    memory: Path = Path("/dev/shm"),
    **settings: Any,
) -> AsyncIterator[World]:
    """Hosts with running services; ended and removed afterwards.

    Args:
        names: one letter per host.
        places: where in the network they are, if not on loopback.
        memory: where guest memory is made.
        settings: what all configurations have instead of values that suit tests.
    """
    values: dict[str, Any] = {
        "rpc_timeout_s": 2.0,
        "handoff_retry_s": 0.1,
        "receive_timeout_s": 3.0,
        "reconnect_timeout_s": 5.0,
        "memory_headroom_mib": 0,
        # What guests of tests write compresses so well that no link would be slow for it.
        "compression": "none",
    }
    with (
        tempfile.TemporaryDirectory(prefix="vf-") as run,
        tempfile.TemporaryDirectory(prefix="vf-", dir=memory) as ram,
    ):
        root = Path(run)
        _certificates(root / "tls", names)
        (root / "logs").mkdir()
        hosts = {
            name: _host(name, root, Path(ram), values | settings, (places or {}).get(name, Place()))
            for name in names
        }
        world = World(root, hosts)
        try:
            await asyncio.gather(*(service.start() for service in world.services))
            yield world
        finally:
            await _end_everything(world)


@contextlib.asynccontextmanager
async def configured(service: Service, **settings: Any) -> AsyncIterator[None]:
    """Run a service with other settings for a while; it is started anew before and afterwards."""
    service.host.write_config(**settings)
    await service.restart()
    try:
        yield
    finally:
        service.host.write_config()
        await service.restart()


def _certificates(folder: Path, names: str) -> None:
    init_authority(folder / "authority", DOMAIN)
    for name in sorted({*"abc", *names}):
        issue(folder / "authority", Identity(DOMAIN, Kind.VMHOST, name), folder / name)
    issue(folder / "authority", Identity(DOMAIN, Kind.CONTROLLER, "scheduler"), folder / "controller")
    issue(folder / "authority", Identity(DOMAIN, Kind.ADMIN, "operator"), folder / "admin")


def _host(name: str, root: Path, ram: Path, values: dict[str, Any], place: Place) -> Host:
    if "huge_dir" in values:
        values = values | {"huge_dir": values["huge_dir"] / name}
    config = HostConfig(
        tls_dir=root / "tls" / name,
        state_dir=root / "state" / name,
        run_dir=root / name,
        ram_dir=ram / name,
        trace_dir=root / "traces",
        source_listen=f"{place.address}:0",
        dest_listen=f"{place.address}:0",
        **values,
    )
    for folder in (config.state_dir, config.run_dir, config.ram_dir):
        folder.mkdir(mode=0o700, parents=True)
    return Host(name, config, root / f"host-{name}.toml", root / "logs", place)


async def _end_everything(world: World) -> None:
    for service in world.services:
        if service.running:
            service.signal(signal.SIGCONT)
    await asyncio.gather(*(service.stop() for service in world.services if service.running))
    left = await world.end_guests()
    for pid in processes_with(str(world.root)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    left += [f"{service.role} service: {line}" for service in world.services for line in service.unexpected()]
    assert not left, left


@pytest.fixture(scope="module")
async def world() -> AsyncIterator[World]:
    """Hosts a and b, for one module."""
    async with open_world() as opened:
        yield opened


@pytest.fixture(scope="module")
async def proxy(world: World) -> AsyncIterator[Proxy]:
    """The network of :func:`link`; it outlives a test, as what an open hand-off asks must."""
    async with open_proxy(lambda: world.b.dest.port) as opened:
        yield opened


@pytest.fixture
def link(proxy: Proxy) -> Iterator[Proxy]:
    """A network to host b's destination that a test can disturb; healed afterwards."""
    yield proxy
    proxy.heal()


@pytest.fixture
async def tidy(world: World) -> AsyncIterator[None]:
    """Ends a test's machines, and fails the test if anything of them, or of a service, is left behind or missing."""
    yield
    left = await world.end_guests(but=world.bystander.guest if world.bystander else None)
    assert not left, left
    assert all(service.running for service in world.services), "a service has ended"


@dataclass
class Bystander:
    """A guest that goes to and fro between the hosts of a module, whatever the tests do to others."""

    world: World
    guest: Guest
    here: Host
    there: Host

    async def assert_unharmed(self) -> None:
        """It runs where it was, undamaged, and nowhere else; and its next migration completes."""
        await self.world.assert_stays(self.guest, self.here, self.there)
        await self.assert_crosses()

    async def assert_crosses(self, **options: Any) -> None:
        """It goes to the other host."""
        await self.world.assert_crosses(self.guest, self.here, self.there, **options)
        self.turn()

    def turn(self) -> None:
        """Note that it has crossed."""
        self.here, self.there = self.there, self.here


@pytest.fixture
async def bystander(world: World) -> Bystander:
    """A guest that lives as long as its module's world."""
    if world.bystander is None:
        world.bystander = Bystander(world, await world.run(), world.a, world.b)
    if world.bystander.there.ledger.rights(
        world.bystander.guest.id
    ).permitted:  # a test that failed left it there
        world.bystander.turn()
    return world.bystander
