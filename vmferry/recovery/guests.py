"""What a host's hypervisor says of its copy of a machine, for people and for ``blocked``.

Promise: it is asked beside whoever drives it, within its time limit, and that it does not answer is an answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from vmferry.errors import MachineDeadError, VmferryError
from vmferry.handoff.blocked import Guest
from vmferry.machines.directory import MachineDirectory, MachineRecord
from vmferry.machines.port import RunState
from vmferry.v1 import machine_pb2

_GUESTS: Final = {
    RunState.RUNNING: Guest.RUNNING,
    RunState.PAUSED: Guest.PAUSED,
    RunState.PRELAUNCH: Guest.PAUSED,
    RunState.POSTMIGRATE: Guest.PAUSED,
    RunState.INMIGRATE: Guest.WAITING,
    RunState.SHUTDOWN: Guest.ENDED,
    RunState.FAILED: Guest.ENDED,
}
_STATES: Final = {
    Guest.RUNNING: machine_pb2.MACHINE_STATE_RUNNING,
    Guest.PAUSED: machine_pb2.MACHINE_STATE_PAUSED,
    Guest.WAITING: machine_pb2.MACHINE_STATE_INCOMING,
    Guest.ENDED: machine_pb2.MACHINE_STATE_STOPPED,
    Guest.SILENT: machine_pb2.MACHINE_STATE_UNSPECIFIED,
    Guest.ABSENT: machine_pb2.MACHINE_STATE_DEAD,
}


@dataclass(frozen=True)
class Answer:
    """What was found."""

    guest: Guest
    words: str
    """The hypervisor's own word, or why there is none."""

    @property
    def state(self) -> machine_pb2.MachineState.ValueType:
        """The same as the API says it."""
        return _STATES[self.guest]


async def ask(directory: MachineDirectory, record: MachineRecord | None) -> Answer:
    """Ask a machine's hypervisor what its guest does."""
    if record is None:
        return Answer(Guest.ABSENT, "this host has no such machine")
    if not record.alive:
        return Answer(Guest.ABSENT, "its process is gone")
    try:
        machine = directory.open(record, observe=True)
    except MachineDeadError as error:
        return Answer(Guest.ABSENT, error.message)
    try:
        state = await machine.run_state()
    except MachineDeadError as error:
        return Answer(Guest.ABSENT, error.message)
    except VmferryError as error:
        return Answer(Guest.SILENT, error.message)
    finally:
        await machine.close()
    return Answer(_GUESTS[state], state.value)
