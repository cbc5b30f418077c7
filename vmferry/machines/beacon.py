"""Beacons: short-lived files by which one host shows another that both see the same folder.

    source                                      destination
    makes FOLDER/.vmferry-<32 hex>.beacon
    with random content  -- name, SHA-256 -->   opens that name in its own FOLDER and compares
    removes it           <-- answer ---------

Promise: a beacon has a name and a content that nobody could know before; a reader opens nothing but a regular file of
such a name in the given folder, follows no link and reads a bounded number of bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_NAME: Final = re.compile(r"\.vmferry-[0-9a-f]{32}\.beacon")
_CONTENT_BYTES: Final = 32
_FORGOTTEN_S: Final = 3600
"""A beacon stands for the time of one call; one that is so old was left by a process that was killed."""


@dataclass(frozen=True)
class Beacon:
    """A beacon that stands in a folder."""

    folder: Path
    name: str
    sha256: bytes
    device: int
    """Number of the device that the folder's files lie on."""

    def remove(self) -> None:
        """Take it away; safe to call twice."""
        (self.folder / self.name).unlink(missing_ok=True)


def make_beacon(folder: Path) -> Beacon:
    """Put a fresh beacon into a folder, on disk for other hosts to see; raises OSError where that cannot be."""
    name, content = f".vmferry-{secrets.token_hex(16)}.beacon", secrets.token_bytes(_CONTENT_BYTES)
    descriptor = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb", buffering=0) as file:
            file.write(content)
            os.fsync(file.fileno())
            found = os.fstat(file.fileno())
        _remove_forgotten(folder, found.st_mtime)
    except BaseException:
        (folder / name).unlink(missing_ok=True)
        raise
    return Beacon(folder, name, hashlib.sha256(content).digest(), found.st_dev)


def beacon_problem(folder: Path, name: str, sha256: bytes, *, device: int) -> str:
    """Why the beacon that another host speaks of is not seen in a folder; empty if it is.

    Args:
        folder: where to look.
        name: its name, as the other host gave it.
        sha256: of its content, as the other host gave it.
        device: what the file beside it lies on; a file that is mounted over a name lies elsewhere.
    """
    if not _NAME.fullmatch(name):
        return "the source shows no beacon beside it"
    try:
        content, found = _read(folder, name)
    except OSError as error:
        return f"the beacon that the source put beside it cannot be read here: {error.strerror}"
    if len(content) != _CONTENT_BYTES or not secrets.compare_digest(hashlib.sha256(content).digest(), sha256):
        return "the beacon beside it is not the one that the source put there"
    if found.st_dev != device:
        return "it is mounted over its name here"
    return ""


def _read(folder: Path, name: str) -> tuple[bytes, os.stat_result]:
    inside = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # Without O_NONBLOCK a pipe in its place would hold this thread.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        if not stat.S_ISREG(os.stat(name, dir_fd=inside, follow_symlinks=False).st_mode):
            raise OSError(0, "it is not a regular file")
        with os.fdopen(os.open(name, flags, dir_fd=inside), "rb", buffering=0) as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise OSError(0, "it is not a regular file")
            return file.read(_CONTENT_BYTES + 1), found
    finally:
        os.close(inside)


def _remove_forgotten(folder: Path, now: float) -> None:
    """Remove beacons that nobody waits for any more; both times are the file server's."""
    with os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):  # another host may be faster, or own it
                if (
                    _NAME.fullmatch(entry.name)
                    and entry.is_file(follow_symlinks=False)
                    and now - entry.stat(follow_symlinks=False).st_mtime > _FORGOTTEN_S
                ):
                    (folder / entry.name).unlink()
