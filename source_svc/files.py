"""What this source tells a destination about a machine's files, so that it can compare them with its own.

Promise: beacons stand only while :func:`shown` lasts, however it ends; what cannot be told is a finding that names
the file and the reason; a disk whose path does not lead any more to what the hypervisor has open is found out.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from vmferry.errors import IncompatibleError
from vmferry.machines.beacon import Beacon, make_beacon
from vmferry.machines.fileidentity import Contents, HostFile, files_of, identify
from vmferry.machines.spec import MachineSpec
from vmferry.negotiation.findings import Finding, Severity, finding
from vmferry.telemetry.logs import get_logger
from vmferry.together import to_the_end
from vmferry.v1.compatibility_pb2 import FileIdentity

_LOG: Final = get_logger(__name__)


@dataclass
class Shown:
    """What can be told of a machine's files, and what stands against it."""

    identities: list[FileIdentity] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    def check(self) -> None:
        """Raise IncompatibleError if the machine cannot be moved for what was found."""
        if blocking := [found for found in self.findings if found.severity is Severity.BLOCKS]:
            raise incompatible(blocking)


@contextlib.asynccontextmanager
async def shown(spec: MachineSpec, contents: Contents, *, pid: int | None) -> AsyncIterator[Shown]:
    """The files of a machine as this host sees them; beacons stand beside its disks meanwhile.

    Args:
        spec: the machine.
        contents: hashes that are known already.
        pid: its hypervisor's process, if it runs.
    """
    files = files_of(spec.qemu) if spec.qemu is not None else []
    beacons: dict[Path, Beacon] = {}
    try:
        # Made to the end even if the caller is cancelled meanwhile, so that all that were made are removed.
        told = await to_the_end(asyncio.to_thread(_look, files, beacons, pid))
        for file, identity in zip(files, told.identities, strict=True):
            if not file.must_be_same:
                await _add_content(file, identity, contents, told)
        told.identities = [identity for identity in told.identities if identity.inode]
        yield told
    finally:
        await to_the_end(asyncio.to_thread(_remove, list(beacons.values())))


def _look(files: Iterable[HostFile], beacons: dict[Path, Beacon], pid: int | None) -> Shown:
    told = Shown()
    opened = _opened(pid) if pid is not None else None
    for file in files:
        identity = FileIdentity(field=file.field)
        try:
            real = file.path.resolve(strict=True)
            identity = identify(file.field, real)
        except (OSError, RuntimeError) as error:
            told.findings.append(_unknown(file, f"it cannot be looked at: {_words(error)}"))
        else:
            if file.must_be_same:
                told.findings += _light(file, real, identity, beacons)
            if file.disk is not None and opened is not None and _number(identity) not in opened:
                told.findings.append(_replaced(file))
        told.identities.append(identity)
    return told


def _light(
    file: HostFile, real: Path, identity: FileIdentity, beacons: dict[Path, Beacon]
) -> Iterable[Finding]:
    """Show the file by a beacon beside it."""
    try:
        beacon = beacons.get(real.parent) or make_beacon(real.parent)
    except OSError as error:
        yield _unknown(file, f"no beacon can be put beside it: {_words(error)}")
        return
    beacons[real.parent] = beacon
    if beacon.device == identity.device:
        identity.beacon, identity.beacon_sha256 = beacon.name, beacon.sha256
    else:
        yield _unknown(file, "it is mounted over its name, so nothing beside it shows where it lies")


async def _add_content(file: HostFile, identity: FileIdentity, contents: Contents, told: Shown) -> None:
    if identity.inode:
        try:
            identity.sha256 = await contents.sha256(file.path.resolve())
        except OSError as error:
            told.findings.append(_unknown(file, _words(error)))


def _remove(beacons: list[Beacon]) -> None:
    for beacon in beacons:
        try:
            beacon.remove()
        except OSError as error:
            _LOG.warning("a beacon stays", path=str(beacon.folder / beacon.name), detail=_words(error))


def _opened(pid: int) -> set[tuple[int, int]]:
    """Device and file number of everything that a process has open."""
    found = set()
    with contextlib.suppress(OSError):
        for path in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                status = path.stat()
                found.add((status.st_dev, status.st_ino))
    return found


def _number(identity: FileIdentity) -> tuple[int, int]:
    return identity.device, identity.inode


def _unknown(file: HostFile, why: str) -> Finding:
    if file.disk is None:
        message = f"{file.path} is not compared with the destination's: {why}"
        return finding("file.unverified", message, file.field, "Make it readable here.")
    message = f"the source cannot show which disk {file.path} is: {why}"
    remedy = "Let the source service read the image and write to its folder."
    return finding("disk.identity", message, file.field, remedy)


def _replaced(file: HostFile) -> Finding:
    message = f"{file.path} is not the file any more that the machine has open here"
    remedy = "Put the image that the machine uses back to its path, or restart the machine."
    return finding("disk.replaced", message, file.field, remedy)


def _words(error: Exception) -> str:
    return os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)


def incompatible(blocking: Sequence[Finding]) -> IncompatibleError:
    """The error that names everything that blocks."""
    return IncompatibleError(
        "; ".join(f"{found.id}: {found.message}" for found in blocking),
        remedy=" ".join(found.remedy for found in blocking),
        findings=",".join(found.id for found in blocking),
    )
