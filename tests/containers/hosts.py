"""Two hosts in containers: what a scheduler asks of them, and what lies in them, seen from outside.

Promise: whether a machine runs, and whose it is, is read from the container's own files and processes and from the
journals, not only from what the services say.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tomllib
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.containers.podman import COMPOSE, DEPLOY, Container, Fleet
from tests.integration.hosts import migration_options
from tests.integration.services import eventually, eventually_async
from vmferry.handoff.ledger import HostLedger
from vmferry.machines.microvm import verdict as canary
from vmferry.machines.microvm.spec import MicrovmSpec
from vmferry.machines.qemu import guest as linux
from vmferry.machines.qemu.guest import verdict as ticks
from vmferry.machines.qemu.spec import QemuSpec
from vmferry.machines.spec import MachineSpec, new_mac, new_qemu_spec
from vmferry.security.identity import Identity, Kind
from vmferry.security.tickets import TicketSigner
from vmferry.security.tls import TlsFiles, open_channel
from vmferry.v1 import machine_pb2
from vmferry.v1 import migration_pb2 as pb
from vmferry.v1.migration_pb2_grpc import SourceServiceStub

DOMAIN = "compose.vmferry.example"
ANSWER_S = 20.0
GUEST_S = 60.0
USER = 7601
MIB = 1024 * 1024
IMAGES = "/var/lib/vmferry/images"
QUICK = {
    "rpc_timeout_s": 2.0,
    "handoff_retry_s": 0.2,
    "receive_timeout_s": 3.0,
    "reconnect_timeout_s": 4.0,
    "downtime_limit_ms": 2000,
    "compression": "none",
    "stop_timeout_s": 0.0,
}
"""What the configuration of compose has instead, so that the tests need not wait for people's patience."""


