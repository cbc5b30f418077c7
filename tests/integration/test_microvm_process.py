"""The micro-VM as a process: real guest code, real QMP, real crossings, and a canary that must bite."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import vmferry
from tests.support import require, wait_until
from vmferry.machines.microvm import cpu
from vmferry.machines.microvm.devicestate import Section, parse, render
from vmferry.machines.microvm.nic import rarp_announcement
from vmferry.machines.microvm.verdict import CanaryLine, latest, lines, verdict
from vmferry.memory.regions import Region, find_mapping
from vmferry.memory.runs import PAGE_SIZE
from vmferry.memory.trackers import PagemapScanTracker

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
        return (self.directory / "serial").read_text()

    def status(self) -> str:
        """The word of query-status."""
        return str(self.qmp("query-status")["status"])

    def wait_for_serial(self, text: str) -> None:
        """Wait until the guest has printed ``text``."""
        wait_until(lambda: text in self.serial(), seconds=20, what=f"{text!r} on the serial port")

    def tick_beyond(self, tick: int) -> CanaryLine:
        """Wait for a sign of life later than ``tick``."""
        wait_until(
            lambda: (found := latest(self.serial())) and found.tick > tick, seconds=20, what=f"tick {tick}"
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


MakeVm = Callable[..., Vm]


def environment() -> dict[str, str]:
    """The environment in which this checkout is imported."""
    return os.environ | {"PYTHONPATH": str(Path(vmferry.__file__).parents[1])}


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory whose files are memory, as RAM files are."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as path:
        yield Path(path)


@pytest.fixture
def make_vm(directory: Path) -> Iterator[MakeVm]:
    """Starts machines, and ends them with the test."""
    made: list[Vm] = []

    def make(
        name: str = "vm", *options: str, guest: tuple[str, ...] = CANARY, ram: bytes | None = None
    ) -> Vm:
        vm = Vm(directory / name, guest, options)
        made.append(vm)
        if ram is not None:
            vm.directory.mkdir()
            vm.ram.write_bytes(ram)
        return vm.start()

    yield make
    for vm in made:
        if hasattr(vm, "process"):
            vm.close()


def test_the_canary_lives(make_vm: MakeVm) -> None:
    """It boots, ticks, checks all of its pages on demand and finds nothing wrong."""
    vm = make_vm()
    vm.wait_for_serial(f"canary ready pages={CHAIN_PAGES} working=256\n")
    vm.tick_beyond(2 * CHAIN_PAGES)
    vm.qmp("ringbuf-write", device="serial0", data="v")
    vm.wait_for_serial("canary verify pages=256 working=256 bad=0\n")
    assert verdict(vm.serial()).ok


def test_a_stopped_guest_changes_nothing(make_vm: MakeVm) -> None:
    """After stop has answered, neither memory nor serial output moves; after cont they do."""
    vm = make_vm()
    vm.tick_beyond(10)
    vm.qmp("stop")
    before = (vm.ram.read_bytes(), vm.serial())
    times = vm.qmp("x-query-vcpu-times")
    wait_until(
        lambda: time.monotonic_ns() > times["last-stop-monotonic-ns"] + 100_000_000,
        what="a tenth of a second",
    )
    assert (vm.ram.read_bytes(), vm.serial()) == before
    assert vm.qmp("query-status") == {"running": False, "singlestep": False, "status": "paused"}
    vm.qmp("cont")
    seen = latest(before[1])
    assert seen is not None
    vm.tick_beyond(seen.tick)
    assert [event["event"] for event in vm.qmp.events] == ["STOP", "RESUME"]


def test_vcpu_times_tell_when_it_ran(make_vm: MakeVm) -> None:
    """Start and stop instants lie between the commands that caused them, on the host's monotonic clock."""
    vm = make_vm("vm", "-S")
    assert vm.qmp("x-query-vcpu-times")["last-start-monotonic-ns"] is None
    instants = [time.monotonic_ns()]
    for command in ("cont", "stop"):
        vm.qmp(command)
        instants.append(time.monotonic_ns())
    times = vm.qmp("x-query-vcpu-times")
    assert instants[0] < times["last-start-monotonic-ns"] < instants[1]
    assert instants[1] < times["last-stop-monotonic-ns"] < instants[2]
    assert times["boot-id"] == Path("/proc/sys/kernel/random/boot_id").read_text().strip()


