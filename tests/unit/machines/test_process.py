"""The identity of a process: a reused number deceives nobody."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import wait_until
from vmferry.machines.process import ProcessIdentity, boot_id

OWN = ProcessIdentity.of(os.getpid())
assert OWN is not None


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    """A process that does nothing, under a name that would confuse a naive reader of /proc/PID/stat."""
    code = "import ctypes, sys; ctypes.CDLL(None).prctl(15, b') Z 1 (', 0, 0, 0); sys.stdin.read()"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.communicate()


def _identity(child: subprocess.Popen[bytes]) -> ProcessIdentity:
    found = ProcessIdentity.of(child.pid)
    assert found is not None
    return found


@pytest.mark.parametrize(
    "stranger",
    [
        dataclasses.replace(OWN, start_time=OWN.start_time + 1),
        dataclasses.replace(OWN, boot_id="0f8fad5b-d9cb-469f-a165-70867728950e"),
    ],
)
def test_a_reused_number_is_not_the_process(stranger: ProcessIdentity) -> None:
    """A process with the right number but another start time or boot is neither alive nor signalled."""
    assert OWN is not None
    assert OWN.alive()
    assert not stranger.alive()
    assert not stranger.same_as(OWN)
    # Signal 0 does no harm if this test should fail.
    assert not stranger.send_signal(signal.SIGCONT)


def test_the_name_of_a_process_does_not_confuse(child: subprocess.Popen[bytes]) -> None:
    """The fields are found behind the last bracket of the name, whatever the name is."""
    wait_until(lambda: _comm(child.pid) == ") Z 1 (", what="the new name")
    identity = _identity(child)
    assert identity.alive()
    assert identity.start_time > 1


def test_a_zombie_is_not_alive(child: subprocess.Popen[bytes]) -> None:
    """A process that ended but was not waited for counts as ended."""
    identity = _identity(child)
    assert identity.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not identity.alive()
    assert not identity.send_signal(signal.SIGKILL)


async def test_waiting_ends_with_the_process_or_with_patience(child: subprocess.Popen[bytes]) -> None:
    """The wait reports the end when it comes, and its absence when the time is over."""
    identity = _identity(child)
    assert not await identity.wait_ended(0.01)
    waiting = asyncio.create_task(identity.wait_ended(30))
    await asyncio.sleep(0)
    identity.send_signal(signal.SIGKILL)
    assert await waiting
    child.wait()
    assert await identity.wait_ended(0.01)
    assert ProcessIdentity.of(child.pid) is None


def test_a_record_reads_back_and_nothing_else_does() -> None:
    """The record is the identity; anything else is refused with ValueError."""
    assert OWN is not None
    assert ProcessIdentity.from_json(OWN.to_json()) == OWN
    record = f'"start_time": 1, "boot_id": "{boot_id()}", "started_at": ""'
    for text in (
        "",
        "[]",
        "{}",
        "{",
        f'{{"pid": true, {record}}}',
        f'{{"pid": 1, {record}}}',
        f'{{"pid": "7", {record}}}',
    ):
        with pytest.raises(ValueError, match=r".+"):
            ProcessIdentity.from_json(text)


def _comm(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text(encoding="ascii").rstrip("\n")