@dataclass
class ContainerHost:
    """One host, both of whose services are in one container."""

    name: str
    fleet: Fleet
    container: Container

    @property
    def identity(self) -> Identity:
        """Who it is."""
        return Identity(DOMAIN, Kind.VMHOST, self.name)

    @property
    def ledger(self) -> HostLedger:
        """Its journals, which lie in a volume and can be read whether it runs or not."""
        return HostLedger(self.fleet.volume(f"state-{self.name}") / "journal")

    @contextlib.asynccontextmanager
    async def source(self) -> AsyncIterator[Any]:
        """Calls to its source service, by the operator."""
        tls = TlsFiles(self.fleet.volume("tls") / "operator").load()
        async with open_channel(f"{self.container.address}:7601", self.identity, tls) as channel:
            yield SourceServiceStub(channel)

    def run(self, spec: MachineSpec) -> None:
        """Start a machine here, as somebody would who is logged in."""
        folder = self.fleet.volume(f"state-{self.name}") / "images"
        (folder / f"{spec.name}.toml").write_text(spec.to_toml(), encoding="utf-8")
        self.container.exec("vmferry", "machine", "run", f"{IMAGES}/{spec.name}.toml")

    def serial(self, spec: MachineSpec) -> str:
        """What its guest said here."""
        path = self.container.root / f"run/vmferry/machines/{spec.name}/serial.log"
        return path.read_text("ascii", "replace") if path.exists() else ""

    def processes(self, text: str) -> list[int]:
        """Processes in it whose command line has this text; by their numbers outside of it."""
        space = Path(f"/proc/{self.container.pid}/ns/pid").readlink()
        found = []
        for folder in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                here = folder.name.isdecimal() and (folder / "ns/pid").readlink() == space
                if here and text.encode() in (folder / "cmdline").read_bytes():
                    found.append(int(folder.name))
        return found

    def holdings(self, spec: MachineSpec) -> list[str]:
        """All that a machine has here: folder, memory file, processes."""
        root = self.container.root
        files = [root / f"run/vmferry/machines/{spec.name}", root / f"dev/shm/vmferry/{spec.uuid}.ram"]
        processes = self.processes(f"/{spec.name}/")
        return [str(path) for path in files if path.exists()] + [f"process {pid}" for pid in processes]

    async def machine(self, spec: MachineSpec) -> machine_pb2.Machine:
        """A machine as its source service tells of it."""
        async with self.source() as stub:
            answer = await stub.GetMachine(pb.GetMachineRequest(machine=spec.uuid), timeout=ANSWER_S)
        return answer.machine  # type: ignore[no-any-return]

    async def start(self, spec: MachineSpec, there: ContainerHost, **options: Any) -> str:
        """Begin to move a machine, to where the network's own names lead; returns the migration's id."""
        signer = TicketSigner.load(self.fleet.volume("tls") / "operator")
        ticket = signer.issue(
            machine_id=spec.uuid,
            source=self.identity,
            destination=there.identity,
            max_memory_bytes=spec.memory_bytes,
            max_vcpus=spec.vcpus,
        )
        request = pb.StartMigrationRequest(
            machine=spec.name,
            destination=pb.Destination(host=there.identity.uri, address=f"{there.name}:7602"),
            request_id=str(uuid.uuid4()),
            ticket=ticket,
            options=migration_options(**options),
        )
        async with self.source() as stub:
            return str((await stub.StartMigration(request, timeout=ANSWER_S)).migration.id)

    async def reaches(
        self, migration_id: str, condition: Callable[[pb.Migration], object], what: str
    ) -> pb.Migration:
        """Wait until a condition holds of a migration."""

        async def look() -> pb.Migration | None:
            async with self.source() as stub:
                request = pb.GetMigrationRequest(id=migration_id)
                now = (await stub.GetMigration(request, timeout=ANSWER_S)).migration
            return now if condition(now) else None

        found = await eventually_async(look, what, seconds=GUEST_S)
        assert found is not None
        return found

    async def ended(self, migration_id: str) -> pb.Migration:
        """Wait for the end of a migration."""
        return await self.reaches(migration_id, lambda now: now.phase == pb.MIGRATION_PHASE_ENDED, "its end")

    async def copies(self, migration_id: str, sent_bytes: int = MIB) -> None:
        """Wait until a migration is in the middle of copying memory."""
        await self.reaches(
            migration_id,
            lambda now: now.phase == pb.MIGRATION_PHASE_PRECOPYING and now.progress.sent_bytes >= sent_bytes,
            "memory is being copied",
        )


@dataclass
class Guest:
    """A machine of a test, wherever it is."""

    spec: MachineSpec

    async def speaks(self, host: ContainerHost) -> None:
        """Wait until it is up and checks itself."""
        text = "tick n=" if self.spec.qemu else "\n"
        await eventually(lambda: self.serial(host).count(text) > 2, "the guest speaks", seconds=GUEST_S)

    def serial(self, host: ContainerHost) -> str:
        """What it said on a host."""
        return host.serial(self.spec)

    async def assert_well(self, host: ContainerHost) -> None:
        """It goes on, on this host, and finds nothing wrong with all it has."""
        await self.speaks(host)
        if self.spec.qemu:
            now = ticks.verdict(self.serial(host)).ticks[-1].number
            await eventually(
                lambda: ticks.verdict(self.serial(host)).checked_after(now),
                "it reads its files",
                seconds=GUEST_S,
            )
            found = ticks.verdict(self.serial(host))
            assert found.ok, (found.faults, self.serial(host)[-2000:])
            return
        before = len(self.serial(host))
        await eventually(
            lambda: canary.lines(self.serial(host)[before:]), "the canary goes on", seconds=GUEST_S
        )
        assert canary.verdict(self.serial(host)).ok, self.serial(host)[-2000:]

    async def assert_only_on(self, here: ContainerHost, there: ContainerHost) -> None:
        """Exactly one host owns and runs it, undamaged; the other one has nothing of it."""
        machine = await here.machine(self.spec)
        assert machine.right == machine_pb2.MACHINE_RIGHT_OWNED
        assert machine.state == machine_pb2.MACHINE_STATE_RUNNING
        assert here.ledger.rights(self.spec.uuid).permitted
        assert not there.ledger.rights(self.spec.uuid).permitted
        await eventually(lambda: not there.holdings(self.spec), "the other host holds nothing")
        await self.assert_well(here)

    async def assert_crosses(self, here: ContainerHost, there: ContainerHost, **options: Any) -> pb.Migration:
        """It moves, and is then only there."""
        migration = await here.ended(await here.start(self.spec, there, **options))
        assert migration.outcome == pb.MIGRATION_OUTCOME_COMPLETED, migration
        await self.assert_only_on(there, here)
        return migration


