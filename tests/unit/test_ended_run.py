"""A run of tests that is ended from outside leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 60.0
RUNS_ON = """
import contextlib
import os
import pathlib
import signal
import subprocess
import time

import pytest


@pytest.fixture(scope="module")
def service():
    process = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    try:
        yield process
    finally:
        # Long enough for a second signal to strike it; one process takes longer than the first gives it by itself.
        time.sleep(LATE if os.environ.get("PYTEST_XDIST_WORKER") == "gw1" else 0.2)
        process.kill()
        process.wait()
        pathlib.Path(f"{os.getpid()}.tidied").touch()


@pytest.mark.parametrize("number", range(2))
def test_waits(service, number):
    pathlib.Path(f"{os.getpid()}.started").write_text(str(service.pid))
    while True:
        WAIT
"""
WAITS = RUNS_ON.replace("WAIT", "time.sleep(0.05)").replace("LATE", "12")
IS_DEAF = RUNS_ON.replace("while True", "with contextlib.suppress(KeyboardInterrupt)")
IS_DEAF = IS_DEAF.replace("WAIT", "time.sleep(60)").replace("LATE", "0.2")


@pytest.mark.parametrize(
    ("processes", "told", "tests"),
    [(0, "the first process", WAITS), (2, "the first process", WAITS), (2, "all of them, twice", IS_DEAF)],
)
def test_sigterm_ends_what_the_tests_have_started(
    tmp_path: Path, processes: int, told: str, tests: str
) -> None:
    """Every fixture is torn down, and no process is left, whoever is sent the signal."""
    (tmp_path / "test_it.py").write_text(tests, encoding="utf-8")
    run = subprocess.Popen(
        [sys.executable, "-m", "pytest", "-p", "tests.ending", f"--numprocesses={processes}", "test_it.py"],
        cwd=tmp_path,
        preexec_fn=_as_in_the_background,  # noqa: PLW1509 - one system call
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    deadline = time.monotonic() + DEADLINE_S
    try:
        while len(list(tmp_path.glob("*.started"))) < max(1, processes):
            assert time.monotonic() < deadline
            assert run.poll() is None
            time.sleep(0.02)
        if told == "the first process":
            run.send_signal(signal.SIGTERM)
        else:
            os.killpg(run.pid, signal.SIGTERM)
            os.killpg(run.pid, signal.SIGTERM)
        said, _ = run.communicate(timeout=DEADLINE_S)
        assert run.returncode == pytest.ExitCode.INTERRUPTED, said.decode()
        assert len(list(tmp_path.glob("*.tidied"))) == max(1, processes), said.decode()
        for path in tmp_path.glob("*.started"):
            assert not Path(f"/proc/{path.read_text(encoding='ascii')}").exists()
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
            run.wait()
        for path in tmp_path.glob("*.started"):
            pid = int(path.read_text(encoding="ascii") or 0)
            if pid and b"sleep" in _command(pid):
                os.kill(pid, signal.SIGKILL)


def _as_in_the_background() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
