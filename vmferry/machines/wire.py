"""Machine descriptions as they go over the wire.

Promise: what arrives is validated like a file would be; an error names the field of the message.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from vmferry.errors import InvalidArgumentError
from vmferry.machines.microvm.spec import MicrovmSpec
from vmferry.machines.qemu.spec import DeviceSpec, DiskSpec, NicSpec, QemuSpec
from vmferry.machines.spec import MachineSpec, check_version
from vmferry.v1 import machine_pb2


def spec_to_message(spec: MachineSpec) -> machine_pb2.MachineSpec:
    """The description as a message."""
    message = machine_pb2.MachineSpec(
        version=spec.version,
        name=spec.name,
        uuid=spec.uuid,
        kind=spec.kind,
        memory_mib=spec.memory_mib,
        vcpus=spec.vcpus,
        guest_name=spec.guest_name,
        availability_set=spec.availability_set,
    )
    if spec.microvm is not None:
        message.microvm.CopyFrom(machine_pb2.MicrovmSpec(**_values(spec.microvm)))
    if spec.qemu is not None:
        values = _values(spec.qemu)
        values["disks"] = [machine_pb2.QemuDisk(**_values(disk)) for disk in spec.qemu.disks]
        values["nics"] = [machine_pb2.QemuNic(**_values(nic)) for nic in spec.qemu.nics]
        values["devices"] = [machine_pb2.QemuDevice(**_values(device)) for device in spec.qemu.devices]
        message.qemu.CopyFrom(machine_pb2.QemuSpec(**values))
    return message


def spec_from_message(message: machine_pb2.MachineSpec) -> MachineSpec:
    """The description in a message.

    Raises:
        InvalidArgumentError: a field is wrong; ``field`` is its path in the request.
    """
    try:
        given = check_version(message.version)
        spec = MachineSpec(
            name=message.name,
            uuid=message.uuid,
            kind=message.kind,
            memory_mib=message.memory_mib,
            vcpus=message.vcpus,
            microvm=_microvm(message.microvm) if message.HasField("microvm") else None,
            qemu=_qemu(message.qemu) if message.HasField("qemu") else None,
            guest_name=message.guest_name,
            availability_set=message.availability_set,
        )
        spec.check_said(given)
    except InvalidArgumentError as error:
        error.field = f"spec.{error.field}"
        raise
    return spec


def _microvm(message: machine_pb2.MicrovmSpec) -> MicrovmSpec:
    return MicrovmSpec(**_read(MicrovmSpec, message) | {"params": dict(message.params)})


def _qemu(message: machine_pb2.QemuSpec) -> QemuSpec:
    parts = {
        "disks": tuple(DiskSpec(**_read(DiskSpec, disk)) for disk in message.disks),
        "nics": tuple(NicSpec(**_read(NicSpec, nic)) for nic in message.nics),
        "devices": tuple(DeviceSpec(**_read(DeviceSpec, device)) for device in message.devices),
    }
    return QemuSpec(**_read(QemuSpec, message) | parts)


def _values(record: Any) -> dict[str, Any]:
    """The fields of a description, which have the names of the message's."""
    return {field.name: getattr(record, field.name) for field in fields(record)}


def _read(cls: Any, message: Any) -> dict[str, Any]:
    """What a message says; a field that version 1 did not have and that is empty says its default."""
    return {
        field.name: getattr(message, field.name)
        for field in fields(cls)
        if getattr(message, field.name) or "added" not in field.metadata
    }