def new_canary(memory_mib: int = 64, resident_mib: int = 32) -> Guest:
    """A micro-VM whose guest checks itself."""
    part = MicrovmSpec(program="canary", params={"resident-mib": str(resident_mib)}, mac=new_mac())
    return Guest(MachineSpec(name=_name("vm"), uuid=str(uuid.uuid4()), memory_mib=memory_mib, microvm=part))


def new_linux() -> Guest:
    """A Debian kernel with a busybox that checks itself, in QEMU."""
    part = QemuSpec(
        accelerator="tcg", kernel=f"{IMAGES}/vmlinuz", initrd=f"{IMAGES}/initrd", append=linux.append(8, 0)
    )
    return Guest(new_qemu_spec(_name("lin"), 128, 1, part))


def _name(kind: str) -> str:
    return f"{kind}-{uuid.uuid4().hex[:8]}"


@dataclass
class TwoContainers:
    """Hosts a and b, and what is beside them."""

    fleet: Fleet
    a: ContainerHost
    b: ContainerHost

    def collected(self) -> list[dict[str, Any]]:
        """All spans that the collector was sent, with the name of the host they came from."""
        path = self.fleet.volume("collected") / "spans.jsonl"
        return [
            span | {"host": _host_name(resource)}
            for line in path.read_text(encoding="utf-8").splitlines()
            for resource in json.loads(line)["resourceSpans"]
            for scope in resource["scopeSpans"]
            for span in scope["spans"]
        ]


def _host_name(resource: dict[str, Any]) -> str:
    attributes = {one["key"]: one["value"] for one in resource["resource"]["attributes"]}
    return str(attributes["host.name"]["stringValue"])


@contextlib.contextmanager
def two_containers(image: str, scratch: Path) -> Any:
    """Everything that deploy/compose.yaml describes, up and healthy; removed at the end."""
    fleet = Fleet(image)
    COMPOSE["volumes"].setdefault("collected", {})
    try:
        fleet.create_all()
        fleet.run("certificates")
        collector = Path(__file__).with_name("collector.py")
        fleet.run(
            "collector",
            *(
                "--volume",
                f"{collector}:/collector.py:ro",
                "--volume",
                f"{fleet.mark}-collected:/var/lib/vmferry",
            ),
            command=["python3", "/collector.py", "/var/lib/vmferry/spans.jsonl"],
        )
        hosts = [_run_host(fleet, name, scratch) for name in "ab"]
        for host in hosts:
            host.container.wait_healthy()
        yield TwoContainers(fleet, *hosts)
    finally:
        left = fleet.remove_all()
        assert not left, left


def _run_host(fleet: Fleet, name: str, scratch: Path) -> ContainerHost:
    images = fleet.volume(f"state-{name}") / "images"
    shutil.copytree(scratch / "images", images)
    for path in (images.parent, images, *images.iterdir()):
        os.chown(path, USER, USER)
    settings = tomllib.loads((DEPLOY / f"compose/{name}.toml").read_text(encoding="utf-8")) | QUICK
    config = scratch / f"{name}.toml"
    config.write_text(
        "".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items()), encoding="utf-8"
    )
    # The last mount of a path is the one that counts, and this is quicker than what people wait for.
    service = COMPOSE["services"][name]
    service["volumes"] = [mount for mount in service["volumes"] if "host.toml" not in mount]
    container = fleet.run(name, "--volume", f"{config}:/etc/vmferry/host.toml:ro")
    return ContainerHost(name, fleet, container)
