"""One micro-VM: its run states, and its device state as one stream.

Promise: guest code runs only in state ``running``; exactly one function changes the state, and tells the listeners.
A device state is loaded whole or not at all::

    prelaunch ──cont──► running ──stop──► paused ──saved──► postmigrate ──cont──► running
    inmigrate ──loaded──► paused
    running ──guest halts──► shutdown        running ──guest faults──► internal-error      (both for good)
"""

from __future__ import annotations

import asyncio
import enum
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from vmferry.errors import DeviceStateError, WrongPhaseError
from vmferry.machines.microvm import devicestate
from vmferry.machines.microvm.activity import Activity
from vmferry.machines.microvm.cpu import Cpu
from vmferry.machines.microvm.devices import NOT_GIVEN, Boot, Clock, Power, Serial
from vmferry.machines.microvm.engine import Ending, Engine
from vmferry.machines.microvm.guests import IMAGE_BASE, Program
from vmferry.machines.microvm.metadata import Metadata
from vmferry.machines.microvm.nic import Backend, Nic
from vmferry.machines.microvm.ports import Part, PortBus
from vmferry.machines.microvm.ram import Ram

_log = logging.getLogger(__name__)

Listener = Callable[[str, Mapping[str, Any] | None], None]
"""Called with the name and the data of each event."""


class RunState(enum.StrEnum):
    """What the machine is doing, in QEMU's words."""

    PRELAUNCH = "prelaunch"
    RUNNING = "running"
    PAUSED = "paused"
    INMIGRATE = "inmigrate"
    POSTMIGRATE = "postmigrate"
    SHUTDOWN = "shutdown"
    INTERNAL_ERROR = "internal-error"


STOPPED: Final = frozenset({RunState.PRELAUNCH, RunState.PAUSED, RunState.POSTMIGRATE})
"""States from which the guest can go on, and in which its device state can be saved."""


@dataclass(frozen=True)
class Announcement:
    """How often, and how fast, a machine announces itself. The defaults are QEMU's."""

    initial_ms: int = 50
    max_ms: int = 550
    rounds: int = 5
    step_ms: int = 100


@dataclass(frozen=True)
class MachineOptions:
    """What a machine is made of."""

    name: str
    uuid: str
    memory_bytes: int
    ram_file: Path
    serial_file: Path
    mac: bytes
    netdev: str | None
    program: Program
    parameters: list[int | None]
    incoming: bool
    self_track: bool
    metadata: Path | None = None
    """Where the host's metadata service finds the device that leads to it; None: there is no such device."""


