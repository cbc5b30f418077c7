"""The first process of a container: real processes below it that end, hang, fail, and leave orphans behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import wait_until

# A service: notes each start, feeds the watchdog unless it hangs, and notes the signals it hears.
SERVICE = """
import os, signal, socket, subprocess, sys, time
folder, name = sys.argv[1:3]
def note(what):
    with open(f"{folder}/{name}", "a") as file: file.write(f"{what}\\n")
def heard(number, frame):
    note(signal.Signals(number).name)
    if number != signal.SIGHUP: sys.exit(0)
signal.signal(signal.SIGTERM, heard); signal.signal(signal.SIGHUP, heard)
note(f"start {os.getpid()}")
if "fails" in sys.argv: sys.exit(2)
if "orphan" in sys.argv: note("orphan %d" % subprocess.Popen(["sleep", "600"]).pid)
out = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
while True:
    if not os.path.exists(f"{folder}/hang-{name}"): out.sendto(b"STATUS=x\\nWATCHDOG=1", os.environ["NOTIFY_SOCKET"])
    time.sleep(0.05)
"""
# The supervisor, as if it were the first process of a container: orphans become its children.
FIRST = """
import ctypes, json, sys
from pathlib import Path
from vmferry.supervisor import Child, Supervisor, notify_socket
assert ctypes.CDLL(None).prctl(36, 1, 0, 0, 0) == 0
folder = sys.argv[1]
children = [
    Child(name, [sys.executable, *command], notify_socket(Path(f"{folder}/{name}.sock")))
    for name, command in json.loads(sys.argv[2]).items()
]
sys.exit(Supervisor(children, stop_timeout_s=5.0, watchdog_s=1.0).run())
"""


class First:
    """A supervisor that runs."""

    def __init__(self, folder: Path, services: dict[str, list[str]]) -> None:
        self.folder = folder
        script = folder / "service.py"
        script.write_text(SERVICE, encoding="utf-8")
        commands = {name: [str(script), str(folder), name, *words] for name, words in services.items()}
        with (folder / "log.txt").open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", FIRST, str(folder), json.dumps(commands)],
                stdin=subprocess.DEVNULL,
                stderr=log,
                env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
            )

    def notes(self, name: str) -> list[str]:
        """What a service has noted."""
        path = self.folder / name
        return path.read_text(encoding="utf-8").splitlines() if path.exists() else []

    def starts(self, name: str) -> list[int]:
        """The processes that a service was."""
        return [int(line.split()[1]) for line in self.notes(name) if line.startswith("start")]

    def end(self) -> None:
        """End everything, by force where it does not go."""
        self.process.kill()
        self.process.wait()
        for path in self.folder.iterdir():
            for line in path.read_text("utf-8").splitlines() if path.is_file() and not path.suffix else ():
                if line.startswith(("start", "orphan")) and Path(f"/proc/{line.split()[1]}").exists():
                    os.kill(int(line.split()[1]), signal.SIGKILL)


@pytest.fixture
def first(tmp_path: Path) -> Iterator[Callable[..., First]]:
    """Starts supervisors, and ends them."""
    started: list[First] = []

    def start(**services: list[str]) -> First:
        started.append(First(tmp_path, services))
        for name in services if ["fails"] not in services.values() else ():
            wait_until(lambda name=name: started[-1].starts(name), what=f"{name} runs")
        return started[-1]

    yield start
    for one in started:
        one.end()


def test_a_killed_service_comes_back_and_its_machine_lives_on(first: Callable[..., First]) -> None:
    """The other one is left alone; what the dead one started is the first process's, which collects it at its end."""
    one = first(a=["orphan"], b=[])
    wait_until(lambda: any("orphan" in line for line in one.notes("a")), what="it started something")
    machine = int(next(line for line in one.notes("a") if "orphan" in line).split()[1])
    os.kill(one.starts("a")[0], signal.SIGKILL)
    wait_until(lambda: len(one.starts("a")) == 2, what="it is started again")
    assert len(one.starts("b")) == 1
    parent = Path(f"/proc/{machine}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[1]
    assert int(parent) == one.process.pid
    os.kill(machine, signal.SIGKILL)
    wait_until(lambda: not Path(f"/proc/{machine}").exists(), what="the machine's process is collected")


def test_a_service_that_hangs_is_started_again(first: Callable[..., First]) -> None:
    """As long as it says that it lives nothing happens; once it is silent for too long, it is ended and started."""
    one = first(a=[], b=[])
    (one.folder / "hang-a").touch()
    wait_until(lambda: len(one.starts("a")) == 2, what="it is started again")
    (one.folder / "hang-a").unlink()
    assert len(one.starts("b")) == 1


def test_signals_reach_both_services(first: Callable[..., First]) -> None:
    """SIGHUP is passed on and ends nothing; SIGTERM ends both, and then the first process, with 0."""
    one = first(a=[], b=[])
    one.process.send_signal(signal.SIGHUP)
    for name in "ab":
        wait_until(lambda name=name: "SIGHUP" in one.notes(name), what="SIGHUP is passed on")
    one.process.send_signal(signal.SIGTERM)
    assert one.process.wait(20) == 0
    for name in "ab":
        assert one.notes(name)[-1] == "SIGTERM"
        assert len(one.starts(name)) == 1


def test_what_cannot_start_ends_the_container(first: Callable[..., First]) -> None:
    """A service that fails at once, as with a wrong configuration, is not repeated; its exit code is told."""
    one = first(a=[], b=["fails"])
    assert one.process.wait(20) == 2
    log = (one.folder / "log.txt").read_text(encoding="utf-8")
    events = [json.loads(line)["event"] for line in log.splitlines()]
    assert "a service cannot start" in events


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('state_dir = "/proc/nothing"', "cannot use /proc/nothing"),
        ('run_dir = "{folder}/service.py"', "cannot use"),
        ("no_such_setting = 1", "unknown setting"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path: Path, text: str, said: str) -> None:
    """A folder or setting that cannot be used gives a sentence, and the exit code of a bad configuration."""
    (tmp_path / "service.py").touch()
    config = tmp_path / "host.toml"
    elsewhere = "" if "state_dir" in text else f'state_dir = "{tmp_path}/state"\n'
    config.write_text(elsewhere + text.format(folder=tmp_path), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "vmferry.supervisor", "--config", str(config)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
