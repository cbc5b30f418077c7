"""A fleet with a QEMU machine: the command installs its hypervisor, and the guest goes on in it where it is."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from tests.integration.fleets import SETTINGS, Fleet
from tests.integration.hosts import open_world
from tests.integration.qemu.conftest import QEMU, boot, linux_spec
from vmferry.events import policy

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


async def test_a_hypervisor_that_the_command_installs(images: Path, tmp_path: Path) -> None:
    """It is not there when the host is asked, which does not drive the machine away: it is asked again behind it."""
    newer = tmp_path / "opt" / "qemu-system-x86_64"
    async with open_world("ab", image_roots=(images,), qemu_binaries=(QEMU, newer), **SETTINGS) as world:
        fleet = Fleet(world, tmp_path, {"a": 0, "b": 1}, ["in_place = true", f'qemu_binary = "{newer}"'])
        guest = await boot(world, linux_spec(images, vcpus=1, nics=0))
        fleet.guests = {"a": [guest], "b": []}
        fleet.write()
        install = f"mkdir -p {shlex.quote(str(newer.parent))}; ln -sf {QEMU} {shlex.quote(str(newer))}\n"
        with (tmp_path / "update.sh").open("a") as script:
            script.write(install)
        code, planned, said = await fleet.run("--dry-run")
        assert code == 0, said
        (machine,) = planned["order"][0]["hosts"][0]["machines"]
        assert machine["in_place"]
        assert "update.hypervisor-unusable" in machine["why"]
        before = world.a.machine_pid(guest.id)
        code, document, said = await fleet.run()
        assert (code, document["finished"]) == (0, True), said
        await fleet.assert_home()
        assert world.a.machine_pid(guest.id) != before
        part = world.a.record(guest.id).spec.qemu
        assert part is not None
        assert part.binary == str(newer)
        assert fleet.told(guest) == [policy.MAINTENANCE]
