"""Two releases of QEMU: machines move from the older to the newer and between new ones; a plan tells about the rest.

Both hosts know QEMU by one path, as hosts do before and after an update. Here it is a script that runs the first QEMU
in the PATH, which is another one for each host.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.integration.hosts import World, open_world
from tests.integration.qemu.conftest import QEMU, boot, linux_spec
from tests.integration.qemu.planning import as_on, beyond_notes, path_with, plan, qemu_by_path
from vmferry.machines.qemu import probe
from vmferry.machines.spec import MachineSpec

NEWER = os.environ.get("VMFERRY_QEMU_NEWER", "")

pytestmark = [
    # Not every mirror has a second release, so this is left out even where everything is required.
    pytest.mark.skipif(
        not NEWER, reason="VMFERRY_QEMU_NEWER names no second QEMU (scripts/newer_qemu.py fetches one)"
    ),
    pytest.mark.usefixtures("tidy"),
    pytest.mark.timeout(240),
]


@pytest.fixture(scope="module")
def newer_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A PATH in which the newer QEMU comes first."""
    assert probe.probe_binary(NEWER).version > probe.probe_binary(str(QEMU)).version
    return path_with(f'exec {NEWER} "$@"', tmp_path_factory.mktemp("newer"))


@pytest.fixture(scope="module")
def binary(images: Path) -> Path:
    """The path that all hosts know QEMU by."""
    return qemu_by_path(images)


@pytest.fixture(scope="module")
async def world(images: Path, binary: Path, newer_path: str) -> AsyncIterator[World]:
    """Host a with the older release, hosts b and c with the newer one."""
    async with open_world(
        "abc", image_roots=(images,), qemu_binaries=(binary,), downtime_limit_ms=1000
    ) as opened:
        for host in (opened.b, opened.hosts["c"]):
            for service in (host.source, host.dest):
                service.environment = {"PATH": newer_path}
                await service.restart()
        yield opened


def described(images: Path, binary: Path, machine: str) -> MachineSpec:
    """The self-checking guest on a machine type."""
    spec = linux_spec(images, vcpus=2, nics=1)
    assert spec.qemu is not None
    return replace(spec, qemu=replace(spec.qemu, machine=machine, binary=str(binary)))


@pytest.mark.parametrize("machine", ["pc-q35-7.2", "pc-i440fx-7.2"])
async def test_machines_go_up_and_on(world: World, images: Path, binary: Path, machine: str) -> None:
    """From the older release to the newer and between newer ones without a word; the way back is warned of."""
    a, b, c = world.a, world.b, world.hosts["c"]
    guest = await boot(world, described(images, binary, machine))
    assert beyond_notes(await plan(world, guest, a, b)) == []
    await world.assert_crosses(guest, a, b)
    assert beyond_notes(await plan(world, guest, b, c)) == []
    await world.assert_crosses(guest, b, c)
    assert beyond_notes(await plan(world, guest, c, a)) == [("warns", "hypervisor.older", "qemu")]


async def test_a_machine_type_of_the_newer_release_stays_there(
    world: World, images: Path, binary: Path, newer_path: str
) -> None:
    """A plan to the older release names the machine type and the release; between newer ones it moves."""
    with as_on(newer_path):
        guest = await boot(world, described(images, binary, "q35"), world.b)
    assert beyond_notes(await plan(world, guest, world.b, world.a)) == [
        ("blocks", "machine.type-unsupported", "qemu.machine"),
        ("warns", "hypervisor.older", "qemu"),
    ]
    await world.assert_crosses(guest, world.b, world.hosts["c"])
