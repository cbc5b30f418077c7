"""A few hosts with their services, guests, disks and a network; faults strike at the boundaries that a plan names.

Every call that changes a disk, every message and every operation of a hypervisor is a boundary with a number. What a
plan says for a number happens just before: so every moment between two effects can be hit.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable, Mapping
from contextvars import Context
from dataclasses import dataclass, field, replace
from typing import Any, Final

from source_svc.history import ALL
from tests.simulation.cluster.clock import Killed, Loop, Process, spawn
from tests.simulation.cluster.disk import HostDisk, View
from tests.simulation.cluster.guests import Directory, Guest
from tests.simulation.cluster.monitor import Monitor, Observed, WatchedLedger
from tests.simulation.cluster.network import Network
from tests.simulation.cluster.services import (
    JOURNALS,
    SimulatedDestination,
    SimulatedSource,
    make_host,
    start_request,
)
from vmferry.errors import InternalError, VmferryError
from vmferry.handoff.ledger import HostLedger, Role
from vmferry.machines.port import RunState
from vmferry.machines.spec import MachineSpec, new_spec
from vmferry.v1 import migration_pb2 as pb

RESTART_S: Final = 0.3
REBOOT_S: Final = 1.0
_START_AGAIN_S: Final = 1.0
_STOPPING_S: Final = 5.0
_POLL_S: Final = 0.2
Plan = Mapping[int, tuple[str, ...]]
"""Faults by the number of the boundary at which they strike."""


@dataclass
class Running:
    """One service of a host."""

    process: Process
    service: Any
    ready: bool = False


@dataclass
class Site:
    """One host."""

    disk: HostDisk = field(default_factory=HostDisk)
    guests: dict[str, Guest] = field(default_factory=dict)
    services: dict[Role, Running] = field(default_factory=dict)
    failing_syncs: int = 0


class World:
    """Everything, driven from outside."""

    def __init__(
        self, hosts: str, machines: int, plan: Plan, *, loop: Loop, storm: Storm | None = None
    ) -> None:
        self.loop = loop
        self.monitor = Monitor()
        self.network = Network(self)
        self.sites = {name: Site() for name in hosts}
        self.machines = [_machine(number) for number in range(machines)]
        self.boundaries: list[str] = []
        """What each boundary was, from the moment the services run."""
        self.faulted_at = -1.0
        self.struck: list[str] = []
        self.mended_at = -1
        """Number of the first boundary after everything was mended."""
        self.again = True
        """Whether the machines are to migrate once more when they have come to rest."""
        self._plan = plan
        self.storm = storm
        self._armed = False
        self._healed = False
        self._version = 0
        self._migrations = 0
        for name, site in self.sites.items():
            self._prepare(name, site)
        for number, spec in enumerate(self.machines):
            self._bear(spec, hosts[number % len(hosts)])

    # Beginning

    def _prepare(self, name: str, site: Site) -> None:
        self.monitor.hosts[name] = Observed(site.disk, site.guests, self._watching(name))
        site.disk.watch = lambda path: self.monitor.journal_changed(name, path)

    def _watching(self, host: str) -> WatchedLedger:
        """What reads a host's journals from outside of the world."""
        disk = self.sites[host].disk
        ledger = WatchedLedger(JOURNALS, View(disk, Process("observer", host), lambda kind, detail: ""))
        ledger.changed = disk.versions
        return ledger

    def _bear(self, spec: MachineSpec, host: str) -> None:
        site = self.sites[host]
        guest = Guest(spec, host, RunState.RUNNING)
        site.guests[spec.uuid] = guest
        self.monitor.latest[spec.uuid] = guest.pages
        self.monitor.lost.add(spec.uuid)  # until it is born
        self.monitor.hosts[host].ledger.birth(spec.uuid)
        self.monitor.lost.discard(spec.uuid)
        self.guest_writes(guest)

    def start(self) -> None:
        """Start all services; from now on faults may strike."""
        for host in self.sites:
            for role in (Role.DESTINATION, Role.SOURCE):
                self._start(host, role)
        self.run(0.2)
        self._armed = True

    def _start(self, host: str, role: Role) -> None:
        site = self.sites[host]
        if role in site.services:
            return
        process = Process(f"{role}@{host}", host)
        try:
            running = process.context.run(self._make, host, role, process)
        except (OSError, VmferryError, Killed):
            process.alive = False
            site.disk.release(process)
            self._later(_START_AGAIN_S, self._start, host, role)
            return
        if process.alive:
            site.services[role] = running
            spawn(self.loop, process, self._recover(running))

    def _make(self, host: str, role: Role, process: Process) -> Running:
        site = self.sites[host]
        ledger = HostLedger(JOURNALS, View(site.disk, process, lambda *what: self._disk_step(host, *what)))
        ledger.lock_role(role)
        directory = Directory(self, site.guests, process)

        def journal_broken(error: VmferryError) -> None:
            spawn(self.loop, process, self._stop(running))

        stands_on = make_host(host, ledger, directory, journal_broken)
        if role is Role.SOURCE:
            service: Any = SimulatedSource(stands_on, self.network, process, self.unexpected)
        else:
            service = SimulatedDestination(stands_on)
        running = Running(process, service)
        return running

    async def _recover(self, running: Running) -> None:
        try:
            await running.service.recover()
        except Exception as error:  # noqa: BLE001 - any error of a start ends the service
            if not isinstance(error, OSError):
                self.unexpected(f"{running.process.name} cannot start: {error!r}")
            self.kill(running.process.host, _role_of(running))
            return
        running.ready = True

    async def _stop(self, running: Running) -> None:
        """End a service in order, as it does when a journal could not be written."""
        running.ready = False
        with contextlib.suppress(TimeoutError, VmferryError):
            async with asyncio.timeout(_STOPPING_S):
                await running.service.stop()
                await running.service.close()
        if running.process.alive:
            self.kill(running.process.host, _role_of(running))

    # What the parts of the world ask

    def serving(self, host: str) -> tuple[Process, Any] | None:
        """The destination service of a host that answers now."""
        running = self.sites[host].services.get(Role.DESTINATION)
        return (running.process, running.service) if running is not None and running.ready else None

    def jitter(self) -> float:
        """By how much a message takes longer than others."""
        return 1.0 if self.storm is None else self.storm.chance.choice((0.5, 1.0, 1.0, 3.0, 20.0))

    def unexpected(self, what: str) -> None:
        """Something happened that no fault explains."""
        self.monitor.broken(f"unexpected: {what}")

    def guest_writes(self, guest: Guest) -> None:
        """The guest executes, and writes to a page."""
        if guest.alive and guest.state is RunState.RUNNING:
            self._version += 1
            page = self._version % len(guest.pages)
            guest.pages[page] = self._version
            guest.dirty.add(page)
            self.monitor.latest[guest.spec.uuid] = list(guest.pages)

    def guest_changed(self, guest: Guest) -> None:
        """A guest stopped, started, was loaded or is gone."""
        self.monitor.check(guest.spec.uuid)

    def resumed(self, guest: Guest) -> None:
        """Virtual CPUs are about to start."""
        self.monitor.resumed(guest)

    def step(self, kind: str, host: str, detail: str) -> str:
        """Come to a boundary: strike with what the plan says."""
        if not self._armed:
            return ""
        number = len(self.boundaries)
        self.boundaries.append(f"{kind}@{host} {detail}")
        answer = ""
        faults = self._plan.get(number, ())
        if self.storm is not None and not self._healed:
            faults = self.storm.faults(kind, host)
        for fault in faults:
            self.faulted_at = self.loop.time()
            self.struck.append(f"{number}={fault}")
            answer = self._strike(fault, host) or answer
        return answer

    def _later(self, seconds: float, act: Callable[..., None], *args: Any) -> None:
        """Do something as nobody in particular: no process that ends can take it back."""
        self.loop.call_later(seconds, act, *args, context=Context())

    def _disk_step(self, host: str, kind: str, detail: str) -> str:
        return self.step(kind, host, detail)

    # Faults

    def _strike(self, fault: str, host: str) -> str:
        """Do what a fault says; what only the one who asks can do is returned."""
        what, _, where = fault.partition(":")
        match what:
            case "kill":
                name, _, role = where.partition("/")
                self.kill(name, Role(role))
            case "crash":
                name, _, how = where.partition("/")
                self.crash(name, how)
            case "cut":
                self.network.cuts.add((where[0], where[1]))
            case "full":
                self.sites[where].disk.full = True
            case "cancel":
                self.cancel()
            case _:
                return what
        return ""

    def kill(self, host: str, role: Role) -> None:
        """End a service at once; it is started again."""
        site = self.sites[host]
        running = site.services.pop(role, None)
        if running is None:
            return
        running.process.alive = False
        site.disk.release(running.process)
        self._later(RESTART_S, self._start, host, role)

    def crash(self, host: str, how: str) -> None:
        """Cut a host from power; it comes back with what its disk kept."""

        def crash() -> None:
            site = self.sites[host]
            for running in site.services.values():
                running.process.alive = False
            site.services.clear()
            for guest in site.guests.values():
                guest.alive = False
            site.guests.clear()
            site.disk.crash(how)
            self.monitor.hosts[host].ledger = self._watching(host)

        self.monitor.crashing(host, crash)
        for role in (Role.DESTINATION, Role.SOURCE):
            self._later(REBOOT_S, self._start, host, role)

    def heal(self) -> None:
        """From now on everything works."""
        self._healed = True
        self.mended_at = len(self.boundaries)
        self.network.cuts.clear()
        for site in self.sites.values():
            site.disk.full = False

    @property
    def broken(self) -> bool:
        """Whether something stays broken until it is mended."""
        return bool(self.network.cuts) or any(site.disk.full for site in self.sites.values())

    # Those who use the services

    def migrate(self, machine: int, destination: str, *, tries: int = 1) -> None:
        """Ask the source for a migration."""
        spec = self.machines[machine]
        self._migrations += 1
        request = start_request(spec.name, destination, self._migrations.to_bytes(16, "big"))
        origin = self.monitor.owner(spec.uuid)
        running = self.sites[origin].services.get(Role.SOURCE) if origin and origin != destination else None
        if running is not None and running.ready:
            spawn(self.loop, running.process, _ignoring_errors(running.service.StartMigration(request, None)))
        elif tries > 1:
            self._later(_POLL_S, lambda: self.migrate(machine, destination, tries=tries - 1))

    def cancel(self) -> None:
        """Ask every source to cancel everything."""
        for site in self.sites.values():
            running = site.services.get(Role.SOURCE)
            if running is not None:
                for migration in running.service._migrations.open():
                    request = pb.CancelMigrationRequest(id=migration.id)
                    work = _ignoring_errors(running.service.CancelMigration(request, None))
                    spawn(self.loop, running.process, work)

    def run(self, seconds: float, *, until_settled: bool = False) -> bool:
        """Let the world go on; false if the machines have not come to rest by then, or a promise broke."""
        end = self.loop.time() + seconds
        while self.loop.time() < end and not self.monitor.violation:
            if until_settled and self._armed and self.settled():
                return True
            self.loop.run_until_complete(asyncio.sleep(min(_POLL_S, end - self.loop.time())))
        return not self.monitor.violation and (not until_settled or self.settled())

    def internal_errors(self) -> list[str]:
        """Migrations that ended for a reason that nobody has thought of."""
        return [
            message.reason.message
            for site in self.sites.values()
            if Role.SOURCE in site.services
            for message in site.services[Role.SOURCE].service._migrations.select(ALL)
            if message.reason.reason == InternalError.reason
        ]

    def settled(self) -> bool:
        """Whether every machine has come to rest, and every service answers."""
        return all(map(self._idle, self.sites.values())) and not any(self.unsettled())

    def _idle(self, site: Site) -> bool:
        if len(site.services) < len((Role.SOURCE, Role.DESTINATION)) or not all(
            one.ready for one in site.services.values()
        ):
            return False
        # The source of a machine that died with its new host goes on asking about it.
        open_ = site.services[Role.SOURCE].service._migrations.open()
        machines = [migration.message.machine_id for migration in open_]
        return all(self.monitor.awaits_a_person(one) or not self.monitor.owner(one) for one in machines)

    def unsettled(self) -> list[str]:
        """Why machines have not come to rest."""
        reasons = [self.monitor.unsettled(spec.uuid) for spec in self.machines]
        return [reason for reason in reasons if reason]

    def dispose(self) -> None:
        """End the world."""
        for site in self.sites.values():
            for running in site.services.values():
                running.process.alive = False
        self.loop.dispose()


