"""Listeners that only this host can reach: a unix socket that only its owner may open, or a loopback port.

Promise: an address that anybody else could reach is refused, and so is the socket of a service that lives; the socket
that a service left behind when it ended is removed.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from vmferry.errors import ConfigError

UNIX: Final = "unix:"
"""Begins the target of a unix socket."""
_LONGEST_SOCKET_PATH: Final = 107
"""Bytes that ``sockaddr_un`` has room for, without the final NUL."""


def loopback(target: str, setting: str) -> str:
    """The target with a literal address, if nobody outside of this host can reach it.

    Raises:
        ConfigError: somebody could, or it is no address and port.
    """
    host, _, port = target.rpartition(":")
    # A name may be resolved to anything; this one means what everybody takes it for.
    literal = "127.0.0.1" if host == "localhost" else host.removeprefix("[").removesuffix("]")
    try:
        local = port.isdigit() and ipaddress.ip_address(literal).is_loopback
    except ValueError:
        local = False
    if not local:
        raise ConfigError(
            f"{target} is not allowed for the admin listener: anybody who reaches it may look into the service",
            field=setting,
            remedy="Use unix:PATH, or a loopback address and a port such as 127.0.0.1:7611.",
        )
    return f"[{literal}]:{port}" if ":" in literal else f"{literal}:{port}"


def socket_path(target: str, setting: str) -> Path:
    """Where the socket of ``unix:/path`` is to be made; nothing is there any more.

    Raises:
        ConfigError: the path is too long, or something else is there.
    """
    path = Path(target.removeprefix(UNIX))
    if len(os.fsencode(path)) > _LONGEST_SOCKET_PATH:
        raise ConfigError(
            f"the path {path} is too long for a socket: at most {_LONGEST_SOCKET_PATH} bytes", field=setting
        )
    _remove_stale(path, setting)
    return path


@contextlib.contextmanager
def private_files() -> Iterator[None]:
    """What is made meanwhile is its owner's from its first moment, not after a later chmod."""
    before = os.umask(0o177)
    try:
        yield
    finally:
        os.umask(before)


def _remove_stale(path: Path, setting: str) -> None:
    """Remove the socket of a service that has ended; gRPC would take a live one away as well."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise ConfigError(f"{path} is there and is not a socket", field=setting)
        with socket.socket(socket.AF_UNIX) as probe:
            probe.setblocking(False)  # a full backlog must not make the start hang
            probe.connect(os.fspath(path))
    except FileNotFoundError:
        return
    except ConnectionRefusedError:
        path.unlink(missing_ok=True)
        return
    except OSError as error:
        raise ConfigError(f"cannot use the socket {path}: {error.strerror}", field=setting) from error
    raise ConfigError(f"another process listens on {path}", field=setting)