@pytest.mark.parametrize("option", [("-S",), ("--incoming", "defer")], ids=["paused", "incoming"])
def test_no_guest_runs_before_cont(make_vm: MakeVm, option: tuple[str, ...]) -> None:
    """A machine that was told to wait has not touched its memory."""
    vm = make_vm("vm", *option)
    assert vm.status() in {"prelaunch", "inmigrate"}
    assert vm.ram.read_bytes() == bytes(MEMORY_MIB * MIB)
    assert vm.serial() == ""


def test_a_crossing_loses_nothing(make_vm: MakeVm) -> None:
    """On a copy of its memory and with its device state the canary goes on where it was, and all pages are right."""
    here = make_vm("here")
    here.tick_beyond(300)
    here.qmp("stop")
    stream = here.save()
    assert here.status() == "postmigrate"
    there = make_vm("there", "--incoming", "defer", "-S", ram=here.ram.read_bytes())
    with pytest.raises(QmpError, match="inmigrate"):
        there.qmp("cont")
    assert there.feed(stream) == {"status": "completed"}
    assert there.status() == "paused"
    there.qmp("ringbuf-write", device="serial0", data="v")
    there.qmp("cont")
    there.wait_for_serial("canary verify pages=256 working=256 bad=0\n")
    left, arrived = lines(here.serial())[-1], there.tick_beyond(0)
    first = lines(there.serial())[0]
    assert left.tick < first.tick <= arrived.tick
    assert first.checked == 4 * first.tick + CHAIN_PAGES * (first.checked > 4 * first.tick)
    assert verdict(here.serial() + there.serial()).ok


def test_a_machine_that_was_never_started_can_cross(make_vm: MakeVm) -> None:
    """It boots at the other end."""
    here = make_vm("here", "-S")
    there = make_vm("there", "--incoming", "defer")
    assert there.feed(here.save()) == {"status": "completed"}
    there.qmp("cont")
    there.tick_beyond(0)


def test_a_source_gives_the_machine_back_and_can_leave_again(make_vm: MakeVm) -> None:
    """postmigrate, cont, stop and migrate once more: nothing is lost on the way."""
    vm = make_vm()
    vm.tick_beyond(0)
    vm.qmp("stop")
    first = vm.save()
    vm.qmp("cont")
    vm.tick_beyond(lines(vm.serial())[-1].tick)
    vm.qmp("stop")
    second = vm.save()
    assert vm.status() == "postmigrate"
    assert registers_of(second)["RBX"] > registers_of(first)["RBX"]
    there = make_vm("there", "--incoming", "defer", ram=vm.ram.read_bytes())
    there.feed(second)
    there.qmp("ringbuf-write", device="serial0", data="v")
    there.qmp("cont")
    there.wait_for_serial("canary verify pages=256 working=256 bad=0\n")


def registers_of(stream: bytes) -> cpu.Registers:
    """The registers in a device state."""
    return next(cpu.unpack(section.payload) for section in parse(stream) if section.name == "cpu")


@dataclass
class Crossing:
    """What is on its way: memory as it was some sweeps ago, memory now, and the device state."""

    old: bytes
    ram: bytearray
    stream: bytes

    def address(self, ahead: int) -> int:
        """Address of the page so far ahead of the position of the sweep."""
        return CHAIN + (registers_of(self.stream)["R13"] + ahead) % CHAIN_PAGES * PAGE_SIZE

    def change_register(self, name: str, change: int) -> None:
        """Damage a register."""
        registers = registers_of(self.stream)
        registers[name] ^= change
        sections = [s for s in parse(self.stream) if s.name != "cpu"]
        self.stream = render([*sections, Section("cpu", 1, cpu.pack(registers))])


