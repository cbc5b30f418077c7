"""The CPU thread: runs guest code, sleeps when the guest does, and starts and stops exactly.

Promise: when :meth:`Engine.stop` returns, the guest has executed its last instruction and nothing of it changes any
more; when :meth:`Engine.start` returns, the CPU thread has begun to execute. Guest code runs without the GIL.
"""

from __future__ import annotations

import enum
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from unicorn import UC_HOOK_INSN
from unicorn import x86_const as x86
from unicorn.unicorn import UcError

from vmferry.errors import MachineFailedError
from vmferry.machines.microvm.activity import Activity
from vmferry.machines.microvm.cpu import Cpu
from vmferry.machines.microvm.devices import Clock, Power
from vmferry.machines.microvm.ports import PortBus

_log = logging.getLogger(__name__)

_NOWHERE: Final = (1 << 64) - 1
"""An address no instruction has: the engine runs until it is told to stop."""
_RETRY_S: Final = 0.0005
_LIMIT_S: Final = 10.0
"""Far above the length of any translated block or device access."""


class Ending(enum.Enum):
    """Why a guest stopped running by itself."""

    HALTED = "halted"
    FAULTED = "faulted"


@dataclass(frozen=True)
class Ended:
    """That, and why, a guest stopped running by itself."""

    kind: Ending
    reason: str


@dataclass
class VcpuTimes:
    """CLOCK_MONOTONIC instants at which the CPU last began and ceased to execute; None: never yet."""

    last_start_ns: int | None = None
    last_stop_ns: int | None = None


class Engine:
    """Runs one CPU on a thread of its own."""

    def __init__(
        self,
        cpu: Cpu,
        bus: PortBus,
        clock: Clock,
        power: Power,
        activity: Activity,
        on_ending: Callable[[], None],
    ) -> None:
        """``on_ending`` is called on the CPU thread when the guest halts or faults: see ``ended`` then."""
        self.times = VcpuTimes()
        self.ended: Ended | None = None
        self._cpu = cpu
        self._clock = clock
        self._power = power
        self._activity = activity
        self._on_ending = on_ending
        self._changed = threading.Condition()
        self._wanted = False
        self._running = False
        self._runs = 0
        self._closed = False
        self._hook_ports(bus)
        self._thread = threading.Thread(target=self._serve, name="vcpu", daemon=True)
        self._thread.start()

    def start(self) -> None:
        """Let the CPU run; returns when it has begun."""
        with self._changed:
            before = self._runs
            self._wanted = True
            self._changed.notify_all()
            if not self._changed.wait_for(lambda: self._runs > before, _LIMIT_S):
                raise MachineFailedError(f"the CPU did not start within {_LIMIT_S:g} s")

    def stop(self) -> None:
        """Stop the CPU; returns when it has executed its last instruction."""
        deadline = time.monotonic() + _LIMIT_S
        with self._changed:
            self._wanted = False
            self._changed.notify_all()
            while self._running:
                # A stop that meets the thread just outside the engine is lost, hence again until it confirms.
                self._cpu.uc.emu_stop()
                self._changed.wait(_RETRY_S)
                if time.monotonic() > deadline:
                    raise MachineFailedError(f"the CPU did not stop within {_LIMIT_S:g} s")

    def close(self) -> None:
        """Stop for good and end the thread."""
        self.stop()
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _hook_ports(self, bus: PortBus) -> None:
        def read(_uc: object, port: int, size: int, _data: object) -> int:
            return bus.read(port, size)

        def write(_uc: object, port: int, _size: int, value: int, _data: object) -> None:
            bus.write(port, value)

        self._cpu.uc.hook_add(UC_HOOK_INSN, read, None, 1, 0, x86.UC_X86_INS_IN)
        self._cpu.uc.hook_add(UC_HOOK_INSN, write, None, 1, 0, x86.UC_X86_INS_OUT)

    def _serve(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._wanted or self._closed)
                if self._closed:
                    return
                self._running = True
                self._runs += 1
                self.times.last_start_ns = time.monotonic_ns()
                self._clock.start(self.times.last_start_ns)
                self._changed.notify_all()
            ended = self._run()
            with self._changed:
                self.ended = ended
                self._running = False
                self._wanted = False
                self.times.last_stop_ns = time.monotonic_ns()
                self._clock.stop(self.times.last_stop_ns)
                self._changed.notify_all()
            if ended is not None:
                self._on_ending()

    def _run(self) -> Ended | None:
        """Execute until told to stop (None) or until the guest ends by itself."""
        while True:
            self._sleep_with_guest()
            if not self._wanted:
                return None
            self._power.asked = False
            self._activity.beat()
            try:
                self._cpu.uc.emu_start(self._cpu.rip, _NOWHERE)
            except UcError as error:
                return Ended(Ending.FAULTED, f"the guest faulted at {self._cpu.rip:#x}: {error}")
            except Exception as error:  # noqa: BLE001 - a device failed inside its hook: the guest must not run on
                _log.exception("a device failed")
                return Ended(Ending.FAULTED, f"a device failed at {self._cpu.rip:#x}: {error!r}")
            finally:
                self._activity.beat(last=not self._wanted)
            if self._wanted and not self._power.asked and self._cpu.halted():
                return Ended(Ending.HALTED, f"the guest halted at {self._cpu.rip:#x}")

    def _sleep_with_guest(self) -> None:
        if not self._power.asleep_ns():
            return
        with self._changed:
            while self._wanted and (left_ns := self._power.asleep_ns()):
                self._changed.wait(left_ns / 1e9)
