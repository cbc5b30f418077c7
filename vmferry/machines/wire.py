"""Machine descriptions as they go over the wire.

Promise: what arrives is validated like a file would be; an error names the field of the message.
"""

from __future__ import annotations

from vmferry.errors import InvalidArgumentError
from vmferry.machines.spec import MachineSpec
from vmferry.v1 import machine_pb2


def spec_to_message(spec: MachineSpec) -> machine_pb2.MachineSpec:
    """The description as a message."""
    return machine_pb2.MachineSpec(
        version=spec.version,
        name=spec.name,
        uuid=spec.uuid,
        kind=spec.kind,
        memory_mib=spec.memory_mib,
        vcpus=spec.vcpus,
        program=spec.program,
        params=dict(spec.params),
        mac=spec.mac,
        netdev=spec.netdev,
        self_track=spec.self_track,
    )


def spec_from_message(message: machine_pb2.MachineSpec) -> MachineSpec:
    """The description in a message.

    Raises:
        InvalidArgumentError: a field is wrong; ``field`` is its path in the request.
    """
    try:
        return MachineSpec(
            version=message.version,
            name=message.name,
            uuid=message.uuid,
            kind=message.kind,
            memory_mib=message.memory_mib,
            vcpus=message.vcpus,
            program=message.program,
            params=dict(message.params),
            mac=message.mac,
            netdev=message.netdev,
            self_track=message.self_track,
        )
    except InvalidArgumentError as error:
        error.field = f"spec.{error.field}"
        raise