class Machine:
    """CPU, RAM and devices of one guest. Belongs to the event loop it was made in."""

    def __init__(self, options: MachineOptions) -> None:
        self.options = options
        self.state = RunState.INMIGRATE if options.incoming else RunState.PRELAUNCH
        self.listeners: list[Listener] = []
        self._loop = asyncio.get_running_loop()
        self._announcing: asyncio.TimerHandle | None = None
        self._arrived = False
        self._ram = Ram(options.ram_file, options.memory_bytes)
        if options.self_track:
            self._ram.track_writes()
        bus = PortBus()
        self._cpu = Cpu(self._ram)
        self.serial = Serial(bus, options.serial_file)
        self._clock = Clock(bus)
        power = Power(bus, self._clock, self._cpu.uc.emu_stop)
        self._backend = Backend(options.netdev) if options.netdev else None
        self._nic = Nic(bus, self._cpu, options.mac, self._backend)
        parameters = [NOT_GIVEN if value is None else value for value in options.parameters]
        program = options.program.name
        self._boot = Boot(bus, memory_bytes=options.memory_bytes, program=program, parameters=parameters)
        self._metadata = Metadata(bus, options.metadata) if options.metadata is not None else None
        parts: tuple[Part, ...] = (self._boot, self._cpu, self._clock, power, self.serial, self._nic)
        if self._metadata is not None:  # no part of other machines, whose state older releases understand
            parts = (*parts, self._metadata)
        self._parts = {part.name: part for part in parts}
        self._activity = Activity.of(options.uuid, os.environ)
        self._engine = Engine(self._cpu, bus, self._clock, power, self._activity, self._on_ending)
        self.times = self._engine.times

    async def listen(self) -> None:
        """Let the host's services reach the devices that wait for them."""
        if self._metadata is not None:
            await self._metadata.listen()

    def cont(self) -> None:
        """Let the guest run; returns when it has begun.

        Raises:
            WrongPhaseError: there is nothing to go on with: no state has come yet, or the guest has ended.
        """
        if self.state is RunState.RUNNING:
            return
        self._require(STOPPED, "go on")
        if not self._boot.booted:
            self._ram.write(IMAGE_BASE, self.options.program.image_path.read_bytes())
            self._cpu.rip = IMAGE_BASE
            self._boot.booted = True
        self._engine.start()
        self._set_state(RunState.RUNNING, "RESUME")
        if self._arrived:
            self._arrived = False
            self.announce(Announcement())

    def stop(self) -> None:
        """Pause the guest; returns when it has executed its last instruction. Without effect if it does not run."""
        if self.state is not RunState.RUNNING:
            return
        self._engine.stop()
        if self._engine.ended is None:
            self._set_state(RunState.PAUSED, "STOP")
        else:
            self._note_ending()

    def save(self) -> bytes:
        """The device state of the paused guest."""
        self._require(STOPPED, "be saved")
        sections = [devicestate.Section(p.name, p.version, p.save()) for p in self._parts.values()]
        return devicestate.render(sections)

    def saved(self) -> None:
        """Note that the device state has left."""
        self._require(STOPPED, "have left")
        self._set_state(RunState.POSTMIGRATE)

    def load(self, stream: bytes) -> None:
        """Take the device state of a machine like this one; on any error nothing has changed.

        Raises:
            DeviceStateError: the stream is damaged, or of a machine unlike this one.
        """
        self._require({RunState.INMIGRATE}, "take device state")
        sections = {section.name: section for section in devicestate.parse(stream)}
        if unknown := sorted(sections.keys() - self._parts.keys()):
            raise DeviceStateError(f"unknown section {unknown[0]!r} in the device state", section=unknown[0])
        if missing := sorted(self._parts.keys() - sections.keys()):
            raise DeviceStateError(
                f"section {missing[0]!r} is missing in the device state", section=missing[0]
            )
        changes = [
            part.prepare(devicestate.upgraded(sections[name], part.version, part.upgrades))
            for name, part in self._parts.items()
        ]
        for change in changes:
            change()
        self._arrived = True
        self._set_state(RunState.PAUSED)

    def clock(self) -> dict[str, int | None]:
        """The guest's time of day: now, the latest that it was told, and how far off it was at its last start."""
        clock = self._clock
        return {
            "realtime-ns": clock.realtime_ns(),
            "told-ns": clock.told_ns,
            "offset-at-start-ns": clock.offset_at_start_ns,
        }

    def keep_clock(self, realtime_ns: int) -> None:
        """Never tell the guest an earlier time of day than this, which it was told by another process."""
        self._require({*STOPPED, RunState.INMIGRATE}, "be told a time")
        self._clock.keep(realtime_ns)

    def announce(self, how: Announcement) -> None:
        """Announce the machine's address now, and in further rounds; replaces an announcement under way."""
        if self._announcing is not None:
            self._announcing.cancel()
        self._announce_round(how, how.rounds, how.initial_ms)

    def close(self) -> None:
        """Stop for good: the guest executes nothing more, its RAM file is complete."""
        if self._announcing is not None:
            self._announcing.cancel()
        self._engine.close()
        self._activity.close()
        self.serial.close()
        if self._metadata is not None:
            self._metadata.close()
        if self._backend is not None:
            self._backend.close()

    def emit(self, event: str, data: Mapping[str, Any] | None = None) -> None:
        """Tell all listeners."""
        for listener in list(self.listeners):
            listener(event, data)

    def _announce_round(self, how: Announcement, left: int, delay_ms: int) -> None:
        self._nic.announce()
        self._announcing = None
        if left > 1:
            following = min(delay_ms + how.step_ms, how.max_ms)
            self._announcing = self._loop.call_later(
                delay_ms / 1000, self._announce_round, how, left - 1, following
            )

    def _on_ending(self) -> None:
        """Called on the CPU thread."""
        self._loop.call_soon_threadsafe(self._note_ending)

    def _note_ending(self) -> None:
        ended = self._engine.ended
        if ended is None or self.state is not RunState.RUNNING:
            return
        if ended.kind is Ending.HALTED:
            _log.info("%s", ended.reason)
            self.emit("SHUTDOWN", {"guest": True, "reason": "guest-shutdown"})
            self._set_state(RunState.SHUTDOWN, "STOP")
        else:
            _log.error("%s", ended.reason)
            self._set_state(RunState.INTERNAL_ERROR, "STOP")

    def _set_state(self, state: RunState, event: str | None = None) -> None:
        _log.info("%s -> %s", self.state, state)
        self.state = state
        if event is not None:
            self.emit(event)

    def _require(self, wanted: frozenset[RunState] | set[RunState], verb: str) -> None:
        if self.state not in wanted:
            raise WrongPhaseError(f"the machine cannot {verb} while it is {self.state}", state=self.state)
