"""The device state of a paused machine, on its way out.

Promise: what is cut short never leaves this host.
"""

from __future__ import annotations

from vmferry.errors import MachineFailedError
from vmferry.failpoints import reach
from vmferry.machines.qemu import devicestate
from vmferry.machines.qmp import QmpMachine
from vmferry.machines.spec import QEMU, MachineSpec
from vmferry.telemetry.tracing import phase, span_attributes


async def save_device_state(machine: QmpMachine) -> bytes:
    """Ask the paused machine for it; of QEMU's, every section is looked at."""
    async with phase("device state"):
        data = await machine.save_device_state()
        reach("source.state-saved")
        span_attributes(bytes=len(data))
        if machine.spec.kind == QEMU:
            sections = _whole(data, machine.spec).sections
            span_attributes(sections=len(sections), section_bytes=sum(len(one.data) for one in sections))
        return data


def _whole(data: bytes, spec: MachineSpec) -> devicestate.DeviceState:
    """The sections of a QEMU's device state."""
    try:
        return devicestate.parse(data)
    except devicestate.StateFormatError as error:
        raise MachineFailedError(f"the device state of {spec.name}: {error}", machine=spec.uuid) from error
