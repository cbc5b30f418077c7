"""Hypervisors of a host, and guests that write to their memory.

A guest's memory is a few pages with the number of their last write; numbers never repeat. A hypervisor outlives the
services and dies with its host.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from tests.simulation.cluster.clock import Process
from vmferry.errors import (
    MachineDeadError,
    MachineExistsError,
    MachineFailedError,
    MachineNotFoundError,
    MachineNotOwnedError,
    WrongPhaseError,
)
from vmferry.handoff.gate import ResumePermit
from vmferry.machines.port import RunState
from vmferry.machines.spec import MachineSpec

PAGES: Final = 3
_OPERATION_S: Final = 0.001
_STOPPED: Final = (RunState.PAUSED, RunState.PRELAUNCH, RunState.POSTMIGRATE)


def memory_root(pages: list[int]) -> bytes:
    """The digest of a guest's memory."""
    return hashlib.sha256(repr(pages).encode()).digest()


@dataclass
class Guest:
    """A hypervisor's process with its guest."""

    spec: MachineSpec
    host: str
    state: RunState
    pages: list[int] = field(default_factory=lambda: [0] * PAGES)
    dirty: set[int] = field(default_factory=set)
    alive: bool = True


class World(Protocol):
    """What guests need of the world around them."""

    def step(self, kind: str, host: str, detail: str) -> str:
        """Come to a boundary; the answer names an error, or is empty."""

    def guest_writes(self, guest: Guest) -> None:
        """The guest executes."""

    def guest_changed(self, guest: Guest) -> None:
        """It stopped, started, was loaded or is gone."""

    def resumed(self, guest: Guest) -> None:
        """Its virtual CPUs are about to start."""


@dataclass(frozen=True)
class HypervisorProcess:
    """What ``vmferry.machines.process.ProcessIdentity`` is to the real ones."""

    guest: Guest
    pid: int = 1

    def same_as(self, other: HypervisorProcess | None) -> bool:
        """Whether both are the same process."""
        return other is not None and other.guest is self.guest

    def age_s(self) -> float:
        """All of them have just been started."""
        return 0.0

    def alive(self) -> bool:
        """Whether it runs."""
        return self.guest.alive

    async def wait_ended(self, patience_s: float) -> bool:
        """Wait until it does not."""
        return not self.guest.alive

    def send_signal(self, number: int) -> None:
        """It is obeyed."""
        self.guest.alive = False


@dataclass(frozen=True)
class Entry:
    """What ``vmferry.machines.directory.MachineRecord`` is to the real ones."""

    spec: MachineSpec
    process: HypervisorProcess
    alive: bool


class Directory:
    """The machines of one host, for one process."""

    def __init__(self, world: World, guests: dict[str, Guest], process: Process) -> None:
        self._world = world
        self._guests = guests
        self._process = process

    def list(self) -> list[Entry]:
        """All machines."""
        self._process.check()
        return [Entry(one.spec, HypervisorProcess(one), one.alive) for one in self._guests.values()]

    def find(self, name_or_uuid: str) -> Entry:
        """One machine."""
        for entry in self.list():
            if name_or_uuid in (entry.spec.name, entry.spec.uuid):
                return entry
        raise MachineNotFoundError(f"no machine {name_or_uuid}")

    def open(self, entry: Entry, *, observe: bool = False) -> Machine:
        """Take hold of a machine."""
        if not entry.process.alive():
            raise MachineDeadError("it has no running process")
        return Machine(self._world, entry.process.guest, self._process)

    def forget(self, entry: Entry, *, remove_ram: bool) -> None:
        """Remove what is left of a machine."""
        self._process.check()
        if self._guests.get(entry.spec.uuid) is entry.process.guest:
            del self._guests[entry.spec.uuid]
            self._world.guest_changed(entry.process.guest)

    def start(self, spec: MachineSpec) -> Machine:
        """Start a hypervisor that waits for a guest's state."""
        self._process.check()
        if spec.uuid in self._guests:
            raise MachineExistsError("the identity is taken")
        guest = Guest(spec, self._process.host, RunState.INMIGRATE)
        self._guests[spec.uuid] = guest
        return Machine(self._world, guest, self._process)


class Machine:
    """A hold of a machine, with the methods of ``vmferry.machines.port.Machine`` that the services call."""

    pid = 1

    def __init__(self, world: World, guest: Guest, holder: Process) -> None:
        self.guest = guest
        self.spec = guest.spec
        self.process = HypervisorProcess(guest)
        self._world = world
        self._holder = holder
        self._loaded_at = -math.inf

    async def _operation(self, name: str) -> None:
        await asyncio.sleep(_OPERATION_S)
        error = self._world.step(name, self.guest.host, self.spec.name)
        if not self._holder.alive:
            await asyncio.Event().wait()  # for ever: it is not executed any more
        if not self.guest.alive:
            raise MachineDeadError(f"machine {self.spec.name} has died")
        if error:
            raise MachineFailedError(f"the hypervisor did not {name}")

    async def run_state(self) -> RunState:
        """What the virtual CPUs do."""
        await asyncio.sleep(0)
        if not self.guest.alive:
            raise MachineDeadError(f"machine {self.spec.name} has died")
        return self.guest.state

    async def stop(self) -> None:
        """Pause the guest."""
        await self._operation("stop")
        if self.guest.state is RunState.RUNNING:
            self._world.guest_writes(self.guest)
            self.guest.state = RunState.PAUSED
            self._world.guest_changed(self.guest)

    async def cont(self, permit: ResumePermit) -> None:
        """Let the guest run."""
        if permit.machine_id != self.spec.uuid:
            raise MachineNotOwnedError("the permit is for another machine")
        self._loaded_at = -math.inf
        await self._operation("cont")
        if self.guest.state is RunState.RUNNING:
            return
        if self.guest.state not in _STOPPED:
            raise WrongPhaseError(f"it is {self.guest.state}")
        self._world.resumed(self.guest)
        self.guest.state = RunState.RUNNING
        self._world.guest_writes(self.guest)
        self._world.guest_changed(self.guest)

    async def get_ready(self) -> None:
        """Nothing to do."""

    async def save_device_state(self, *, all_come: Callable[[], None] = lambda: None) -> bytes:
        """The device state of the paused guest."""
        await self._operation("save")
        self.guest.state = RunState.POSTMIGRATE
        all_come()
        return b"devices"

    async def load_device_state(self, data: bytes) -> None:
        """Load device state."""
        await self._operation("load")
        if self.guest.state is not RunState.INMIGRATE:
            raise WrongPhaseError(f"it is {self.guest.state}")
        self.guest.state = RunState.PAUSED
        self._loaded_at = asyncio.get_running_loop().time()
        self._world.guest_changed(self.guest)

    def just_loaded(self, within_s: float) -> bool:
        """Whether this hold loaded it so short a time ago."""
        recent = asyncio.get_running_loop().time() - self._loaded_at < within_s
        return recent and self.guest.alive

    async def announce(self) -> None:
        """Nobody listens."""

    async def alive(self) -> bool:
        """Whether its process runs."""
        return self.guest.alive

    async def quit(self) -> None:
        """End the process."""
        await self._operation("quit")
        self.guest.alive = False
        self._world.guest_changed(self.guest)

    async def close(self) -> None:
        """Let go of it."""

    async def hypervisor(self) -> Any:
        """Not asked of a micro-VM."""
        raise NotImplementedError
