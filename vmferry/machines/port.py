"""The port: all that the rest of vmferry may ask of a machine, whatever runs it.

Promise: an implementation keeps the meaning written here. Every method that changes something may be called
twice with the effect of once, and a guest executes no instruction unless ``cont`` was given a permit for this
machine.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Protocol

from vmferry.handoff.gate import ResumePermit
from vmferry.machines.spec import MachineSpec
from vmferry.memory.regions import Region


class RunState(enum.StrEnum):
    """What a machine's vCPUs are doing, and why."""

    RUNNING = "running"
    PAUSED = "paused"
    PRELAUNCH = "prelaunch"
    """Started, and no instruction executed yet."""
    INMIGRATE = "inmigrate"
    """Waiting for device state."""
    POSTMIGRATE = "postmigrate"
    """Paused, and its device state was saved."""
    SHUTDOWN = "shutdown"
    """The guest switched itself off."""
    FAILED = "failed"
    """The hypervisor or the guest came upon an error it cannot go on from."""


@dataclass(frozen=True)
class VcpuTimes:
    """When vCPUs last stopped and started, on the host's monotonic clock; ``None`` if they never did."""

    boot_id: str
    """Which boot the times belong to; times of two boots or hosts do not compare."""
    last_stop_monotonic_ns: int | None
    last_start_monotonic_ns: int | None


class Machine(Protocol):
    """One machine of this host.

    Every method may raise MachineDeadError (its process is gone) and MachineFailedError (the hypervisor
    refused, did not answer in time, or gave an answer that makes no sense).
    """

    @property
    def spec(self) -> MachineSpec:
        """What the machine is made of."""

    @property
    def pid(self) -> int:
        """The process in whose address space the guest's memory lies."""

    @property
    def ram(self) -> Region:
        """The guest's memory."""

    async def run_state(self) -> RunState:
        """What the vCPUs are doing."""

    async def stop(self) -> None:
        """Pause the guest; when this returns, the last instruction has been executed."""

    async def cont(self, permit: ResumePermit) -> None:
        """Let the guest run.

        Raises:
            MachineNotOwnedError: the permit is for another machine.
            WrongPhaseError: the machine is in no state to go on from, e.g. still waiting for device state.
        """

    async def get_ready(self) -> None:
        """Do beforehand what saving and loading need, so that the guest's pause is shorter."""

    async def save_device_state(self) -> bytes:
        """Everything of the paused machine that is not RAM.

        Raises:
            WrongPhaseError: the machine is not paused.
        """

    async def load_device_state(self, data: bytes) -> None:
        """Give a machine that waits for it the device state; when this returns, it is loaded and paused.

        Raises:
            WrongPhaseError: the machine does not wait for device state.
        """

    async def announce(self) -> None:
        """Tell the network where the machine is now."""

    async def send_serial(self, text: str) -> None:
        """Type ``text`` at the machine's serial port."""

    async def vcpu_times(self) -> VcpuTimes | None:
        """When the vCPUs stopped and started; ``None`` if this kind of machine does not say."""

    async def alive(self) -> bool:
        """Whether the machine's process runs."""

    async def quit(self) -> None:
        """Ask the machine's process to end; its memory is lost."""

    async def close(self) -> None:
        """Let go of the machine, which lives on; a later call takes hold of it again."""
