"""The limit in a real cgroup, on a process that would take all the time it gets."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cgroups import Group, cpu_group
from tests.support import wait_until
from vmferry.bench.usage import used_s
from vmferry.machines.cpulimit import RECORD, CpuLimit, restore, restore_all

PERCENT = 95
MEASURED_S = 1.0
SLACK = 3.0
"""The kernel counts in ticks, and what is left of a period that had begun is not taken away."""


@pytest.fixture
def busy() -> Iterator[subprocess.Popen[bytes]]:
    """A process that never waits."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def share_of(pid: int) -> float:
    """The part of a processor that a process gets."""
    used, since = used_s(pid), time.monotonic()
    wait_until(lambda: time.monotonic() - since > MEASURED_S, what="it has had some time")
    return (used_s(pid) - used) / (time.monotonic() - since)


def held_back_more(group: Group) -> bool:
    """Whether the kernel lets the group wait now."""
    before, until = group.times_held_back(), time.monotonic() + MEASURED_S
    while time.monotonic() < until:
        if group.times_held_back() > before:
            return True
        time.sleep(0.01)  # a rate of looking
    return False


@pytest.mark.parametrize("undoing", ["by who did it", "by the next start"])
def test_the_kernel_keeps_a_busy_process_to_its_limit(
    tmp_path: Path, busy: subprocess.Popen[bytes], undoing: str
) -> None:
    """It gets no more than was left to it, and all there is as soon as the limit is undone, by whomever."""
    home = tmp_path / "machine"
    home.mkdir()
    with cpu_group() as group:
        group.add(busy.pid)
        before = group.said()
        limit = CpuLimit.find(busy.pid, home, 1)
        assert limit is not None
        assert limit.file == group.limit
        assert group.said() == before
        assert not held_back_more(group)
        limit.take(PERCENT)
        assert group.said() != before
        assert (home / RECORD).exists()
        wait_until(lambda: held_back_more(group), what="it is held back")
        assert share_of(busy.pid) < (1 - PERCENT / 100) * SLACK
        if undoing == "by who did it":
            limit.give_back()
        else:
            restore_all(tmp_path)
        assert group.said() == before
        assert not held_back_more(group)
        assert not restore(home)
        busy.kill()
        busy.wait()


def test_a_process_among_others_is_left_alone(tmp_path: Path, busy: subprocess.Popen[bytes]) -> None:
    """Where another process would be limited too, or everybody would, there is no limit to use."""
    assert CpuLimit.find(busy.pid, tmp_path, 1) is None
    other = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    try:
        with cpu_group() as group:
            group.add(busy.pid)
            group.add(other.pid)
            assert CpuLimit.find(busy.pid, tmp_path, 1) is None
    finally:
        other.communicate()
