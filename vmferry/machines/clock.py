"""The guest's clock after a pause: how far it is off, and what the machine offers to put it right.

A guest's own time stands still while it is paused, so it is behind by as much as the pause took, and by nothing else.
What can be done depends on the machine:

* the micro-VM's clock device answers with the host's time of day whenever its guest asks, so it is right at once;
* QEMU's RTC goes by the host's clock and is right, too; ticks that it owes its guest are dropped, which would
  otherwise come in a burst. A guest reads it when it boots, or when somebody tells it to.

Promise: time is never set back; what was not read from a clock of the guest is not called measured.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Final

from vmferry.errors import MachineFailedError, VmferryError
from vmferry.machines.qmp import QmpMachine
from vmferry.machines.spec import QEMU

CLOCK_DEVICE: Final = "clock-device"
RTC: Final = "rtc"
NONE: Final = "none"


@dataclass(frozen=True)
class ClockFinding:
    """What was found and done."""

    before_us: int
    """Guest minus host, right after the pause."""
    after_us: int
    method: str
    measured: bool
    note: str = ""


async def put_right(machine: QmpMachine, pause_s: float) -> ClockFinding:
    """Put the clock of a guest right that was paused for so long; what cannot be done is said, and raises nothing."""
    behind_us = -round(pause_s * 1e6)
    try:
        if machine.spec.kind == QEMU:
            return await _rtc(machine, behind_us)
        return await _device(machine, behind_us)
    except VmferryError as error:
        return ClockFinding(behind_us, behind_us, NONE, measured=False, note=error.message)


async def _device(machine: QmpMachine, behind_us: int) -> ClockFinding:
    asked_ns = time.time_ns()
    try:
        guest_ns = await machine.clock_ns()
    except MachineFailedError as error:
        if error.metadata.get("error_class") != "CommandNotFound":
            raise
        return ClockFinding(behind_us, 0, CLOCK_DEVICE, measured=False, note="an older micro-VM does not say")
    answered_ns = time.time_ns()
    # Somewhere between question and answer: what is beyond either is off for certain.
    off_ns = min(guest_ns - asked_ns, 0) + max(guest_ns - answered_ns, 0)
    return ClockFinding(behind_us, round(off_ns / 1e3), CLOCK_DEVICE, measured=True)


async def _rtc(machine: QmpMachine, behind_us: int) -> ClockFinding:
    await machine.drop_owed_ticks()
    note = (
        "There is no agent in the guest: its RTC is right, and its system clock stays behind by the pause until it "
        "asks the RTC (hwclock --hctosys) or the network."
    )
    return ClockFinding(behind_us, behind_us, RTC, measured=False, note=note)
