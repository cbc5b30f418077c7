"""The guest moved by our services: two hosts with real certificates, and a scheduler that gives an order."""

from __future__ import annotations

import contextlib
import uuid
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from google.protobuf.duration_pb2 import Duration

from vmferry.bench.guest import Wishes
from vmferry.bench.moving import Moved, Mover
from vmferry.bench.ready import settled
from vmferry.cli.connection import open_source
from vmferry.cli.demo_hosts import Shore, TwoHosts
from vmferry.cli.machine import directory_of, end_machine, run_machine
from vmferry.cli.output import milliseconds
from vmferry.cli.progress import outcome_name
from vmferry.cli.watch import follow
from vmferry.client.places import Target
from vmferry.errors import VmferryError
from vmferry.machines.directory import MachineRecord
from vmferry.machines.paths import MachinePaths
from vmferry.machines.spec import MachineSpec
from vmferry.v1 import migration_pb2 as pb

_BEFORE: Final = (pb.MIGRATION_PHASE_NEGOTIATING, pb.MIGRATION_PHASE_RESERVING)
_AFTER: Final = pb.MIGRATION_PHASE_RELEASING


class Ours(Mover):
    """The guest of two hosts; it is on the first of them."""

    def __init__(
        self,
        wishes: Wishes,
        spec: MachineSpec,
        world: TwoHosts,
        options: pb.MigrationOptions,
        *,
        one_way: bool = False,
    ) -> None:
        super().__init__(wishes)
        self.one_way = one_way
        self._spec = spec
        self._world = world
        self._options = options
        self._here, self._there = world.a, world.b
        self.last: pb.Migration | None = None
        """How the last migration that completed was, in its own words."""

    @property
    def serials(self) -> tuple[Path, Path]:
        """In the machine's folder on each host."""
        return self._paths(self._here).serial, self._paths(self._there).serial

    @property
    def ram(self) -> Path:
        """The host's own file."""
        return self._paths(self._here).ram

    @property
    def pids(self) -> list[int]:
        """The services and the hypervisor."""
        return [*self.services, self.hypervisor]

    @property
    def services(self) -> list[int]:
        """All four; those that have nothing to do cost nothing."""
        return [service.pid for service in self._world.services]

    @property
    def hypervisor(self) -> int:
        """The process in the record of the host that has it."""
        return self._record(self._here).pid or 0

    @property
    def socket(self) -> Path:
        """The one that the services use for questions only."""
        return self._paths(self._here).observer

    async def get_ready(self) -> None:
        """Have the memory that the hosts keep for newcomers filled, as far as there is memory for that."""
        await settled(self._here, self._there)

    async def boot(self) -> None:
        """Start it on the first host."""
        for shore in (self._here, self._there):
            with contextlib.suppress(VmferryError):
                await end_machine(self._spec.uuid, shore.host.config)
        self._here, self._there = self._world.a, self._world.b
        # A machine that was ended is never born again.
        self._spec = replace(self._spec, uuid=str(uuid.uuid4()))
        await run_machine(self._spec, self._here.host.config)

    async def move(self, variant: str, limit_s: float) -> Moved:
        """Order it as a scheduler would, and follow it to its end."""
        del variant
        options = pb.MigrationOptions()
        options.CopyFrom(self._options)
        if not options.HasField("total_timeout"):
            options.total_timeout.CopyFrom(Duration(seconds=int(limit_s)))
        target = Target(self._there.host.identity.uri, self._there.dest.address)
        address, host = self._here.source.address, self._here.host.identity.uri
        async with open_source(address, host, self._world.admin_tls) as source:
            started = await source.start(self._spec.uuid, target, options=options)
            migration = await follow(source, started.id, _Silent(), last=started)
        if migration.outcome != pb.MIGRATION_OUTCOME_COMPLETED:
            reason = migration.reason
            return Moved(f"{outcome_name(migration)}: {reason.reason}: {reason.message}")
        self._here, self._there, self.last = self._there, self._here, migration
        return moved(migration)

    def _paths(self, shore: Shore) -> MachinePaths:
        return directory_of(shore.host.config).paths(self._spec)

    def _record(self, shore: Shore) -> MachineRecord:
        return directory_of(shore.host.config).find(self._spec.uuid)


def moved(migration: pb.Migration) -> Moved:
    """The figures of a migration that completed."""
    elapsed = {timing.phase: milliseconds(timing.elapsed) for timing in migration.timings}
    prepare = sum(elapsed.get(phase, 0.0) for phase in _BEFORE)
    total = milliseconds(migration.total) - prepare - elapsed.get(_AFTER, 0.0)
    return Moved(
        "completed",
        prepare_ms=round(prepare, 2),
        total_ms=round(total, 2),
        downtime_ms=milliseconds(migration.downtime),
        sent_bytes=migration.progress.wire_bytes,
        rounds=migration.progress.round,
    )


class _Silent:
    """Shows nobody anything."""

    def show(self, migration: pb.Migration) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None
