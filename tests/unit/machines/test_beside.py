"""The second process of an update becomes the machine's: nothing that others reach it by stays behind."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from vmferry.machines.beside import adopt, find_beside, paths_beside
from vmferry.machines.paths import MachinePaths, write_whole
from vmferry.machines.process import ProcessIdentity
from vmferry.machines.spec import new_spec

SOCKETS = ("qmp", "observer", "serial_socket", "agent_socket", "metadata_socket")


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Two processes, which stand for the hypervisors."""
    with ExitStack() as stack:
        found = []
        for _ in range(2):
            process = stack.enter_context(subprocess.Popen(["sleep", "60"]))
            stack.callback(process.kill)
            found.append(process)
        yield found


def _listen(path: Path, stack: ExitStack) -> None:
    listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
    listener.bind(str(path))
    listener.listen(1)


async def test_all_that_the_new_process_listens_at_is_the_machines(
    tmp_path: Path, processes: list[subprocess.Popen[bytes]]
) -> None:
    """Every socket answers under the machine's own names, the first process is ended, and its folder is gone."""
    old, new = processes
    paths = MachinePaths(home=tmp_path / "m", ram=tmp_path / "ram")
    beside = paths_beside(paths)
    beside.home.mkdir(parents=True)
    spec = new_spec("m", 64, "canary", {})
    with ExitStack() as stack:
        for where, process in ((paths, old), (beside, new)):
            identity = ProcessIdentity.of(process.pid)
            assert identity is not None
            write_whole(where.process, identity.to_json())
            write_whole(where.spec, spec.to_toml())
        for name in SOCKETS:
            _listen(getattr(beside, name), stack)
        await adopt(paths)
        for name in SOCKETS:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as caller:
                caller.connect(str(getattr(paths, name)))
    assert old.wait(5) < 0
    assert new.poll() is None
    assert not beside.home.exists()
    assert find_beside(paths) is None
    now = ProcessIdentity.from_json(paths.process.read_text(encoding="utf-8"))
    assert now.pid == new.pid


async def test_without_a_second_process_nothing_is_adopted(tmp_path: Path) -> None:
    """Whoever repeats the step, after a crash or not, changes nothing."""
    paths = MachinePaths(home=tmp_path / "m", ram=tmp_path / "ram")
    paths.home.mkdir()
    await adopt(paths)
    assert not list(paths.home.iterdir())
