"""Versions of the description: what version 1 could say stays as it was, and what it could not is told apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.unit.machines.qemu_specs import SHORT, UUID, WHOLE
from vmferry.errors import InvalidArgumentError
from vmferry.machines.spec import MachineSpec
from vmferry.machines.wire import spec_from_message, spec_to_message
from vmferry.v1 import machine_pb2

MICRO = f"""
name = "web-1"
uuid = "{UUID}"
memory_mib = 64
[microvm]
program = "canary"
mac = "52:54:00:12:34:56"
[microvm.params]
rate = "10"
"""
DEVICE = SHORT + '[[qemu.devices]]\nmodel = "virtio-rng-pci"\n'
DISK = SHORT + '[[qemu.disks]]\npath = "/d"\nformat = "raw"\n'
NIC = SHORT + '[[qemu.nics]]\nbackend = "user"\nmac = "52:54:00:12:34:56"\n'
NEW = [
    SHORT + 'memory_backing = "hugetlbfs"\n',
    SHORT + 'memory_backing = "memfd"\n',
    SHORT + 'memory_backing = "anonymous"\n',
    SHORT + 'serial = "socket"\n',
    DEVICE,
    DISK + 'bus = "scsi"\n',
    DISK + 'bus = "sata"\n',
    NIC + 'model = "e1000"\n',
]
NEWEST = [
    NIC + "metadata = true\n",
    SHORT.replace("[qemu]", 'guest_name = "WestNO_0"\n[qemu]'),
    SHORT.replace("[qemu]", 'availability_set = "web"\n[qemu]'),
    MICRO.replace("[microvm.params]", "metadata = true\n[microvm.params]"),
]


@pytest.mark.parametrize(
    ("text", "digest"),
    [
        (WHOLE, "d7637640c3991e21128eac17012ce1491387d1f86a39287279a15705ed886f2b"),
        (SHORT, "644b8548649393646a41ffdd41cbe48aea374a1ab246472412ad0cbee334906c"),
        (MICRO, "b8ad9250a74cfe8f8849cde6e3628b1831916c60c11925eacd243e21d8338451"),
        (
            SHORT + 'memory_backing = "tmpfs"\nserial = "file"\n',
            "644b8548649393646a41ffdd41cbe48aea374a1ab246472412ad0cbee334906c",
        ),
        (
            SHORT.replace("[qemu]", "version = 2\n[qemu]"),
            "644b8548649393646a41ffdd41cbe48aea374a1ab246472412ad0cbee334906c",
        ),
    ],
)
def test_the_digest_of_what_version_1_can_say_is_that_of_the_first_release(text: str, digest: str) -> None:
    """Frozen values, computed by that release: two hosts of neighbouring releases agree on a description."""
    spec = MachineSpec.from_toml(text)
    assert (spec.version, spec.digest().hex()) == (1, digest)
    assert spec_to_message(spec).version == 1


@pytest.mark.parametrize("text", NEW)
def test_what_version_1_cannot_say_is_version_2(text: str) -> None:
    """It survives TOML and the wire, has a digest of its own, and is refused where it claims to be version 1."""
    spec = MachineSpec.from_toml(text)
    assert spec.version == 2
    assert "version = 2" in spec.to_toml()
    assert spec.digest() != MachineSpec.from_toml(SHORT).digest()
    message = spec_to_message(spec)
    assert message.version == 2
    for again in (MachineSpec.from_toml(spec.to_toml()), spec_from_message(message)):
        assert again == spec
        assert again.digest() == spec.digest()

    claims = text.replace("[qemu]", "version = 1\n[qemu]")
    message.version = 1
    tries: tuple[tuple[Callable[[], MachineSpec], str], ...] = (
        (lambda: MachineSpec.from_toml(claims), "version"),
        (lambda: spec_from_message(message), "spec.version"),
    )
    for read, field in tries:
        with pytest.raises(InvalidArgumentError, match="version 1 cannot say") as caught:
            read()
        assert caught.value.field == field
        assert "2" in caught.value.instance_remedy


@pytest.mark.parametrize("text", NEWEST)
def test_what_version_2_cannot_say_is_version_3(text: str) -> None:
    """It survives TOML and the wire, has a digest of its own, and is refused where it claims to be version 2."""
    spec = MachineSpec.from_toml(text)
    assert spec.version == 3
    without = [
        line
        for line in text.splitlines()
        if line.split(" ")[0] not in ("metadata", "guest_name", "availability_set")
    ]
    older = MachineSpec.from_toml("\n".join(without))
    assert older.version == 1
    assert spec.digest() != older.digest()
    message = spec_to_message(spec)
    assert message.version == 3
    for again in (MachineSpec.from_toml(spec.to_toml()), spec_from_message(message)):
        assert (again, again.digest()) == (spec, spec.digest())
    message.version = 2
    with pytest.raises(InvalidArgumentError, match="version 2 cannot say"):
        spec_from_message(message)
    with pytest.raises(InvalidArgumentError, match="version 2 cannot say"):
        MachineSpec.from_toml(spec.to_toml().replace("version = 3", "version = 2"))


def test_what_version_3_cannot_say_is_version_4() -> None:
    """A channel for the guest's agent: it survives TOML and the wire, and is refused as version 3."""
    spec = MachineSpec.from_toml(SHORT + "agent = true\n")
    assert spec.version == 4
    assert spec.digest() != MachineSpec.from_toml(SHORT).digest()
    assert MachineSpec.from_toml(SHORT + "agent = false\n").digest() == MachineSpec.from_toml(SHORT).digest()
    message = spec_to_message(spec)
    for again in (MachineSpec.from_toml(spec.to_toml()), spec_from_message(message)):
        assert (again, again.digest()) == (spec, spec.digest())
    message.version = 3
    with pytest.raises(InvalidArgumentError, match="version 3 cannot say"):
        spec_from_message(message)


