"""Serial port, clock, power and boot parameters: the devices every guest program uses.

Promise: what a guest can see of them moves with it, to the byte. Methods run on the CPU thread or while it stands
still, except where one says otherwise. The ports and their use are listed in ``guests/machine.inc``.
"""

from __future__ import annotations

import logging
import os
import struct
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar, Final

from vmferry.errors import DeviceStateError
from vmferry.machines.microvm.ports import U32, Part, PortBus

_log = logging.getLogger(__name__)

PORT_SERIAL: Final = 0x3F8
PORT_SERIAL_STATUS: Final = 0x3FD
PORT_MONOTONIC: Final = 0x500
PORT_REALTIME: Final = 0x508
PORT_SLEEP: Final = 0x510
PORT_MEMORY: Final = 0x1000
PORT_PARAMETERS: Final = 0x1010
PARAMETER_SLOTS: Final = 8
_MAX_REALTIME_NS: Final = (1 << 63) - 1
NOT_GIVEN: Final = (1 << 64) - 1
"""What a guest reads for a boot parameter nobody set."""


class Serial(Part):
    """A serial port: lines out to a file, bytes in from a small ring.

    Output is passed on line by line and an unfinished line is part of the state, so that no line is cut in two by a
    migration.
    """

    name: ClassVar[str] = "serial"
    version: ClassVar[int] = 1
    _RING_BYTES: ClassVar[int] = 4096
    _LINE_BYTES: ClassVar[int] = 256
    _LENGTHS: ClassVar[struct.Struct] = struct.Struct("<HH")

    def __init__(self, bus: PortBus, output: Path) -> None:
        self._output = os.open(output, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._line = bytearray()
        self._input: deque[int] = deque()
        self._lost_output = 0
        bus.on_write(PORT_SERIAL, self._send)
        bus.on_read(PORT_SERIAL, self._receive)
        bus.on_read(PORT_SERIAL_STATUS, lambda: 0x20 | bool(self._input))

    def feed(self, data: bytes) -> bool:
        """Give the guest input, all or nothing; False when the ring has no room. May be called on any thread."""
        if len(self._input) + len(data) > self._RING_BYTES:
            return False
        self._input.extend(data)
        return True

    def close(self) -> None:
        """Write out an unfinished line and close the file."""
        self._flush()
        os.close(self._output)

    def save(self) -> bytes:
        """Bytes waiting in both directions."""
        return self._LENGTHS.pack(len(self._input), len(self._line)) + bytes(self._input) + bytes(self._line)

    def prepare(self, payload: bytes) -> Callable[[], None]:
        """Check the lengths."""
        incoming, outgoing = self._unpack(self._LENGTHS, payload[: self._LENGTHS.size])
        data = payload[self._LENGTHS.size :]
        if len(data) != incoming + outgoing or incoming > self._RING_BYTES or outgoing > self._LINE_BYTES:
            raise DeviceStateError("section 'serial' has lengths that do not fit", section=self.name)

        def apply() -> None:
            self._input = deque(data[:incoming])
            self._line = bytearray(data[incoming:])

        return apply

    def _flush(self) -> None:
        line, self._line = bytes(self._line), bytearray()
        try:
            os.write(self._output, line)
        except OSError as error:
            self._lost_output += 1
            if self._lost_output == 1:
                _log.warning("serial output is lost: %s (further losses are only counted)", error)

    def _send(self, value: int) -> None:
        self._line.append(value & 0xFF)
        if value & 0xFF == ord("\n") or len(self._line) >= self._LINE_BYTES:
            self._flush()

    def _receive(self) -> int:
        return self._input.popleft() if self._input else 0


class Clock(Part):
    """Guest time, which stands still while the CPU does and never runs backwards, and the time of day.

    The time of day is the host's. Where the guest has been told a later one, by another host or before this host's
    clock was set back, it goes on at half speed until the host has caught up: it never steps back and never stands.
    What the guest was told last is no part of the saved state, which older releases understand; whoever moves the
    machine asks for it, and tells it to the machine's new process by :meth:`keep`.
    """

    name: ClassVar[str] = "clock"
    version: ClassVar[int] = 1
    _LAYOUT: ClassVar[struct.Struct] = struct.Struct("<QII")

    def __init__(self, bus: PortBus) -> None:
        self._elapsed_ns = 0
        """Guest time when the CPU last stopped."""
        self._started_ns: int | None = None
        """Host CLOCK_MONOTONIC since which guest time runs; None while it stands still."""
        self._monotonic_high = 0
        self._realtime_high = 0
        self._told = (0, 0)
        """The latest time of day that the guest may have read, and the host's CLOCK_MONOTONIC then."""
        self.offset_at_start_ns: int | None = None
        """Guest minus host when the CPU last started, had the guest's time of day stood still; None: not known."""
        bus.on_read(PORT_MONOTONIC, self._latch_monotonic)
        bus.on_read(PORT_MONOTONIC + 4, lambda: self._monotonic_high)
        bus.on_read(PORT_REALTIME, self._latch_realtime)
        bus.on_read(PORT_REALTIME + 4, lambda: self._realtime_high)

    def start(self, host_monotonic_ns: int) -> None:
        """Let guest time run from this instant."""
        told_ns, _ = self._told
        self.offset_at_start_ns = told_ns - time.time_ns() if told_ns else None
        self._told = (told_ns, host_monotonic_ns)
        self._started_ns = host_monotonic_ns

    def stop(self, host_monotonic_ns: int) -> None:
        """Hold guest time at this instant."""
        assert self._started_ns is not None, "the clock is not running"
        self._elapsed_ns += host_monotonic_ns - self._started_ns
        self._started_ns = None
        self._told = (self._time_of_day(host_monotonic_ns), host_monotonic_ns)

    def guest_ns(self) -> int:
        """Guest time in nanoseconds since the guest first ran."""
        if self._started_ns is None:
            return self._elapsed_ns
        return self._elapsed_ns + time.monotonic_ns() - self._started_ns

    def realtime_ns(self) -> int:
        """The time of day that a guest would be told now."""
        return self._time_of_day(time.monotonic_ns())

    @property
    def told_ns(self) -> int:
        """The latest time of day that the guest can have read, once it has stopped; 0 if it has never run."""
        return self._told[0]

    def keep(self, realtime_ns: int) -> None:
        """Never tell the guest, which does not run now, an earlier time of day than this."""
        self._told = (max(self.told_ns, min(realtime_ns, _MAX_REALTIME_NS)), time.monotonic_ns())

    def save(self) -> bytes:
        """Guest time, and high halves that may have been latched but not read."""
        return self._LAYOUT.pack(self._elapsed_ns, self._monotonic_high, self._realtime_high)

    def prepare(self, payload: bytes) -> Callable[[], None]:
        """Any values are possible."""
        elapsed_ns, monotonic_high, realtime_high = self._unpack(self._LAYOUT, payload)

        def apply() -> None:
            self._elapsed_ns = elapsed_ns
            self._monotonic_high = monotonic_high
            self._realtime_high = realtime_high

        return apply

    def _time_of_day(self, monotonic_ns: int) -> int:
        told_ns, since_ns = self._told
        return max(time.time_ns(), told_ns + max(0, monotonic_ns - since_ns) // 2)

    def _latch_monotonic(self) -> int:
        now = self.guest_ns()
        self._monotonic_high = now >> 32 & U32
        return now & U32

    def _latch_realtime(self) -> int:
        monotonic_ns = time.monotonic_ns()
        now = self._time_of_day(monotonic_ns)
        self._told = (now, monotonic_ns)
        self._realtime_high = now >> 32 & U32
        return now & U32


class Power(Part):
    """Lets an idle guest sleep, so that it costs the host next to nothing."""

    name: ClassVar[str] = "power"
    version: ClassVar[int] = 1
    _LAYOUT: ClassVar[struct.Struct] = struct.Struct("<Q")

    def __init__(self, bus: PortBus, clock: Clock, on_sleep: Callable[[], None]) -> None:
        self._clock = clock
        self._on_sleep = on_sleep
        self._wake_at_ns = 0
        self.asked = False
        """Set when the guest asks to sleep; cleared by whoever acts on it."""
        bus.on_write(PORT_SLEEP, self._sleep)

    def asleep_ns(self) -> int:
        """How much guest time is left to sleep; 0 when the guest is awake."""
        return max(0, self._wake_at_ns - self._clock.guest_ns())

    def save(self) -> bytes:
        """When the guest wakes, in guest time."""
        return self._LAYOUT.pack(self._wake_at_ns)

    def prepare(self, payload: bytes) -> Callable[[], None]:
        """Any value is possible."""
        (wake_at_ns,) = self._unpack(self._LAYOUT, payload)

        def apply() -> None:
            self._wake_at_ns = wake_at_ns

        return apply

    def _sleep(self, microseconds: int) -> None:
        self._wake_at_ns = self._clock.guest_ns() + 1000 * microseconds
        self.asked = True
        self._on_sleep()


class Boot(Part):
    """What the machine tells its guest at boot, and whether the guest has booted.

    Program and memory size are part of the state so that it is never loaded into a machine of another shape.
    """

    name: ClassVar[str] = "boot"
    version: ClassVar[int] = 1
    _LAYOUT: ClassVar[struct.Struct] = struct.Struct(f"<?Q16s{PARAMETER_SLOTS}Q")

    def __init__(self, bus: PortBus, *, memory_bytes: int, program: str, parameters: Sequence[int]) -> None:
        self.booted = False
        self._memory_bytes = memory_bytes
        self._program = program.encode().ljust(16, b"\0")
        self._parameters = [*parameters, *[NOT_GIVEN] * (PARAMETER_SLOTS - len(parameters))]
        bus.on_read_constant(PORT_MEMORY, memory_bytes)
        for slot in range(PARAMETER_SLOTS):
            bus.on_read(PORT_PARAMETERS + 8 * slot, lambda slot=slot: self._parameters[slot] & U32)  # type: ignore[misc]
            bus.on_read(PORT_PARAMETERS + 8 * slot + 4, lambda slot=slot: self._parameters[slot] >> 32)  # type: ignore[misc]

    def save(self) -> bytes:
        """Everything the guest can read here."""
        return self._LAYOUT.pack(self.booted, self._memory_bytes, self._program, *self._parameters)

    def prepare(self, payload: bytes) -> Callable[[], None]:
        """Refuse another program or memory size; parameters are taken as they are."""
        booted, memory_bytes, program, *parameters = self._unpack(self._LAYOUT, payload)
        if (memory_bytes, program) != (self._memory_bytes, self._program):
            raise DeviceStateError(
                f"the device state is of a machine with {memory_bytes} bytes of memory running "
                f"{program.rstrip(bytes(1)).decode(errors='replace')!r}, not of this one",
                section=self.name,
            )

        def apply() -> None:
            self.booted = booted
            self._parameters = parameters

        return apply
