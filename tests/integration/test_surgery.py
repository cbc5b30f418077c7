"""Operations are begun by a process that stands by, and that goes when the service does."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import pytest

import vmferry
from tests.support import wait_until
from vmferry.errors import InternalError, MachineDeadError
from vmferry.memory.surgery import operate, touch_own_memory

PACKAGES: Final = str(Path(vmferry.__file__).parents[1])
NAME: Final = b"vmferry.memory.surgeon"

SERVICE: Final = """
import os, sys
from vmferry.memory.surgery import operate
os.close(operate("userfault", int(sys.argv[1])))
print("operated", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def machine() -> Iterator[int]:
    """A process to operate on."""
    with subprocess.Popen(["sleep", "600"], start_new_session=True) as process:
        yield process.pid
        process.kill()


def standing_by(service: int) -> int:
    """The process that stands by for a service."""
    (found,) = (pid for pid in children(service) if NAME in Path(f"/proc/{pid}/cmdline").read_bytes())
    return found


def children(pid: int) -> set[int]:
    """The processes that a process has started and that have not ended."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return {int(child) for task in tasks for child in (task / "children").read_text().split()}


def descriptors(pid: int) -> list[str]:
    """What a process has open; nothing if it has ended."""
    with contextlib.suppress(OSError):
        return [str(entry.readlink()) for entry in Path(f"/proc/{pid}/fd").iterdir()]
    return []


def operate_once(pid: int) -> None:
    """One operation, without keeping what came of it."""
    os.close(operate("userfault", pid))


def test_one_process_begins_all_operations(machine: int) -> None:
    """Nothing is started for each; the signals that end a service's processes do not end it before the service."""
    operate_once(machine)
    first = standing_by(os.getpid())
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(first, number)
    operate_once(machine)
    touch_own_memory(machine)
    assert standing_by(os.getpid()) == first


def test_one_that_was_killed_is_replaced(machine: int) -> None:
    """The next operation does not fail for it."""
    operate_once(machine)
    first = standing_by(os.getpid())
    os.kill(first, signal.SIGKILL)
    # Until its end is complete it may still receive an order and not read it, which is an error that is told.
    os.waitid(os.P_PID, first, os.WEXITED | os.WNOWAIT)
    operate_once(machine)
    assert standing_by(os.getpid()) != first


@pytest.mark.parametrize("killed", [True, False], ids=["killed", "in good order"])
def test_it_ends_with_its_service(machine: int, killed: bool) -> None:
    """However that ends, nobody stands by any more."""
    with subprocess.Popen(
        [sys.executable, "-c", SERVICE, str(machine)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": PACKAGES},
    ) as service:
        assert service.stdout is not None
        assert service.stdin is not None
        assert service.stdout.readline() == b"operated\n"
        other = standing_by(service.pid)
        if killed:
            service.kill()
        else:
            service.stdin.close()
        service.wait(30)
    if killed:
        wait_until(lambda: not Path(f"/proc/{other}").exists(), what="the end of the one that stood by")
    assert not Path(f"/proc/{other}").exists()


def test_what_came_of_an_operation_is_the_callers_alone(machine: int) -> None:
    """To close it ends the tracking: whoever begins anew at once does not meet the tracking of before."""
    for _ in range(50):
        descriptor = operate("userfault", machine)
        others = children(standing_by(os.getpid()))
        held = [link for pid in others for link in descriptors(pid) if "userfaultfd" in link]
        os.close(descriptor)
        assert held == []


def test_an_operation_that_breaks_down_is_told(machine: int) -> None:
    """With what went wrong, and the next one is none the worse for it."""
    with pytest.raises(InternalError, match=f"(?s)process {machine} broke down: .*KeyError"):
        operate("appendectomy", machine)
    operate_once(machine)


def test_each_hears_of_its_own_operation(machine: int) -> None:
    """Threads that ask at the same time are answered each for itself."""
    with subprocess.Popen(["true"], start_new_session=True) as gone:
        gone.wait()

    def ask(pid: int) -> bool:
        try:
            operate_once(pid)
        except MachineDeadError:
            return False
        return True

    def ask_often(pid: int) -> set[bool]:
        return {ask(pid) for _ in range(50)}

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(ask_often, [machine, gone.pid])) == [{True}, {False}]
