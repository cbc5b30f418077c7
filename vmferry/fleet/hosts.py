"""The hosts of a fleet as its update sees them: what is asked of each, by the calls that any scheduler has.

Promise: nothing is decided here. What may be repeated after a run was killed is repeated as the same request or asked
about first; a machine whose whereabouts nobody can tell is said to be nowhere, never guessed at.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from vmferry.client.connection import Tries
from vmferry.client.draining import new_request_id
from vmferry.client.source import SourceClient
from vmferry.client.updating import Wanted
from vmferry.errors import IncompatibleError, MachineNotFoundError, VmferryError
from vmferry.fleet.health import filled, run, unhealthy, wait_healthy
from vmferry.fleet.plan import HostPlan, Plan
from vmferry.fleet.ways import BUSY, Obstacle
from vmferry.v1 import drain_pb2 as dp
from vmferry.v1 import machine_pb2
from vmferry.v1 import migration_pb2 as pb
from vmferry.v1 import update_pb2 as up

_GOING: Final = (machine_pb2.MACHINE_STATE_RUNNING, machine_pb2.MACHINE_STATE_PAUSED)
_LOOK_S: Final = 0.5
_TRIES: Final = Tries(attempts=6)
"""A service that the command has restarted may take a few seconds."""
Left = Callable[[str, str], None]
"""Told of a machine that has left, and of the host it went to."""


class HostFailedError(Exception):
    """The update of one host cannot go on."""


@dataclass(frozen=True)
class Resident:
    """A running machine of a host."""

    id: str
    name: str
    availability_set: str = ""


class Hosts(Protocol):
    """What the update of a fleet asks of its hosts; a failure is a HostFailedError or an error of the catalogue."""

    async def machines(self, host: str) -> list[Resident]:
        """The machines that run on a host and are its own."""

    async def obstacles(self, host: str, machine: str) -> list[Obstacle]:
        """What stands in the way of an update in place; a machine that is busy is waited for a while."""

    async def renew(self, host: str, machine: str, request_id: str) -> str:
        """Update a machine in place; returns why it goes on in the old process, or nothing."""

    async def drain(
        self, host: str, machines: Sequence[str], to: Sequence[str], patience_s: float, left: Left
    ) -> Mapping[str, str]:
        """Have a host take no newcomers and these of its machines leave; returns those that stay, and why."""

    async def undrain(self, host: str) -> None:
        """Have a host take newcomers again."""

    async def owner(self, machine: str, first: Sequence[str]) -> str:
        """The host that may run a machine, once nothing is under way with it; empty if none says so."""

    async def bring(self, machine: str, source: str, to: str) -> None:
        """Move a machine."""

    async def command(self, host: str) -> None:
        """Replace a host's software."""

    async def wait_healthy(self, host: str) -> str:
        """Wait until a host is well; returns what is wrong if it is not in time, or nothing."""

    async def unhealthy(self, host: str) -> str:
        """What is wrong with a host now, or nothing."""