class Storm:
    """Faults by chance, of one seed."""

    def __init__(self, seed: int, hosts: str) -> None:
        self.chance = random.Random(seed)
        self._hosts = hosts
        self._rate = self.chance.choice((0.002, 0.01, 0.03))

    def faults(self, kind: str, host: str) -> tuple[str, ...]:
        """What strikes at this boundary."""
        if self.chance.random() > self._rate:
            return ()
        return (self._choose(kind),)

    def _choose(self, kind: str) -> str:
        chance = self.chance
        some = chance.choice(self._hosts)
        other = chance.choice([name for name in self._hosts if name != some])
        anywhere = [
            f"kill:{some}/source",
            f"kill:{some}/destination",
            f"crash:{some}/{chance.choice(('lose', 'keep', 'torn'))}",
            f"cut:{some}{other}",
            f"full:{some}",
            "cancel:",
        ]
        here = {
            "message": ["drop", "twice", "late", "overtaken"] * 3,
            "sync": ["eio"],
            "write": ["eio"],
            "syncdir": ["eio"],
            "cont": ["fail"],
            "load": ["fail"],
            "save": ["fail"],
        }
        return chance.choice([*anywhere, *here.get(kind, [])])


async def _ignoring_errors(work: Any) -> None:
    with contextlib.suppress(VmferryError):
        await work


def _role_of(running: Running) -> Role:
    return Role.SOURCE if isinstance(running.service, SimulatedSource) else Role.DESTINATION


def _machine(number: int) -> MachineSpec:
    made = new_spec(f"m{number}", 1, "canary")
    return replace(made, uuid=f"00000000-0000-4000-8000-{number:012d}")
