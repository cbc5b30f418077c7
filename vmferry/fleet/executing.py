"""A fleet's update as it is carried out: each host is emptied, updated, looked at, and gets its machines back.

Promise: what is done next is decided by ``rollout`` on what the journal says; each step that cannot be looked up
afterwards is in the journal before it is done; the first host that fails ends everything that has not begun, and what
is under way elsewhere is brought to its end. A run that follows on another asks the hosts where the machines are.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Final

from vmferry.client.draining import new_request_id
from vmferry.client.source import SourceClient
from vmferry.errors import MachineNotFoundError, VmferryError
from vmferry.fleet import rollout
from vmferry.fleet.health import filled, run, unhealthy, wait_healthy
from vmferry.fleet.journal import Journal
from vmferry.fleet.plan import HostPlan, Plan
from vmferry.fleet.rollout import Entry, Kind, Stage
from vmferry.v1 import machine_pb2
from vmferry.v1 import migration_pb2 as pb
from vmferry.v1.compatibility_pb2 import SEVERITY_BLOCKS

Say = Callable[[str], None]
_GOING: Final = (machine_pb2.MACHINE_STATE_RUNNING, machine_pb2.MACHINE_STATE_PAUSED)


class HostFailedError(Exception):
    """The update of one host cannot go on."""


class NotMovedError(HostFailedError):
    """A machine did not go to a host, and is where it was."""


class Update:
    """One run."""

    def __init__(self, plan: Plan, journal: Journal, tls_dir: Path, say: Say) -> None:
        self._plan = plan
        self._journal = journal
        self._tls_dir = tls_dir
        self._say = say

    async def run(self) -> str:
        """Update all hosts that are not done; returns why it came to a halt, or nothing."""
        for name in self._journal.progress.failed:
            self._write(name, Kind.RETRIED)
        running = {asyncio.create_task(self._host(name)) for name in self._journal.progress.down}
        try:
            while True:
                if not running and (why := await self._between()):
                    return why
                for name in rollout.may_begin(self._plan, self._journal.progress):
                    self._write(name, Kind.BEGUN)
                    running.add(asyncio.create_task(self._host(name)))
                if not running:
                    break
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
        progress = self._journal.progress
        return "; ".join(f"{name}: {progress.of(name).note}" for name in progress.failed)

    async def _between(self) -> str:
        """Look at what has been updated before anything else begins."""
        progress = self._journal.progress
        if progress.failed or rollout.finished(self._plan, progress):
            return ""
        for host in self._plan.hosts:
            if progress.of(host.name).stage is Stage.DONE:
                wrong = await unhealthy(self._plan, host, self._tls_dir)
                if wrong:
                    return f"{host.name} was updated, and is not healthy: {wrong}"
        return ""

    async def _host(self, name: str) -> None:
        host = self._plan.host(name)
        try:
            if not self._of(name).empty:
                await self._empty(host)
                self._write(name, Kind.EMPTY)
            if not self._of(name).updated:
                await self._replace(host)
                self._write(name, Kind.UPDATED)
            await self._well(host)
            for machine_id in list(self._of(name).away):
                await self._bring_back(host, machine_id)
        except (HostFailedError, VmferryError, OSError) as error:
            self._write(name, Kind.FAILED, note=str(error)[:500])
        else:
            self._write(name, Kind.DONE)

    async def _well(self, host: HostPlan) -> None:
        if wrong := await wait_healthy(self._plan, host, self._tls_dir):
            raise HostFailedError(wrong)

    # Machines

    async def _empty(self, host: HostPlan) -> None:
        async with self._open(host) as source:
            for machine_id, away in list(self._of(host.name).away.items()):
                await self._settled(source, machine_id, away.target)
            for machine in await source.list_machines():
                if machine.right == machine_pb2.MACHINE_RIGHT_OWNED and machine.state in _GOING:
                    await self._send_away(host, source, machine)

    async def _settled(self, source: SourceClient, machine_id: str, target: str) -> None:
        """A migration that an earlier run began has ended."""
        try:
            machine = await source.get_machine(machine_id)
        except MachineNotFoundError:
            return
        if machine.migration_id:
            await source.wait(machine.migration_id)
        self._say(f"{machine.name}: was on its way to {target}")

    async def _send_away(self, host: HostPlan, source: SourceClient, machine: machine_pb2.Machine) -> None:
        why = "no other host is up"
        sets = [machine.spec.availability_set]
        for name in rollout.targets(self._plan, self._journal.progress, host.name, sets):
            target = self._plan.host(name)
            try:
                report = await source.plan(machine.uuid, target.target, predict=False)
                if not report.compatible:
                    blocking = [one.message for one in report.items if one.severity == SEVERITY_BLOCKS]
                    why = f"{name}: {'; '.join(blocking)}"
                    continue
                request_id = new_request_id()
                self._write(host.name, Kind.LEAVING, machine=machine.uuid, target=name, request_id=request_id)
                await self._move(source, machine.uuid, target, request_id)
            except (VmferryError, NotMovedError) as error:
                why = f"{name}: {error}"
                continue
            self._say(f"{machine.name}: {host.name} -> {name}")
            return
        raise HostFailedError(f"{machine.name} cannot be moved away: {why}")

    async def _bring_back(self, host: HostPlan, machine_id: str) -> None:
        away = self._of(host.name).away[machine_id]
        elsewhere = self._plan.host(away.target)
        async with self._open(elsewhere) as source:
            if await self._is_at(source, machine_id):
                await self._move(source, machine_id, host, new_request_id())
        async with self._open(host) as source:
            if not await self._is_at(source, machine_id):
                raise HostFailedError(f"machine {machine_id} is neither here nor at {away.target}")
        self._write(host.name, Kind.RETURNED, machine=machine_id)
        self._say(f"{machine_id}: {away.target} -> {host.name}")

    async def _is_at(self, source: SourceClient, machine_id: str) -> bool:
        try:
            machine = await source.get_machine(machine_id)
        except MachineNotFoundError:
            return False
        if machine.migration_id:  # an earlier run's
            await source.wait(machine.migration_id)
            return await self._is_at(source, machine_id)
        return machine.right == machine_pb2.MACHINE_RIGHT_OWNED

    async def _move(self, source: SourceClient, machine_id: str, to: HostPlan, request_id: str) -> None:
        options = pb.MigrationOptions()
        if self._plan.update.notice_s:
            options.notice.FromNanoseconds(int(self._plan.update.notice_s * 1e9))
        migration = await source.migrate(machine_id, to.target, options=options, request_id=request_id)
        if migration.outcome != pb.MIGRATION_OUTCOME_COMPLETED:
            outcome = pb.MigrationOutcome.Name(migration.outcome).removeprefix("MIGRATION_OUTCOME_").lower()
            why = (
                f"the migration of {migration.machine} to {to.name} is {outcome}: {migration.reason.message}"
            )
            unknown = migration.outcome == pb.MIGRATION_OUTCOME_UNKNOWN
            raise HostFailedError(why) if unknown else NotMovedError(why)

    # The rest

    async def _replace(self, host: HostPlan) -> None:
        command = filled(self._plan.update.command, host)
        if not command:
            return
        self._say(f"{host.name}: {' '.join(command)}")
        try:
            async with asyncio.timeout(self._plan.update.command_timeout_s):
                code, output = await run(command)
        except TimeoutError:
            limit = self._plan.update.command_timeout_s
            raise HostFailedError(f"the command took longer than {limit:g} s") from None
        if code:
            raise HostFailedError(f"the command ended with exit code {code}: {output}")

    def _open(self, host: HostPlan) -> AbstractAsyncContextManager[SourceClient]:
        return SourceClient.open(host.source, host.host, self._tls_dir)

    def _of(self, name: str) -> rollout.HostProgress:
        return self._journal.progress.of(name)

    def _write(
        self,
        name: str,
        kind: Kind,
        *,
        machine: str = "",
        target: str = "",
        request_id: str = "",
        note: str = "",
    ) -> None:
        self._journal.write(Entry(name, kind, machine, target, request_id, note))
        if kind not in (Kind.LEAVING, Kind.RETURNED):
            self._say(f"{name}: {kind.value}" + (f": {note}" if note else ""))
