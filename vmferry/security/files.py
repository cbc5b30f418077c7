"""Reads and writes the small files that hold certificates and keys.

Promise: a key is read only from a regular file that nobody but its owner can open, and is never on disk with a wider
mode, not even for a moment; a file is replaced whole or not at all; every fault is a ConfigError naming the file.
"""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path
from typing import Final

from vmferry.errors import ConfigError

MAX_FILE_BYTES: Final = 1024 * 1024
PRIVATE_MODE: Final = 0o600
PUBLIC_MODE: Final = 0o644
_OTHERS: Final = 0o077


def read_public(path: Path) -> bytes:
    """The content of a file of certificates."""
    return _read(path, private=False)


def read_private(path: Path) -> bytes:
    """The content of a key file; its mode must not be wider than 0600."""
    return _read(path, private=True)


def write_atomic(path: Path, data: bytes, *, mode: int) -> None:
    """Put a whole new file in place of ``path``; it has ``mode`` from its first moment on."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with open(temporary, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            os.fchmod(file.fileno(), mode)  # the umask may have narrowed it
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ConfigError(f"cannot write {path}: {error.strerror}", field=path.name) from error


def _read(path: Path, *, private: bool) -> bytes:
    try:
        # Not blocking: a FIFO of this name must not hang the service.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            # Judged by the open file, which cannot be exchanged between the look and the read.
            _check(path, os.fstat(file.fileno()), private=private)
            return file.read(MAX_FILE_BYTES)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", field=path.name) from error


def _check(path: Path, status: os.stat_result, *, private: bool) -> None:
    if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_FILE_BYTES:
        raise ConfigError(f"{path} is not a regular file of at most 1 MiB", field=path.name)
    if private and status.st_mode & _OTHERS:
        raise ConfigError(
            f"{path} can be opened by others (mode {stat.S_IMODE(status.st_mode):04o})",
            field=path.name,
            remedy=f"Run: chmod 600 {path}",
        )
