"""``vmferry machine console``: keys and words go through as they are, and the terminal is as it was afterwards."""

from __future__ import annotations

import os
import socket
import tempfile
import termios
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import wait_until
from tests.unit.cli.conftest import Run
from tests.unit.machines.qemu_specs import SHORT
from vmferry.cli.console import LEAVE, attach
from vmferry.errors import ExitCode, MachineFailedError


class Console:
    """A terminal that is attached to a port, whose other side a test holds."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "serial.sock"
        self.keys, self.terminal = os.openpty()
        self.before = termios.tcgetattr(self.terminal)
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.bind(str(self.path))
        self.listener.listen(1)
        self.thread = threading.Thread(target=attach, args=(self.path, self.terminal, self.terminal))
        self.thread.start()
        self.port, _ = self.listener.accept()
        self.port.settimeout(10)
        wait_until(lambda: not self.mode() & termios.ICANON, what="the terminal is raw")

    def mode(self) -> int:
        """The local modes of the terminal."""
        return int(termios.tcgetattr(self.terminal)[3])

    def ended(self) -> bool:
        """Whether it left, and the terminal is as it was."""
        self.thread.join(10)
        return not self.thread.is_alive() and termios.tcgetattr(self.terminal) == self.before

    def close(self) -> None:
        """End it however it stands."""
        self.port.close()
        self.thread.join(10)
        self.listener.close()
        os.close(self.keys)
        os.close(self.terminal)


@pytest.fixture
def console(tmp_path: Path) -> Iterator[Console]:
    """One that is attached."""
    made = Console(tmp_path)
    yield made
    made.close()


def test_keys_and_words_go_through_as_they_are(console: Console) -> None:
    """Control characters reach the guest, its words the screen; the key that leaves does not."""
    os.write(console.keys, b"ls\r\x03\x04")
    received = b""
    while len(received) < 5:
        received += console.port.recv(16)
    assert received == b"ls\r\x03\x04"
    console.port.sendall(b"\x1b[1mhello\n")
    shown = b""
    while len(shown) < 10:
        shown += os.read(console.keys, 64)
    assert shown == b"\x1b[1mhello\n"
    os.write(console.keys, b"x" + LEAVE + b"y")
    assert console.port.recv(16) == b"x"
    assert console.ended()
    assert console.port.recv(16) == b""


def test_the_end_of_the_machine_ends_it(console: Console) -> None:
    """The terminal is given back."""
    console.port.close()
    assert console.ended()


def test_a_port_that_is_not_there_is_told(tmp_path: Path) -> None:
    """By its path."""
    keyboard = os.open("/dev/null", os.O_RDWR)
    try:
        with pytest.raises(MachineFailedError, match=r"nothing\.sock"):
            attach(tmp_path / "nothing.sock", keyboard, keyboard)
    finally:
        os.close(keyboard)


@pytest.mark.parametrize(
    ("serial", "code", "culprit"),
    [("file", ExitCode.USAGE, "serial.log"), ("socket", ExitCode.PRECONDITION, "no running process")],
)
def test_a_machine_without_a_port_to_type_at_is_refused(
    run: Run, serial: str, code: ExitCode, culprit: str
) -> None:
    """One whose port leads to a file is told where that is; one that does not run has no port."""
    # A short path, for a machine's sockets lie below it.
    with tempfile.TemporaryDirectory(prefix="vf-") as folder:
        config = Path(folder) / "host.toml"
        config.write_text('state_dir = "state"\nrun_dir = "run"\nram_dir = "ram"\n')
        home = Path(folder) / "run" / "machines" / "web-1"
        home.mkdir(parents=True)
        (home / "spec.toml").write_text(SHORT + f'serial = "{serial}"\n')
        ran = run("machine", "console", "web-1", "--config", config)
    assert ran.code == code, ran.err
    assert culprit in ran.err