class RealHosts:
    """The hosts that a plan names."""

    def __init__(self, plan: Plan, tls_dir: Path) -> None:
        self._plan = plan
        self._tls_dir = tls_dir

    async def machines(self, host: str) -> list[Resident]:
        """See :class:`Hosts`."""
        async with self._open(host) as source:
            return [
                Resident(one.uuid, one.name, one.spec.availability_set)
                for one in await source.list_machines()
                if one.right == machine_pb2.MACHINE_RIGHT_OWNED and one.state in _GOING
            ]

    async def obstacles(self, host: str, machine: str) -> list[Obstacle]:
        """See :class:`Hosts`."""
        deadline = time.monotonic() + self._plan.update.patience_s
        while True:
            found = await self.obstacles_now(host, machine)
            if not any(one.id == BUSY for one in found) or time.monotonic() > deadline:
                return found
            await asyncio.sleep(_LOOK_S)

    async def obstacles_now(self, host: str, machine: str) -> list[Obstacle]:
        """The same, without waiting."""
        async with self._open(host) as source:
            answer = await source.check_update(await self._wanted(source, machine))
        return [Obstacle(one.id, one.message) for one in answer.obstacles]

    async def renew(self, host: str, machine: str, request_id: str) -> str:
        """See :class:`Hosts`."""
        async with self._open(host) as source:
            try:
                done = await source.update_in_place(
                    await self._wanted(source, machine), request_id=request_id
                )
            except IncompatibleError as error:
                return error.message
        if done.outcome == up.UPDATE_OUTCOME_LOST:
            raise HostFailedError(f"{done.machine} was lost in its update: {done.reason.message}")
        return "" if done.outcome == up.UPDATE_OUTCOME_COMPLETED else done.reason.message or "it was undone"

    async def _wanted(self, source: SourceClient, machine: str) -> Wanted:
        asked, target = self._plan.update, up.UpdateTarget()
        if asked.qemu_binary and (await source.get_machine(machine)).spec.HasField("qemu"):
            target.qemu_binary = asked.qemu_binary
        return Wanted(machine, target, asked.max_pause_s, asked.notice_s or None)

    async def drain(
        self, host: str, machines: Sequence[str], to: Sequence[str], patience_s: float, left: Left
    ) -> Mapping[str, str]:
        """See :class:`Hosts`."""
        targets = [self._plan.host(name).target for name in to]
        async with self._open(host) as source:
            await source.drain(targets, options=self._options(), machines=machines)
            waiting = set(machines)
            if not waiting:
                return {}
            last = await self._followed(source, waiting, patience_s, left)
        return {
            one.machine_id: _why(one) for one in last.machines if one.machine_id in waiting
        } | dict.fromkeys(
            waiting - {one.machine_id for one in last.machines}, "it is not known to its host any more"
        )

    async def _followed(
        self, source: SourceClient, waiting: set[str], patience_s: float, left: Left
    ) -> dp.Drain:
        """Watch until all that wait have left, or none of them could move for a while."""
        last = dp.Drain()
        now = asyncio.get_running_loop().time
        states = source.watch_drain()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(None) as limit, contextlib.aclosing(states):
                async for last in states:
                    for one in last.machines:
                        if one.machine_id in waiting and one.state == dp.DRAINED_MACHINE_STATE_MOVED:
                            waiting.remove(one.machine_id)
                            left(one.machine_id, self._name(one.destination.host))
                    stuck = last.state == dp.DRAIN_STATE_STUCK
                    if not waiting or (stuck and patience_s <= 0):
                        break
                    if not stuck or limit.when() is None:
                        limit.reschedule(now() + patience_s if stuck else None)
        return last

    async def undrain(self, host: str) -> None:
        """See :class:`Hosts`."""
        async with self._open(host) as source:
            await source.undrain()

    async def owner(self, machine: str, first: Sequence[str]) -> str:
        """See :class:`Hosts`."""
        for host in sorted(self._plan.hosts, key=lambda one: one.name not in first):
            with contextlib.suppress(VmferryError):
                async with self._open(host.name) as source:
                    if await _is_at(source, machine):
                        return host.name
        return ""

    async def bring(self, machine: str, source: str, to: str) -> None:
        """See :class:`Hosts`."""
        target = self._plan.host(to).target
        async with self._open(source) as opened:
            migration = await opened.migrate(
                machine, target, options=self._options(), request_id=new_request_id()
            )
        if migration.outcome != pb.MIGRATION_OUTCOME_COMPLETED:
            outcome = pb.MigrationOutcome.Name(migration.outcome).removeprefix("MIGRATION_OUTCOME_").lower()
            raise HostFailedError(
                f"the migration of {migration.machine} to {to} is {outcome}: {migration.reason.message}"
            )

    async def command(self, host: str) -> None:
        """See :class:`Hosts`."""
        limit = self._plan.update.command_timeout_s
        try:
            async with asyncio.timeout(limit):
                code, output = await run(filled(self._plan.update.command, self._plan.host(host)))
        except TimeoutError:
            raise HostFailedError(f"the command took longer than {limit:g} s") from None
        if code:
            raise HostFailedError(f"the command ended with exit code {code}: {output}")

    async def wait_healthy(self, host: str) -> str:
        """See :class:`Hosts`."""
        return await wait_healthy(self._plan, self._plan.host(host), self._tls_dir)

    async def unhealthy(self, host: str) -> str:
        """See :class:`Hosts`."""
        return await unhealthy(self._plan, self._plan.host(host), self._tls_dir)

    def _options(self) -> pb.MigrationOptions:
        options = pb.MigrationOptions()
        if self._plan.update.notice_s:
            options.notice.FromNanoseconds(int(self._plan.update.notice_s * 1e9))
        return options

    def _name(self, identity: str) -> str:
        found: HostPlan | None = next((one for one in self._plan.hosts if one.host == identity), None)
        return found.name if found is not None else ""

    def _open(self, host: str) -> AbstractAsyncContextManager[SourceClient]:
        one = self._plan.host(host)
        return SourceClient.open(one.source, one.host, self._tls_dir, tries=_TRIES)


async def _is_at(source: SourceClient, machine: str) -> bool:
    """Whether this host may run a machine; a migration of it that an earlier run began is waited for."""
    try:
        found = await source.get_machine(machine)
        if found.migration_id:
            await source.wait(found.migration_id)
            found = await source.get_machine(machine)
    except MachineNotFoundError:
        return False
    return found.right == machine_pb2.MACHINE_RIGHT_OWNED


def _why(one: dp.DrainedMachine) -> str:
    said = [
        f"{item.destination.rpartition('/')[2]}: {item.message}" if item.destination else item.message
        for item in one.obstacles
    ]
    return "; ".join(said) or "it is still on its way, or waits for its turn"
