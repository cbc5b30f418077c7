"""Whether the files that a machine needs are here what they are at its source.

Promise: only files below this host's roots are looked at, with links followed; what a source learns is whether they
are what it says they are. A disk that is written to is let in only if it was shown to be the very same file.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from dest_svc.admission import Refusal, resolved_file
from vmferry.config import HostConfig
from vmferry.machines.beacon import beacon_problem
from vmferry.machines.fileidentity import Contents, HostFile, differences, files_of, identify
from vmferry.machines.qemu.image import other_files
from vmferry.machines.qemu.spec import DiskSpec
from vmferry.machines.spec import MachineSpec
from vmferry.negotiation.findings import Severity
from vmferry.v1.compatibility_pb2 import FileIdentity

_LITTLE_BYTES: Final = 1024**3
_LITTLE_SHARE: Final = 0.05
_SAME_FILE: Final = (
    "Put the image on storage that both hosts share, at the same path, writable for the source."
)
_EQUAL_FILE: Final = "Put the same file there, at the same path."


async def file_refusals(
    spec: MachineSpec, theirs: Iterable[FileIdentity], config: HostConfig, contents: Contents
) -> list[Refusal]:
    """Everything that speaks against the files of a description, or is worth a warning."""
    told = {identity.field: identity for identity in theirs}
    found = []
    for file in files_of(spec.qemu) if spec.qemu is not None else ():
        real = await asyncio.to_thread(resolved_file, file.field, file.path, config)
        if isinstance(real, Refusal):
            continue  # told with the rest of the description
        try:
            found += await _judged(file, real, told.get(file.field, FileIdentity()), contents)
        except OSError as error:
            found.append(_unverified(file, f"it cannot be read here: {error.strerror}"))
    return found


async def _judged(file: HostFile, real: Path, theirs: FileIdentity, contents: Contents) -> list[Refusal]:
    if file.disk is None:
        return await _content(file, real, theirs, contents)
    found = await asyncio.to_thread(_about_disk, file, file.disk, real)
    if not file.must_be_same:
        return found + await _content(file, real, theirs, contents)
    if file.disk.shared:
        found += await asyncio.to_thread(_identity, file, file.disk, real, theirs)
    return found


async def _content(file: HostFile, real: Path, theirs: FileIdentity, contents: Contents) -> list[Refusal]:
    """Against a file that is only read."""
    if not theirs.sha256:
        return [_unverified(file, "the source does not tell its content")]
    # Only for a file of that very size is the content read, which costs time.
    equal = (await asyncio.to_thread(real.stat)).st_size == theirs.size_bytes
    if equal and secrets.compare_digest(await contents.sha256(real), theirs.sha256):
        return []
    what = "reads" if file.disk is not None else "starts from after a reboot"
    message = f"{file.path} has another content here: the guest {what} something else"
    return [Refusal("file.differs", file.field, message, _EQUAL_FILE)]


def _about_disk(file: HostFile, disk: DiskSpec, real: Path) -> list[Refusal]:
    """Against a disk, whichever file it is."""
    if not disk.shared and not disk.read_only:
        message = f"the disk {file.path} is local to the source, and disks are not moved"
        remedy = (
            "Put it on storage that both hosts share and set shared = true, or run the machine without it."
        )
        return [Refusal("disk.not-shared", file.field, message, remedy)]
    wanted = os.R_OK if disk.read_only else os.R_OK | os.W_OK
    if not os.access(real, wanted, effective_ids=True):
        verb = "read" if disk.read_only else "written to"
        message = f"{file.path} cannot be {verb} here"
        return [Refusal("disk.no-access", file.field, message, "Give the destination service access to it.")]
    if disk.format == "qcow2" and (needs := other_files(real)):
        message = f"{file.path} cannot be moved: {needs}"
        remedy = "Make it a whole image of its own (qemu-img convert)."
        return [Refusal("disk.image", file.field, message, remedy)]
    return [] if disk.read_only else _about_space(file, disk, real)


def _about_space(file: HostFile, disk: DiskSpec, real: Path) -> list[Refusal]:
    found, system = real.stat(), os.statvfs(real)
    grows = disk.format == "qcow2" or found.st_blocks * 512 < found.st_size
    free, size = system.f_bavail * system.f_frsize, system.f_blocks * system.f_frsize
    if not grows or free >= max(_LITTLE_BYTES, size * _LITTLE_SHARE):
        return []
    message = f"{file.path} may grow, and its file system has {free // 1024**2} MiB left"
    remedy = "Make room: a guest whose disk cannot grow is stopped."
    return [Refusal("disk.space", file.field, message, remedy, Severity.WARNS)]


def _identity(file: HostFile, disk: DiskSpec, real: Path, theirs: FileIdentity) -> list[Refusal]:
    """Against a disk that must be the very same file."""
    mine = identify(file.field, real)
    beacon = beacon_problem(real.parent, theirs.beacon, theirs.beacon_sha256, device=mine.device)
    may_grow = disk.format == "qcow2"  # the guest writes meanwhile
    against = differences(theirs, mine, beacon_problem=beacon, may_grow=may_grow)
    if not against:
        return []
    message = f"{file.path} is not shown to be the same file on both hosts: {'; '.join(against)}"
    return [Refusal("disk.identity", file.field, message, _SAME_FILE)]


def _unverified(file: HostFile, why: str) -> Refusal:
    if file.disk is not None:
        message = f"{file.path} is not shown to be the same on both hosts: {why}"
        return Refusal("disk.identity", file.field, message, _EQUAL_FILE)
    message = f"whether {file.path} is the same on both hosts is not known: {why}"
    return Refusal("file.unverified", file.field, message, "Compare it by hand.", Severity.WARNS)
