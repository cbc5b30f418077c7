"""A micro-VM process for tests: starts it with the documented command line and talks plain QMP to it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import vmferry
from tests.support import wait_until
from vmferry.machines.microvm.verdict import CanaryLine, latest
from vmferry.memory.runs import PAGE_SIZE

MIB = 1 << 20
MEMORY_MIB = 4
CHAIN = MIB
"""Guest address of the canary's first page, see guests/canary.S."""
CHAIN_PAGES = 256
CANARY = ("canary", "resident-mib=1", "tick-us=100", "dirty-mib-per-s=4", "working-set-mib=1")
WORKING = CHAIN + CHAIN_PAGES * PAGE_SIZE
UUID = "0d1b6a9e-9a54-4d0c-8f4e-0a1c7c6f2b11"
MAC = "52:54:00:aa:bb:cc"


class QmpError(Exception):
    """A command was refused."""


class Qmp:
    """A plain QMP client."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(20)
        try:
            self._socket.connect(str(path))
        except OSError:
            self._socket.close()
            raise
        self._lines = self._socket.makefile("rb")
        self.events: list[dict[str, Any]] = []
        self.greeting = json.loads(self._lines.readline())

    def send(self, line: bytes) -> dict[str, Any]:
        """Send a line; its answer, with events put aside."""
        self._socket.sendall(line + b"\n")
        while True:
            answer: dict[str, Any] = json.loads(self._lines.readline())
            if "event" not in answer:
                return answer
            self.events.append(answer)

    def __call__(self, command: str, **arguments: Any) -> Any:
        """Run a command; what it returns."""
        answer = self.send(json.dumps({"execute": command, "arguments": arguments, "id": command}).encode())
        assert answer["id"] == command
        if "error" in answer:
            raise QmpError(f"{answer['error']['class']}: {answer['error']['desc']}")
        return answer["return"]

    def hung_up(self) -> bool:
        """Whether the other end has closed the connection; reads what is left."""
        with contextlib.suppress(ConnectionResetError):
            while self._lines.readline():
                pass
        return True

    def close(self) -> None:
        """Hang up."""
        self._lines.close()
        self._socket.close()


@dataclass
class Vm:
    """One micro-VM process in a directory of its own."""

    directory: Path
    guest: tuple[str, ...] = CANARY
    options: tuple[str, ...] = ()
    process: subprocess.Popen[bytes] = field(init=False)
    qmp: Qmp = field(init=False)
    _clients: list[Qmp] = field(default_factory=list)

    @property
    def ram(self) -> Path:
        """The RAM file."""
        return self.directory / "ram"

    def start(self) -> Vm:
        """Start the process and negotiate."""
        self.directory.mkdir(exist_ok=True)
        if not self.ram.exists():
            self.ram.touch(mode=0o600)
            os.truncate(self.ram, MEMORY_MIB * MIB)
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(self.command(), env=environment(), stderr=log)
        wait_until(lambda: self._answers() or self.process.poll() is not None, what="the QMP socket")
        assert self.process.poll() is None, (self.directory / "log").read_text()
        self.qmp = self._clients[0]
        self.qmp("qmp_capabilities")
        return self

    def command(self) -> list[str]:
        """The documented command line."""
        program, *parameters = self.guest
        return [
            *(
                sys.executable,
                "-m",
                "vmferry.machines.microvm",
                "--name",
                "bird",
                "--uuid",
                UUID,
                "--mac",
                MAC,
            ),
            *("--memory-mib", str(MEMORY_MIB), "--ram-file", str(self.ram), "--program", program),
            *("--qmp", str(self.directory / "qmp"), "--serial-file", str(self.directory / "serial")),
            *(part for parameter in parameters for part in ("--param", parameter)),
            *self.options,
        ]

    def connect(self) -> Qmp:
        """One more client."""
        self._clients.append(Qmp(self.directory / "qmp"))
        return self._clients[-1]

    def serial(self) -> str:
        """What the guest has printed so far."""
        path = self.directory / "serial"
        return path.read_text() if path.exists() else ""

    def status(self) -> str:
        """The word of query-status."""
        return str(self.qmp("query-status")["status"])

    def wait_for_serial(self, text: str) -> None:
        """Wait until the guest has printed ``text``."""
        wait_until(lambda: text in self.serial(), seconds=60, what=f"{text!r} on the serial port")

    def writer_lines(self) -> list[dict[str, int]]:
        """The numbers in the writer guest's regular lines."""
        complete = [line for line in self.serial().split("\n")[:-1] if line.startswith("writer written=")]
        return [{k: int(v) for k, v in (part.split("=") for part in line.split()[1:])} for line in complete]

    def tick_beyond(self, tick: int) -> CanaryLine:
        """Wait for a sign of life later than ``tick``."""
        wait_until(
            lambda: (found := latest(self.serial())) and found.tick > tick, seconds=60, what=f"tick {tick}"
        )
        found = latest(self.serial())
        assert found is not None
        return found

    def save(self) -> bytes:
        """Let the device state leave; the bytes that came."""
        self.qmp("migrate-set-capabilities", capabilities=[{"capability": "x-ignore-shared", "state": True}])
        path = self.directory / "state"
        came = bytearray()
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(str(path))
            listener.listen(1)
            self.qmp("migrate", uri=f"unix:{path}")
            link, _ = listener.accept()
            with link:
                while block := link.recv(65536):
                    came += block
        path.unlink()
        wait_until(
            lambda: self.qmp("query-migrate")["status"] == "completed", what="the end of the migration"
        )
        return bytes(came)

    def feed(self, stream: bytes) -> dict[str, Any]:
        """Offer a device state; what query-migrate says in the end."""
        path = self.directory / "state"
        self.qmp("migrate-incoming", uri=f"unix:{path}")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
            link.connect(str(path))
            # A machine that has seen enough may hang up before the end.
            with contextlib.suppress(BrokenPipeError):
                link.sendall(stream)
        wait_until(
            lambda: self.qmp("query-migrate")["status"] in {"completed", "failed"},
            what="the end of the migration",
        )
        answer: dict[str, Any] = self.qmp("query-migrate")
        return answer

    def _answers(self) -> bool:
        try:
            self.connect()
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        return True

    def close(self) -> None:
        """End the process, whatever state it is in."""
        for client in self._clients:
            client.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def environment() -> dict[str, str]:
    """The environment in which this checkout is imported."""
    return os.environ | {"PYTHONPATH": str(Path(vmferry.__file__).parents[1])}


class Vms:
    """Makes machines in a directory whose files are memory, as RAM files are."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.made: list[Vm] = []

    def __call__(
        self, name: str = "vm", *options: str, guest: tuple[str, ...] = CANARY, ram: bytes | None = None
    ) -> Vm:
        """Start a machine, on new memory or on ``ram``."""
        vm = Vm(self.directory / name, guest, options)
        self.made.append(vm)
        if ram is not None:
            vm.directory.mkdir()
            vm.ram.write_bytes(ram)
        return vm.start()


@contextlib.contextmanager
def machines() -> Iterator[Vms]:
    """Machines that end, with all their files, when the context does."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as path:
        vms = Vms(Path(path))
        try:
            yield vms
        finally:
            for vm in vms.made:
                if hasattr(vm, "process"):
                    vm.close()
