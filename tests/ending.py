"""How a run of tests ends that is told to: SIGTERM ends it as Ctrl-C does.

Promise: what the test at hand has started (services, machines, browsers) is ended and removed by its fixtures, in
this process and in every process that runs tests for it, whether the signal goes to the first or to all, and whether
or not a shell runs them in the background. A second SIGTERM does not disturb that.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any, Final

import pytest

_DISTRIBUTED: Final = b"exec(eval(sys.stdin.readline()))"
"""What the command line of a process has that execnet has started."""
_STATE: Final[dict[str, Any]] = {"process": 0, "of_several": False, "ending": False, "session": None}
_TIDIED: Final = "tests-tidied"
"""The name that a process takes when it has torn down its fixtures."""
_PATIENCE_S: Final = 180.0
_TOLD: Final = "told to end (SIGTERM)"


def pytest_configure(config: pytest.Config) -> None:
    _STATE.update(process=os.getpid(), of_several=hasattr(config, "workerinput"))
    signal.signal(signal.SIGTERM, _end)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell does to what it runs in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_sessionstart(session: pytest.Session) -> None:
    _STATE["session"] = session


def pytest_runtest_setup(item: pytest.Item) -> None:
    if signal.getsignal(signal.SIGTERM) is not _end:  # a test before this one has run something that heard it
        signal.signal(signal.SIGTERM, _end)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if _STATE["ending"] and _STATE["of_several"]:
        # Said so, the first process ends the run; interrupted, it would start another process in this one's place.
        output: dict[str, Any] = session.config.workeroutput  # type: ignore[attr-defined]
        output.update(exitstatus=int(pytest.ExitCode.OK), shouldstop=_TOLD)
        Path("/proc/self/comm").write_text(_TIDIED, encoding="ascii")  # all fixtures are torn down


def _wait_for(pids: list[int]) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while any(_tidies_up(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.02)


def _tidies_up(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/comm").read_text(encoding="ascii").strip() != _TIDIED
    except OSError:
        return False


def _end(number: int, frame: FrameType | None) -> None:
    if os.getpid() != _STATE["process"]:  # a fork, which has nothing to tidy up
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)
    if _STATE["ending"]:
        return
    _STATE["ending"] = True
    # With several processes, the first one only hands out tests, and its children are the ones that run them.
    # They are waited for here: soon after the first of them has ended, it would kill the others.
    if running := [] if _STATE["of_several"] else _testing_children():
        for pid in running:
            os.kill(pid, signal.SIGTERM)
        _wait_for(running)
        return
    if (
        _STATE["session"] is not None
    ):  # what is interrupted may take no notice; the test after it is not begun
        _STATE["session"].shouldstop = _TOLD
    try:
        signal.raise_signal(signal.SIGINT)
    finally:
        if _STATE["of_several"]:  # the first process loses patience before all is tidied up
            signal.signal(signal.SIGINT, signal.SIG_IGN)


def _testing_children() -> list[int]:
    children = (path.read_text(encoding="ascii") for path in Path("/proc/self/task").glob("*/children"))
    return [int(pid) for listed in children for pid in listed.split() if _DISTRIBUTED in _command(pid)]


def _command(pid: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
