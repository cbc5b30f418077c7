"""The device state of a paused machine, on its way out.

Promise: no right is given up with a state that is cut short.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from vmferry.errors import MachineFailedError
from vmferry.failpoints import reach
from vmferry.machines.qemu import devicestate
from vmferry.machines.qmp import QmpMachine
from vmferry.machines.spec import QEMU, MachineSpec
from vmferry.telemetry.tracing import phase, span_attributes


async def save_device_state(machine: QmpMachine, *, all_come: Callable[[], None] = lambda: None) -> bytes:
    """Ask the paused machine for it.

    Args:
        machine: whose guest is paused.
        all_come: called as soon as no device is being saved any more; it may still turn out that it failed.
    """
    async with phase("device state"):
        data = await machine.save_device_state(all_come=all_come)
        reach("source.state-saved")
        span_attributes(bytes=len(data))
        return data


async def check_device_state(data: bytes, spec: MachineSpec) -> None:
    """Look at every section of a QEMU's, beside other work.

    Raises:
        MachineFailedError: it is not whole.
    """
    if spec.kind == QEMU:
        sections = (await asyncio.to_thread(_whole, data, spec)).sections
        span_attributes(sections=len(sections), section_bytes=sum(len(one.data) for one in sections))


def _whole(data: bytes, spec: MachineSpec) -> devicestate.DeviceState:
    """The sections of a QEMU's device state."""
    try:
        return devicestate.parse(data)
    except devicestate.StateFormatError as error:
        raise MachineFailedError(f"the device state of {spec.name}: {error}", machine=spec.uuid) from error
