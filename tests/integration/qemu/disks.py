"""Images with file systems for tests: how they are made, looked at from outside, and locked by somebody else."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import struct
import subprocess
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

from tests.integration.qemu.conftest import LinuxGuest, linux_spec
from tests.integration.services import Host, Service, eventually
from vmferry.machines.qemu import guest
from vmferry.machines.qemu.guest.verdict import Written
from vmferry.machines.qemu.spec import DiskSpec
from vmferry.machines.spec import MachineSpec

TOOLS = ("mkfs.ext4", "e2fsck", "debugfs", "qemu-img")
IMAGE_MIB = 48
STAYS = 16
"""So many of the files that the guest wrote last are still on its disk."""
SPEAKS_S = 60.0

_UNSHARES_WRITING = 201
"""The byte by whose lock a QEMU says that it does not let others write to its image."""


def tool(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a tool of file systems or images, wherever it lies."""
    path = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))
    found = shutil.which(command[0], path=path)
    assert found, f"no {command[0]}"
    return subprocess.run((found, *command[1:]), capture_output=True, text=True, check=False)


def missing_tools() -> list[str]:
    """Tools that are not installed."""
    path = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))
    return [name for name in TOOLS if shutil.which(name, path=path) is None]


def make_image(path: Path, form: str = "raw") -> DiskSpec:
    """An image with an empty file system."""
    plain = path.with_suffix(".plain")
    with plain.open("wb") as file:
        file.truncate(IMAGE_MIB * 1024 * 1024)
    done(tool("mkfs.ext4", "-q", "-F", str(plain)))
    if form == "raw":
        plain.rename(path)
    else:
        done(tool("qemu-img", "convert", "-O", form, str(plain), str(path)))
        plain.unlink()
    return DiskSpec(path=str(path), format=form, shared=True)


def done(result: subprocess.CompletedProcess[str]) -> str:
    """What a tool said, which must have succeeded."""
    assert result.returncode == 0, (result.args, result.returncode, result.stdout, result.stderr)
    return result.stdout


def disk_spec(images: Path, *disks: DiskSpec) -> MachineSpec:
    """The self-checking guest, which also writes to the first of these disks."""
    spec = linux_spec(images, files=4)
    assert spec.qemu is not None
    part = replace(
        spec.qemu, initrd=str(images / "initrd-disk"), append=guest.append(4, 0, "vda"), disks=disks
    )
    return replace(spec, qemu=part)


async def writes(linux: LinuxGuest, host: Host, count: int = 3) -> Written:
    """Wait until the guest has brought some more files to its disk; returns the last."""
    seen = len(linux.verdict(host).written)
    await eventually(
        lambda: len(linux.verdict(host).written) >= seen + count, "the guest writes to disk", seconds=SPEAKS_S
    )
    found = linux.verdict(host)
    assert found.ok, (found.faults, linux.serial(host)[-2000:])
    numbers = [file.number for file in found.written]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    return found.written[-1]


def assert_on_disk(disk: DiskSpec, written: tuple[Written, ...], folder: Path) -> None:
    """Every file that the guest said was on its disk is there, in a file system that is whole.

    The machine's process was ended like a computer that is switched off, so the journal is replayed first.
    """
    image = Path(disk.path)
    if disk.format == "qcow2":
        done(tool("qemu-img", "check", str(image)))
        done(tool("qemu-img", "convert", "-O", "raw", str(image), str(folder / "plain")))
        image = folder / "plain"
    # Corrects only what is not in the journal (counters), and fails over anything else.
    replayed = tool("e2fsck", "-f", "-p", str(image))
    assert replayed.returncode in (0, 1), replayed.stdout
    done(tool("e2fsck", "-fn", str(image)))
    assert len(written) >= 3
    for file in written[-STAYS + 1 :]:
        copy = folder / file.name
        done(tool("debugfs", "-R", f"dump /{file.name} {copy}", str(image)))
        assert hashlib.md5(copy.read_bytes()).hexdigest() == file.md5, file


def locks(pid: int, image: Path) -> int:
    """How many locks a process holds on an image."""
    found = 0
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            if path.stat().st_ino == image.stat().st_ino:
                info = Path(f"/proc/{pid}/fdinfo/{path.name}").read_text(encoding="ascii")
                found += sum(line.startswith("lock:") for line in info.splitlines())
    return found


@contextlib.contextmanager
def locked(image: Path) -> Iterator[None]:
    """Keep every other process from taking an image for writing, as QEMU would that does not share it."""
    with image.open("rb") as file:
        byte = struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, _UNSHARES_WRITING, 1, 0)
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, byte)
        yield


@contextlib.asynccontextmanager
async def seeing(service: Service, mount: str) -> AsyncIterator[None]:
    """Run a service for a while where a command has changed what is mounted, for it alone."""
    script = f'{mount}; exec "$@"'
    service.within = ("unshare", "--mount", "--propagation", "private", "sh", "-ec", script, "sh")
    await service.restart()
    try:
        yield
    finally:
        service.within = ()
        await service.restart()