@pytest.fixture(scope="module")
def departed() -> Iterator[Crossing]:
    """A canary that has just left, some sweeps after a copy of its memory was taken."""
    with tempfile.TemporaryDirectory() as path:
        vm = Vm(Path(path) / "vm").start()
        try:
            vm.tick_beyond(2 * CHAIN_PAGES)
            vm.qmp("stop")
            old = vm.ram.read_bytes()
            vm.qmp("cont")
            vm.tick_beyond(lines(vm.serial())[-1].tick + 2 * CHAIN_PAGES)
            vm.qmp("stop")
            stream = vm.save()
            yield Crossing(old, bytearray(vm.ram.read_bytes()), stream)
        finally:
            vm.close()


@pytest.fixture
def crossing(departed: Crossing) -> Crossing:
    """A copy to damage."""
    return Crossing(departed.old, bytearray(departed.ram), departed.stream)


def stale_page(crossing: Crossing) -> None:
    """An older copy of a page arrives last."""
    at = crossing.address(9)
    crossing.ram[at : at + PAGE_SIZE] = crossing.old[at : at + PAGE_SIZE]


def torn_page(crossing: Crossing) -> None:
    """The second half of a page is older than the first."""
    at = crossing.address(9) + PAGE_SIZE // 2
    crossing.ram[at : at + PAGE_SIZE // 2] = crossing.old[at : at + PAGE_SIZE // 2]


def flipped_byte(crossing: Crossing) -> None:
    """One byte of a page is wrong."""
    crossing.ram[crossing.address(9) + 1234] ^= 0x40


def lost_page(crossing: Crossing) -> None:
    """A page never arrives."""
    at = crossing.address(9)
    crossing.ram[at : at + PAGE_SIZE] = bytes(PAGE_SIZE)


def misplaced_page(crossing: Crossing) -> None:
    """A page arrives at another's place."""
    at, other = crossing.address(9), crossing.address(30)
    crossing.ram[at : at + PAGE_SIZE] = crossing.ram[other : other + PAGE_SIZE]


def stale_working_page(crossing: Crossing) -> None:
    """A page of the working set, which has no checksum, is an older one."""
    at = WORKING + 7 * PAGE_SIZE
    assert crossing.ram[at : at + 8] != crossing.old[at : at + 8]
    crossing.ram[at : at + 8] = crossing.old[at : at + 8]


def lost_general_register(crossing: Crossing) -> None:
    """A general register is not what it was."""
    crossing.change_register("RBX", 1)


def lost_vector_register(crossing: Crossing) -> None:
    """A vector register is not what it was."""
    crossing.change_register("XMM15", 1)


@pytest.mark.parametrize(
    ("damage", "kind"),
    [
        (stale_page, "stale"),
        (torn_page, "torn"),
        (flipped_byte, "corrupt"),
        (lost_page, "lost"),
        (misplaced_page, "misplaced"),
        (stale_working_page, "working"),
        (lost_general_register, "register"),
        (lost_vector_register, "register"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_the_canary_bites(
    make_vm: MakeVm, crossing: Crossing, damage: Callable[[Crossing], None], kind: str
) -> None:
    """Each kind of damage in a crossing is named by the guest itself."""
    damage(crossing)
    vm = make_vm("vm", "--incoming", "defer", ram=bytes(crossing.ram))
    assert vm.feed(crossing.stream) == {"status": "completed"}
    vm.qmp("ringbuf-write", device="serial0", data="v")
    vm.qmp("cont")
    vm.wait_for_serial("canary verify")
    found = verdict(vm.serial())
    assert not found.ok
    assert kind in {problem.kind for problem in found.problems}
    vm.tick_beyond(0)


def test_an_undamaged_crossing_is_not_bitten(make_vm: MakeVm, crossing: Crossing) -> None:
    """The control of the test above: the same crossing without damage is fine."""
    vm = make_vm("vm", "--incoming", "defer", ram=bytes(crossing.ram))
    vm.feed(crossing.stream)
    vm.qmp("ringbuf-write", device="serial0", data="v")
    vm.qmp("cont")
    vm.wait_for_serial("canary verify pages=256 working=256 bad=0\n")
    vm.tick_beyond(0)
    assert verdict(vm.serial()).ok


def bad_streams(good: bytes) -> Iterator[tuple[str, bytes]]:
    """Streams that must be refused, by what the refusal says."""
    sections = parse(good)
    ends = [len(render(sections[:count])) - len(render([])) for count in range(len(sections))]
    for end in ends:
        yield "ends inside", good[: len(render([])) + end]
        yield "", good[:-1]
    for position in range(0, len(good), 97):
        yield "", good[:position] + bytes([good[position] ^ 1]) + good[position + 1 :]
    yield "unknown section 'usb'", render([*sections, Section("usb", 1, b"")])
    yield (
        "section 'cpu' has version 9",
        render([Section(s.name, 9, s.payload) if s.name == "cpu" else s for s in sections]),
    )
    yield "is missing", render(sections[1:])
    yield "instead of", render([Section(s.name, s.version, s.payload[:-1]) for s in sections])
    yield "magic", b"".join([b"QEVM", good[4:]])
    yield "", b""


def test_a_bad_stream_leaves_the_machine_waiting_for_a_good_one(make_vm: MakeVm, crossing: Crossing) -> None:
    """Whatever is wrong with it, nothing of it is applied, the reason is told, and the next one is taken."""
    vm = make_vm("vm", "--incoming", "defer", ram=bytes(crossing.ram))
    for words, stream in bad_streams(crossing.stream):
        answer = vm.feed(stream)
        assert answer["status"] == "failed"
        assert words in answer["error-desc"]
        assert vm.status() == "inmigrate"
    assert not (vm.directory / "state").exists()
    assert vm.feed(crossing.stream) == {"status": "completed"}
    vm.qmp("ringbuf-write", device="serial0", data="v")
    vm.qmp("cont")
    vm.wait_for_serial("canary verify pages=256 working=256 bad=0\n")


def test_a_listener_nobody_called_is_replaced(make_vm: MakeVm, crossing: Crossing) -> None:
    """A service that died between the command and the connection does not block the next one."""
    vm = make_vm("vm", "--incoming", "defer", ram=bytes(crossing.ram))
    vm.qmp("migrate-incoming", uri=f"unix:{vm.directory / 'forgotten'}")
    assert vm.feed(crossing.stream) == {"status": "completed"}
    assert not (vm.directory / "forgotten").exists()


def test_a_migration_nobody_takes_leaves_the_machine_as_it_was(make_vm: MakeVm) -> None:
    """Without a listener the migration fails, and the machine is still there to go on."""
    vm = make_vm()
    vm.qmp("stop")
    vm.qmp("migrate-set-capabilities", capabilities=[{"capability": "x-ignore-shared", "state": True}])
    vm.qmp("migrate", uri=f"unix:{vm.directory / 'nobody'}")
    wait_until(lambda: vm.qmp("query-migrate")["status"] == "failed", what="the failure")
    assert vm.status() == "paused"
    vm.qmp("cont")
    vm.tick_beyond(0)


def test_every_way_to_leave_wrongly_is_refused(make_vm: MakeVm) -> None:
    """Without x-ignore-shared, while running, to a strange address: an error, and the guest runs on."""
    vm = make_vm()
    with pytest.raises(QmpError, match="x-ignore-shared"):
        vm.qmp("migrate", uri="unix:/nowhere")
    with pytest.raises(QmpError, match="only capability"):
        vm.qmp("migrate-set-capabilities", capabilities=[{"capability": "postcopy-ram", "state": True}])
    vm.qmp("migrate-set-capabilities", capabilities=[{"capability": "x-ignore-shared", "state": True}])
    assert vm.qmp("query-migrate-capabilities") == [{"capability": "x-ignore-shared", "state": True}]
    for uri, words in (
        ("tcp:0:4444", "unix:"),
        ("unix:relative", "unix:"),
        ("unix:/nowhere", "paused machine"),
    ):
        with pytest.raises(QmpError, match=words):
            vm.qmp("migrate", uri=uri)
    with pytest.raises(QmpError, match="takes no device state"):
        vm.qmp("migrate-incoming", uri="unix:/nowhere")
    assert vm.status() == "running"


def test_the_machine_announces_itself_where_it_arrives(
    make_vm: MakeVm, crossing: Crossing, directory: Path
) -> None:
    """The first resume after a crossing sends the announcement, so does the command; the load alone does not."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as network:
        network.bind(str(directory / "network"))
        network.settimeout(10)
        option = ("--incoming", "defer", "--netdev", f"dgram:unix:{directory / 'network'}")
        vm = make_vm("vm", *option, ram=bytes(crossing.ram))
        vm.feed(crossing.stream)
        assert not select.select([network], [], [], 0)[0]
        vm.qmp("cont")
        expected = rarp_announcement(bytes.fromhex(MAC.replace(":", "")))
        assert [network.recv(100) for _ in range(5)] == [expected] * 5
        vm.qmp("announce-self", initial=1, max=2, rounds=2, step=1)
        assert [network.recv(100) for _ in range(2)] == [expected] * 2


def writer_lines(serial: str) -> list[dict[str, int]]:
    """The numbers in the writer's regular lines."""
    complete = [line for line in serial.split("\n")[:-1] if line.startswith("writer written=")]
    return [{k: int(v) for k, v in (f.split("=") for f in line.split()[1:])} for line in complete]


@pytest.mark.parametrize("full_pages", [0, 1])
def test_the_writer_keeps_its_rate_and_its_pages(make_vm: MakeVm, full_pages: int) -> None:
    """Pages written by guest time are within a fifth of what was asked for, and all of them are as written."""
    guest = ("writer", "dirty-mib-per-s=16", "working-set-mib=2", f"full-pages={full_pages}")
    vm = make_vm(guest=guest)
    wait_until(lambda: len(writer_lines(vm.serial())) > 5, seconds=20, what="six lines")
    first, *_, last = writer_lines(vm.serial())
    mib_per_s = (last["written"] - first["written"]) / 256 / (last["us"] - first["us"]) * 1e6
    assert 0.8 * 16 < mib_per_s < 1.2 * 16
    vm.qmp("ringbuf-write", device="serial0", data="v")
    vm.wait_for_serial("writer verify pages=512 bad=0\n")


def test_guest_time_goes_on_across_a_crossing_without_the_pause(make_vm: MakeVm) -> None:
    """Guest time after a crossing is later than before it, and later by less than the host's time between."""
    here = make_vm("here", guest=("writer",))
    wait_until(lambda: writer_lines(here.serial()), what="a line")
    here.qmp("stop")
    left = time.monotonic_ns()
    stream = here.save()
    there = make_vm("there", "--incoming", "defer", guest=("writer",), ram=here.ram.read_bytes())
    there.feed(stream)
    wait_until(lambda: time.monotonic_ns() > left + 300_000_000, what="a pause of 0.3 s")
    there.qmp("cont")
    wait_until(lambda: writer_lines(there.serial()), what="a line")
    before, after = writer_lines(here.serial())[-1]["us"], writer_lines(there.serial())[0]["us"]
    # Lines are 100 ms of guest time apart: the pause would make it 300 ms more.
    assert 0 < after - before < 300_000


def test_writes_by_guest_code_are_seen_from_outside(make_vm: MakeVm) -> None:
    """The kernel tells another process of pages the guest writes, and of none while it stands still."""
    vm = make_vm()
    vm.tick_beyond(0)
    vm.qmp("stop")
    region = Region(name="ram", path=vm.ram, size_bytes=MEMORY_MIB * MIB)
    tracker = PagemapScanTracker(find_mapping(vm.process.pid, region))
    require("not tracked" not in (vm.directory / "log").read_text(), "userfaultfd in asynchronous mode")
    tracker.arm()
    try:
        tracker.scan()
        assert not list(tracker.scan())
        before = vm.ram.read_bytes()
        vm.qmp("cont")
        vm.tick_beyond(lines(vm.serial())[-1].tick)
        vm.qmp("stop")
        seen = {page for first, count in tracker.scan() for page in range(first, first + count)}
    finally:
        tracker.disarm()
    after = vm.ram.read_bytes()
    pages = range(MEMORY_MIB * MIB // PAGE_SIZE)
    changed = {
        p for p in pages if before[p * PAGE_SIZE : (p + 1) * PAGE_SIZE] != after[p * PAGE_SIZE :][:PAGE_SIZE]
    }
    assert changed
    assert changed <= seen


# Writes one page as a device does and one by guest code, after a line on stdin; answers each.
DMA_SUBJECT = """
import sys
from pathlib import Path
from vmferry.machines.microvm.cpu import Cpu
from vmferry.machines.microvm.ram import Ram
ram = Ram(Path(sys.argv[1]), 4 << 20)
ram.track_writes()
cpu = Cpu(ram)
ram.write(0x10000, bytes.fromhex("48ff042500200000f4"))
print("ready", flush=True)
sys.stdin.readline()
cpu.write_memory(0x30000, b"frame")
cpu.uc.emu_start(0x10000, 1 << 63)
print("done", flush=True)
sys.stdin.readline()
"""


def test_writes_by_devices_are_seen_from_outside(directory: Path) -> None:
    """DMA and guest code go through the same mapping: both pages are reported, and no other."""
    ram = directory / "ram"
    ram.write_bytes(bytes(4 * MIB))
    command = [sys.executable, "-c", DMA_SUBJECT, str(ram)]
    with subprocess.Popen(
        command,
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as subject:
        assert subject.stdin
        assert subject.stdout
        try:
            assert subject.stdout.readline() == "ready\n"
            region = Region(name="ram", path=ram, size_bytes=4 * MIB)
            tracker = PagemapScanTracker(find_mapping(subject.pid, region))
            tracker.arm()
            tracker.scan()
            subject.stdin.write("\n")
            subject.stdin.flush()
            assert subject.stdout.readline() == "done\n"
            assert [tuple(run) for run in tracker.scan()] == [(0x2, 1), (0x30, 1)]
            tracker.disarm()
        finally:
            subject.kill()


def test_queries_answer_in_qemus_shapes(make_vm: MakeVm) -> None:
    """What a QMP client relies on: greeting, version, name, uuid, list of commands."""
    vm = make_vm("vm", "-S")
    version = {"qemu": {"major": 1, "minor": 0, "micro": 0}, "package": "vmferry-microvm"}
    assert vm.qmp.greeting == {"QMP": {"version": version, "capabilities": []}}
    assert vm.qmp("query-version") == version
    assert vm.qmp("query-name") == {"name": "bird"}
    assert vm.qmp("query-uuid") == {"UUID": UUID}
    assert {"name": "stop"} in vm.qmp("query-commands")
    assert vm.qmp("query-status") == {"running": False, "singlestep": False, "status": "prelaunch"}
    assert vm.qmp("query-migrate") == {}


@pytest.mark.parametrize(
    ("line", "error_class"),
    [
        (b"{", "GenericError"),
        (b"[" * 100_000, "GenericError"),
        (b"[]", "GenericError"),
        (b"\xff", "GenericError"),
        (b'{"execute": 5}', "GenericError"),
        (b'{"execute": "stop", "arguments": []}', "GenericError"),
        (b'{"execute": "stop", "arguments": {"now": true}}', "GenericError"),
        (b'{"execute": "migrate"}', "GenericError"),
        (b'{"execute": "migrate", "arguments": {"uri": 5}}', "GenericError"),
        (b'{"execute": "stop", "surprise": 1}', "GenericError"),
        (b'{"execute": "migrate-set-capabilities", "arguments": {"capabilities": [5]}}', "GenericError"),
        (b'{"execute": "ringbuf-write", "arguments": {"device": "serial9", "data": ""}}', "GenericError"),
        (b'{"execute": "system_powerdown"}', "CommandNotFound"),
    ],
)
def test_a_wrong_line_gets_an_error_and_harms_nobody(make_vm: MakeVm, line: bytes, error_class: str) -> None:
    """Each is answered with an error of QMP's class, and the next command works."""
    vm = make_vm("vm", "-S")
    assert vm.qmp.send(line)["error"]["class"] == error_class
    assert vm.status() == "prelaunch"


def test_clients_are_kept_apart(make_vm: MakeVm) -> None:
    """One that has not negotiated gets no events and no commands; one that floods is cut off; others go on."""
    vm = make_vm("vm", "-S")
    silent, flooding = vm.connect(), vm.connect()
    with pytest.raises(QmpError, match="CommandNotFound: Expecting capabilities negotiation"):
        silent("query-status")
    flood = threading.Thread(target=_send_too_much, args=(flooding,))
    flood.start()
    assert flooding.hung_up()
    flood.join()
    vm.qmp("cont")
    assert [event["event"] for event in vm.qmp.events] == ["RESUME"]
    assert set(vm.qmp.events[0]["timestamp"]) == {"seconds", "microseconds"}
    silent("qmp_capabilities")
    assert silent.events == []


def _send_too_much(client: Qmp) -> None:
    with contextlib.suppress(OSError):
        client._socket.sendall(b" " * (11 << 20))


def test_a_guest_that_halts_or_faults_is_told_and_the_process_stays(
    make_vm: MakeVm, crossing: Crossing
) -> None:
    """A guest that cannot fit halts; one with a wild stack faults; neither can be continued."""
    halted = make_vm("halted", guest=("canary", "resident-mib=64"))
    halted.wait_for_serial("canary error")
    wait_until(lambda: halted.status() == "shutdown", what="the shutdown")
    assert [event["event"] for event in halted.qmp.events[-2:]] == ["SHUTDOWN", "STOP"]
    crossing.change_register("RSP", 1 << 60)
    faulted = make_vm("faulted", "--incoming", "defer", ram=bytes(crossing.ram))
    faulted.feed(crossing.stream)
    faulted.qmp("cont")
    wait_until(lambda: faulted.status() == "internal-error", what="the fault")
    for vm in (halted, faulted):
        with pytest.raises(QmpError, match="cannot go on"):
            vm.qmp("cont")


@pytest.mark.parametrize("state", ["running", "prelaunch", "inmigrate"])
@pytest.mark.parametrize("way", [signal.SIGTERM, signal.SIGINT, "quit"])
def test_the_process_ends_cleanly(make_vm: MakeVm, state: str, way: signal.Signals | str) -> None:
    """Exit code 0, no socket left, and the RAM file still there, from any state."""
    vm = make_vm("vm", *{"running": (), "prelaunch": ("-S",), "inmigrate": ("--incoming", "defer")}[state])
    if isinstance(way, str):
        assert vm.qmp(way) == {}
    else:
        vm.process.send_signal(way)
    assert vm.process.wait(10) == 0
    assert {path.name for path in vm.directory.iterdir()} == {"ram", "serial", "log"}


def test_the_process_outlives_whoever_started_it(directory: Path) -> None:
    """A machine whose parent died runs on."""
    vm = Vm(directory / "vm")
    vm.directory.mkdir()
    vm.ram.touch()
    os.truncate(vm.ram, MEMORY_MIB * MIB)
    parent = (
        "import subprocess as s, sys;"
        "print(s.Popen(sys.argv[1:], start_new_session=True, stdout=s.DEVNULL, stderr=s.DEVNULL).pid)"
    )
    started = subprocess.run(
        [sys.executable, "-c", parent, *vm.command()], env=environment(), stdout=subprocess.PIPE, check=True,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    pid = int(started.stdout)
    try:
        vm.tick_beyond(0)
    finally:
        os.kill(pid, signal.SIGTERM)
        wait_until(
            lambda: not Path(f"/proc/{pid}").exists() or _is_zombie(pid), what="the end of the machine"
        )


def _is_zombie(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("--ram-file", "/nowhere/ram"), "cannot open the RAM file"),
        (("--memory-mib", "8"), "exactly 8388608"),
        (("--mac", "nonsense"), "MAC"),
        (("--netdev", "tap:0"), "netdev"),
        (("--param", "speed=1"), "no parameter 'speed'"),
        (("--param", "tick-us=1"), "given before"),
    ],
)
def test_a_wrong_command_line_is_explained(directory: Path, change: tuple[str, str], words: str) -> None:
    """Exit code 2 and one line that says what is wrong."""
    vm = Vm(directory / "vm", options=change)
    vm.directory.mkdir()
    vm.ram.touch()
    os.truncate(vm.ram, MEMORY_MIB * MIB)
    ended = subprocess.run(
        vm.command(), env=environment(), capture_output=True, text=True, check=False, timeout=20
    )
    assert ended.returncode == 2
    assert words in ended.stderr
    assert "Traceback" not in ended.stderr
