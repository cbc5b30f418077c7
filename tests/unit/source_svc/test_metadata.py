"""The sockets of the metadata service: one that can be seen can be used."""

from __future__ import annotations

import os
import socket
from contextlib import closing
from pathlib import Path

import pytest

from source_svc.metadata import listening
from vmferry.machines.paths import MAX_SOCKET_PATH_BYTES


def connects(path: Path) -> bool:
    """Whether somebody listens there."""
    with socket.socket(socket.AF_UNIX) as one:
        return one.connect_ex(str(path)) == 0


def test_a_socket_that_is_there_takes_connections(tmp_path: Path) -> None:
    """A caller that waits for the file is never refused; nothing else is left beside it."""
    path = tmp_path / "guests" / "vm.sock"
    with closing(listening(path)):
        assert connects(path)
        assert list(path.parent.iterdir()) == [path]


def test_what_an_ended_service_left_is_replaced(tmp_path: Path) -> None:
    """Also while it was making one."""
    path = tmp_path / "vm.sock"
    for left in (path, tmp_path / ".new"):
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(str(left))
    with closing(listening(path)):
        assert connects(path)
        assert list(tmp_path.iterdir()) == [path]


def test_a_path_as_long_as_can_be_is_used(tmp_path: Path) -> None:
    """What is made first needs no more room; one byte more is refused by name."""
    name = "v.sock"
    fill = MAX_SOCKET_PATH_BYTES - len(os.fsencode(tmp_path)) - len(name) - 2
    path = tmp_path / ("d" * fill) / name
    with closing(listening(path)):
        assert connects(path)
    with pytest.raises(OSError, match="too long for a socket"):
        listening(path.with_name("vm.sock"))
