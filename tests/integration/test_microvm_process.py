"""The micro-VM as a process: real guest code, real QMP, a life cycle without surprises."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.microvm import CHAIN_PAGES, MEMORY_MIB, MIB, UUID, Qmp, QmpError, Vm, Vms, environment, machines
from tests.support import require, wait_until
from vmferry.machines.microvm.verdict import latest, lines, verdict
from vmferry.memory.regions import Region, find_mapping
from vmferry.memory.runs import PAGE_SIZE
from vmferry.memory.trackers import PagemapScanTracker


@pytest.fixture
def make_vm() -> Iterator[Vms]:
    """Starts machines, and ends them with the test."""
    with machines() as vms:
        yield vms


def test_the_canary_lives(make_vm: Vms) -> None:
    """It boots, ticks, checks all of its pages on demand and finds nothing wrong."""
    vm = make_vm()
    vm.wait_for_serial(f"canary ready pages={CHAIN_PAGES} working=256\n")
    vm.tick_beyond(2 * CHAIN_PAGES)
    vm.qmp("ringbuf-write", device="serial0", data="v")
    vm.wait_for_serial("canary verify pages=256 working=256 bad=0\n")
    assert verdict(vm.serial()).ok


def test_a_stopped_guest_changes_nothing(make_vm: Vms) -> None:
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


def test_vcpu_times_tell_when_it_ran(make_vm: Vms) -> None:
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
def test_no_guest_runs_before_cont(make_vm: Vms, option: tuple[str, ...]) -> None:
    """A machine that was told to wait has not touched its memory."""
    vm = make_vm("vm", *option)
    assert vm.status() in {"prelaunch", "inmigrate"}
    assert vm.ram.read_bytes() == bytes(MEMORY_MIB * MIB)
    assert vm.serial() == ""


@pytest.mark.parametrize("full_pages", [0, 1])
def test_the_writer_keeps_its_rate_and_its_pages(make_vm: Vms, full_pages: int) -> None:
    """Pages written by guest time are within a fifth of what was asked for, and all of them are as written."""
    guest = ("writer", "dirty-mib-per-s=16", "working-set-mib=2", f"full-pages={full_pages}")
    vm = make_vm(guest=guest)
    wait_until(lambda: len(vm.writer_lines()) > 5, seconds=60, what="six lines")
    first, *_, last = vm.writer_lines()
    mib_per_s = (last["written"] - first["written"]) / 256 / (last["us"] - first["us"]) * 1e6
    assert 0.8 * 16 < mib_per_s < 1.2 * 16
    vm.qmp("ringbuf-write", device="serial0", data="v")
    vm.wait_for_serial("writer verify pages=512 bad=0\n")


def test_writes_by_guest_code_are_seen_from_outside(make_vm: Vms) -> None:
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


def test_writes_by_devices_are_seen_from_outside(make_vm: Vms) -> None:
    """DMA and guest code go through the same mapping: both pages are reported, and no other."""
    ram = make_vm.directory / "ram"
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


def test_queries_answer_in_qemus_shapes(make_vm: Vms) -> None:
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
def test_a_wrong_line_gets_an_error_and_harms_nobody(make_vm: Vms, line: bytes, error_class: str) -> None:
    """Each is answered with an error of QMP's class, and the next command works."""
    vm = make_vm("vm", "-S")
    assert vm.qmp.send(line)["error"]["class"] == error_class
    assert vm.status() == "prelaunch"


def test_clients_are_kept_apart(make_vm: Vms) -> None:
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


def test_a_guest_that_halts_is_told_and_the_process_stays(make_vm: Vms) -> None:
    """A guest that cannot fit into its memory shuts down, and cannot go on."""
    vm = make_vm("vm", "-S", guest=("canary", "resident-mib=64"))
    vm.qmp("cont")
    vm.wait_for_serial("canary error")
    wait_until(lambda: vm.status() == "shutdown", what="the shutdown")
    assert [event["event"] for event in vm.qmp.events] == ["RESUME", "SHUTDOWN", "STOP"]
    with pytest.raises(QmpError, match="cannot go on"):
        vm.qmp("cont")


@pytest.mark.parametrize("state", ["running", "prelaunch", "inmigrate"])
@pytest.mark.parametrize("way", [signal.SIGTERM, signal.SIGINT, "quit"])
def test_the_process_ends_cleanly(make_vm: Vms, state: str, way: signal.Signals | str) -> None:
    """Exit code 0, no socket left, and the RAM file still there, from any state."""
    vm = make_vm("vm", *{"running": (), "prelaunch": ("-S",), "inmigrate": ("--incoming", "defer")}[state])
    if isinstance(way, str):
        assert vm.qmp(way) == {}
    else:
        vm.process.send_signal(way)
    assert vm.process.wait(10) == 0
    assert {path.name for path in vm.directory.iterdir()} == {"ram", "serial", "log"}


def test_the_process_outlives_whoever_started_it(make_vm: Vms) -> None:
    """A machine whose parent died runs on."""
    vm = Vm(make_vm.directory / "vm")
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
def test_a_wrong_command_line_is_explained(make_vm: Vms, change: tuple[str, str], words: str) -> None:
    """Exit code 2 and one line that says what is wrong."""
    vm = Vm(make_vm.directory / "vm", options=change)
    vm.directory.mkdir()
    vm.ram.touch()
    os.truncate(vm.ram, MEMORY_MIB * MIB)
    ended = subprocess.run(
        vm.command(), env=environment(), capture_output=True, text=True, check=False, timeout=20
    )
    assert ended.returncode == 2
    assert words in ended.stderr
    assert "Traceback" not in ended.stderr