@pytest.mark.parametrize(
    ("text", "field"),
    [
        (
            NIC
            + 'metadata = true\n[[qemu.nics]]\nbackend = "user"\nmac = "52:54:00:12:34:57"\nmetadata = true\n',
            "qemu.nics",
        ),
        (NIC.replace("user", "tap") + 'tap = "tap0"\nmetadata = true\n', "qemu.nics.metadata"),
        (SHORT.replace("[qemu]", 'guest_name = "a b"\n[qemu]'), "guest_name"),
        (SHORT.replace("[qemu]", 'availability_set = "-"\n[qemu]'), "availability_set"),
    ],
)
def test_what_makes_no_sense_in_version_3_is_refused(text: str, field: str) -> None:
    """By the name of its field."""
    with pytest.raises(InvalidArgumentError) as caught:
        MachineSpec.from_toml(text)
    assert caught.value.field == field


@pytest.mark.parametrize("version", ["0", "5", "-1", "true", '"1"', "1.0"])
def test_a_version_that_is_none_is_refused(version: str) -> None:
    """Numbers that this release does not know, and what is no whole number."""
    with pytest.raises(InvalidArgumentError) as caught:
        MachineSpec.from_toml(SHORT.replace("[qemu]", f"version = {version}\n[qemu]"))
    assert caught.value.field == "version"


def test_a_message_of_a_later_release_is_refused_by_its_version() -> None:
    """Whatever it says, it is not taken for less than it is."""
    message = spec_to_message(MachineSpec.from_toml(SHORT))
    for version in (0, 5):
        message.version = version
        with pytest.raises(InvalidArgumentError) as caught:
            spec_from_message(message)
        assert caught.value.field == "spec.version"


def test_a_message_of_the_first_release_is_understood() -> None:
    """The fields that it does not have are what that release meant."""
    message = machine_pb2.MachineSpec(version=1, name="web-1", uuid=UUID, kind="qemu", memory_mib=64, vcpus=1)
    message.qemu.machine = "q35"
    message.qemu.cpu = "Nehalem-v1"
    message.qemu.accelerator = "auto"
    message.qemu.memory_backing = "tmpfs"
    message.qemu.binary = "/usr/bin/qemu-system-x86_64"
    assert spec_from_message(message) == MachineSpec.from_toml(SHORT)
    message.qemu.disks.add(path="/d", format="raw")
    assert spec_from_message(message) == MachineSpec.from_toml(DISK)


def test_the_version_follows_what_is_said() -> None:
    """A description that is changed has the version of what it says then."""
    spec = MachineSpec.from_toml(SHORT)
    assert spec.qemu is not None
    there = replace(spec, qemu=replace(spec.qemu, memory_backing="memfd"))
    assert there.version == 2
    assert replace(there, qemu=spec.qemu) == spec
