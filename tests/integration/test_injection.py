"""Operations inside another process leave it exactly as it was, whatever it is doing."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import vmferry
from tests.integration.ownmemory import heap, untouched_pages
from tests.support import require, wait_until
from vmferry.errors import MachineDeadError, TrackerUnavailableError
from vmferry.memory.digest import PageTable
from vmferry.memory.inject import inject_write_tracking
from vmferry.memory.ptrace import Tracee
from vmferry.memory.regions import RamFile, Region, find_mapping
from vmferry.memory.runs import PAGE_SIZE
from vmferry.memory.surgeon import open_userfault_in
from vmferry.memory.surgery import touch_own_memory
from vmferry.memory.trackers import SoftDirtyTracker

PACKAGES = str(Path(vmferry.__file__).parents[1])
SIZE = 64 * PAGE_SIZE
CYCLES = 200

# Each waits for a line in its own way and answers it. The first line it prints is the address of its memory.
COMMON = """
import ctypes, mmap, os, select, sys, threading, time
fd = int(sys.argv[1])
memory = mmap.mmap(fd, 64 * 4096)
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
libc = ctypes.CDLL(None, use_errno=True)
print(address, flush=True)
def read_line():
    return os.read(0, 100)
def answers(wait):
    while wait():
        print("pong", flush=True)
"""
WAITING = {
    "read": "answers(read_line)",
    "epoll": """
poll = select.epoll()
poll.register(0)
answers(lambda: poll.poll() and read_line())""",
    "nanosleep": """
os.set_blocking(0, False)
def nap():
    while True:
        time.sleep(0.01)
        try: return read_line()
        except BlockingIOError: pass
answers(nap)""",
    "futex": """
lock = threading.Lock()
lock.acquire()
def reader():
    while read_line():
        lock.release()
    os._exit(0)
threading.Thread(target=reader, daemon=True).start()
answers(lock.acquire)""",
    "busy": """
def spin():
    while not select.select([0], [], [], 0)[0]: pass
    return read_line()
answers(spin)""",
    "many threads": """
for _ in range(6):
    threading.Thread(target=lambda: [time.sleep(0.001) for _ in iter(int, 1)], daemon=True).start()
answers(read_line)""",
}
# Waits once in a given raw system call for 0.4 s and tells what came of it. No library between us and the kernel
# repeats an interrupted call, so an error or an early return shows.
TIMED = """
spec = (ctypes.c_long * 2)(0, 400_000_000)
value = (ctypes.c_long * 2)(0, 400_000)
word = ctypes.c_int(1)
calls = {
    "nanosleep": lambda: libc.nanosleep(spec, None),
    "clock_nanosleep": lambda: libc.clock_nanosleep(1, 0, spec, None),
    "poll": lambda: libc.poll(None, 0, 400),
    "ppoll": lambda: libc.ppoll(None, 0, spec, None),
    "select": lambda: libc.select(0, None, None, None, value),
    "futex": lambda: libc.syscall(202, ctypes.byref(word), 0, 1, spec),
}
print("waiting", flush=True)
start = time.monotonic()
result = calls[sys.argv[2]]()
print(result, ctypes.get_errno(), time.monotonic() - start, flush=True)
"""
EXPECTED = {"futex": ("-1", "110")}  # its way to say that the time is over

KILL_ON_USERFAULTFD = """
import struct
rules = [(0x20, 0, 0, 0), (0x15, 0, 1, 323), (0x06, 0, 0, 0x80000000), (0x06, 0, 0, 0x7FFF0000)]
program = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *rule) for rule in rules))
header = ctypes.create_string_buffer(struct.pack("=HxxxxxxQ", len(rules), ctypes.addressof(program)))
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, header) == 0
"""


# Has a piece of firmware's size and a larger one, in a range that nobody may use otherwise, and room in its heap.
HOLDS_MEMORY = """
libc.mmap.restype = ctypes.c_void_p
libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
whole = libc.mmap(None, ctypes.c_size_t(400 * 4096), 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, ctypes.c_long(0))
small, large = whole + 4096, whole + 150 * 4096
for address, pages in (small, 100), (large, 200):
    assert not libc.mprotect(address, pages * 4096, mmap.PROT_READ | mmap.PROT_WRITE)
    ctypes.memmove(address, b"held", 4)
libc.mallopt(-2, 1 << 20)
libc.malloc(100_000)
print(small, large, flush=True)
def still_held():
    line = read_line()
    assert ctypes.string_at(small, 100 * 4096) == b"held" + bytes(100 * 4096 - 4)
    return line
answers(still_held)
"""

HARMLESS_FILTER = KILL_ON_USERFAULTFD.replace("0x80000000", "0x7FFF0000")

UNPRIVILEGED = """
import sys
from vmferry.memory.surgeon import open_userfault_in
from vmferry.errors import TrackerUnavailableError
try: open_userfault_in(int(sys.argv[1]))
except TrackerUnavailableError as exc: print("refused:", exc)
else: print("taken")
"""


STRANGER = """
import os, sys
from vmferry.memory.surgeon import open_userfault_in
from vmferry.errors import TrackerUnavailableError
os.setgroups([]); os.setgid(65534); os.setuid(65534)
try: open_userfault_in(int(sys.argv[1]))
except TrackerUnavailableError as exc: print(exc)
"""


class Target:
    """A process to operate on."""

    def __init__(self, script: str, *arguments: str) -> None:
        self.ram_fd = os.memfd_create("test-injection")
        os.ftruncate(self.ram_fd, SIZE)
        self.process = subprocess.Popen(
            [sys.executable, "-c", COMMON + script, str(self.ram_fd), *arguments],
            pass_fds=[self.ram_fd],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": PACKAGES},
            start_new_session=True,
        )
        self.pid = self.process.pid
        self.address = int(self.line())

    def line(self) -> str:
        """The next line the target says."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def ping(self) -> str:
        """Wake the target and have it answer."""
        assert self.process.stdin is not None
        self.process.stdin.write("ping\n")
        self.process.stdin.flush()
        return self.line()

    def descriptors(self) -> list[str]:
        """What the target has open."""
        return sorted(str(entry.readlink()) for entry in Path(f"/proc/{self.pid}/fd").iterdir())

    def status(self, key: str) -> str:
        """One line of the kernel's description of the target."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return next(line for line in lines if line.startswith(f"{key}:")).split()[1]

    def mappings(self) -> str:
        """The target's address space."""
        return Path(f"/proc/{self.pid}/maps").read_text()

    def end(self) -> None:
        """Kill the target and collect it."""
        with self.process:
            self.process.kill()
        os.close(self.ram_fd)


@pytest.fixture
def start() -> Iterator[Callable[..., Target]]:
    """Starts targets, and ends them."""
    started: list[Target] = []

    def make(script: str, *arguments: str) -> Target:
        started.append(Target(script, *arguments))
        return started[-1]

    yield make
    for target in reversed(started):  # a tracer before what it traces, which cannot be collected earlier
        target.end()


def operate_once(pid: int) -> None:
    """The operation itself, without the process around it."""
    os.close(open_userfault_in(pid))


def operate_until_refused(pid: int) -> None:
    """Again and again; ends only by an error."""
    while True:
        operate_once(pid)


@pytest.mark.parametrize("waiting", WAITING)
def test_a_target_that_waits_in_any_way_goes_on_as_before(waiting: str, start: Callable[..., Target]) -> None:
    """After many operations it answers, has the same descriptors and the same address space."""
    target = start(WAITING[waiting])
    assert target.ping() == "pong"
    before = target.descriptors()
    for _ in range(CYCLES):
        operate_once(target.pid)
    assert target.descriptors() == before
    assert target.status("TracerPid") == "0"
    assert target.ping() == "pong"


@pytest.mark.parametrize("call", ["nanosleep", "clock_nanosleep", "poll", "ppoll", "select", "futex"])
def test_an_interrupted_wait_ends_on_time_and_without_an_error(
    call: str, start: Callable[..., Target]
) -> None:
    """The kernel restarts the system call with the time that is left, and shows no trace of the interruption."""
    target = start(TIMED, call)
    assert target.line() == "waiting"
    wait_until(lambda: target.status("State") == "S", what="the wait")
    for _ in range(20):
        operate_once(target.pid)
    result, error, seconds = target.line().split()
    expected_result, expected_error = EXPECTED.get(call, ("0", "0"))
    assert result == expected_result
    assert expected_error in ("0", error)
    assert 0.4 <= float(seconds) < 2.0


def test_tracking_begins_and_ends_with_the_descriptor_held_here(start: Callable[..., Target]) -> None:
    """An injection leaves no descriptor in the target, and closing ours ends the tracking; removal is idempotent."""
    target = start(WAITING["read"])
    before = target.descriptors(), target.mappings()
    for _ in range(3):
        injection = inject_write_tracking(target.pid, target.address, SIZE)
        assert (target.descriptors(), target.mappings()) == before
        injection.remove()
        injection.remove()
    assert target.ping() == "pong"


def test_a_stopped_target_stays_stopped(start: Callable[..., Target]) -> None:
    """A target that somebody stopped is operated on all the same, and is still stopped afterwards."""
    target = start(WAITING["read"])
    assert target.ping() == "pong"
    os.kill(target.pid, signal.SIGSTOP)
    wait_until(lambda: target.status("State") == "T", what="the stop")
    operate_once(target.pid)
    wait_until(lambda: target.status("State") == "T", what="the stop after the operation")
    os.kill(target.pid, signal.SIGCONT)
    assert target.ping() == "pong"


def test_signals_that_come_meanwhile_are_delivered(start: Callable[..., Target]) -> None:
    """Each signal reaches its handler although the target was being operated on all the time."""
    target = start(
        "import signal; seen = [0]\n"
        "def handler(*_): seen[0] += 1; os.write(1, b'signal\\n')\n"
        "signal.signal(signal.SIGUSR1, handler)\nprint('set', flush=True)\n" + WAITING["read"]
    )
    assert target.line() == "set"
    for _ in range(50):
        sender = threading.Thread(target=os.kill, args=(target.pid, signal.SIGUSR1))
        sender.start()
        operate_once(target.pid)
        sender.join()
        assert target.line() == "signal"
    assert target.ping() == "pong"


def test_a_signal_that_was_first_is_delivered_before_the_stop(start: Callable[..., Target]) -> None:
    """A thread that already stopped to receive a signal receives it."""
    target = start(
        "import signal\nsignal.signal(signal.SIGUSR1, lambda *_: os.write(1, b'signal\\n'))\n"
        "print('set', flush=True)\n" + WAITING["read"]
    )
    assert target.line() == "set"
    tracee = Tracee(target.pid, target.pid)
    os.kill(target.pid, signal.SIGUSR1)
    wait_until(lambda: target.status("State") == "t", what="the stop for the signal")
    tracee.stop()
    tracee.detach()
    assert target.line() == "signal"
    assert target.ping() == "pong"


def test_memory_that_another_userfaultfd_holds_is_refused_and_nothing_stays(
    start: Callable[..., Target],
) -> None:
    """EBUSY is named, and the target has no further descriptor."""
    target = start(
        "from vmferry.memory.userfault import track_own_range\n"
        "own = track_own_range(address, len(memory))\nprint('registered', flush=True)\n" + WAITING["read"]
    )
    assert target.line() == "registered"
    before = target.descriptors()
    with pytest.raises(TrackerUnavailableError, match="EBUSY: another userfaultfd"):
        inject_write_tracking(target.pid, target.address, SIZE)
    assert target.descriptors() == before
    assert target.ping() == "pong"


def test_own_memory_is_taken_and_holds_what_it_held(start: Callable[..., Target]) -> None:
    """Heap and small pieces have all their pages, larger pieces and shared memory have none more than before."""
    target = start(HOLDS_MEMORY)
    small, large = map(int, target.line().split())
    shared = untouched_pages(target.pid, target.address, SIZE)
    assert untouched_pages(target.pid, small, 100 * PAGE_SIZE) == 99
    assert untouched_pages(target.pid, *heap(target.pid)) > 200
    before = target.descriptors(), target.mappings()
    touch_own_memory(target.pid)
    assert (target.descriptors(), target.mappings()) == before
    assert untouched_pages(target.pid, small, 100 * PAGE_SIZE) == 0
    assert untouched_pages(target.pid, *heap(target.pid)) == 0
    assert untouched_pages(target.pid, large, 200 * PAGE_SIZE) == 199
    assert untouched_pages(target.pid, target.address, SIZE) == shared
    assert target.ping() == "pong"
    touch_own_memory(target.pid)
    assert target.ping() == "pong"


def test_own_memory_of_a_dead_process_cannot_be_taken(start: Callable[..., Target]) -> None:
    """It is said to be dead, as with every operation."""
    target = start(WAITING["read"])
    with target.process:
        target.process.kill()
    with pytest.raises(MachineDeadError):
        touch_own_memory(target.pid)


def test_a_target_that_is_traced_already_is_refused(start: Callable[..., Target]) -> None:
    """The message names the tracer, and the target is not disturbed."""
    target = start(WAITING["read"])
    tracer = start(
        f"from vmferry.memory.ptrace import Tracee\ntracee = Tracee({target.pid}, {target.pid})\n"
        "print('tracing', flush=True)\n" + WAITING["read"]
    )
    assert tracer.line() == "tracing"
    with pytest.raises(TrackerUnavailableError, match=f"already traced by process {tracer.pid}"):
        inject_write_tracking(target.pid, target.address, SIZE)
    with pytest.raises(TrackerUnavailableError, match=f"already traced by process {tracer.pid}"):
        touch_own_memory(target.pid)
    assert target.ping() == "pong"


def test_a_target_we_may_not_touch_is_refused_clearly(start: Callable[..., Target]) -> None:
    """Without the right to trace, the error names ptrace and EPERM."""
    require(os.geteuid() == 0, "only root can become another user")
    target = start(WAITING["read"])
    stranger = subprocess.run(
        [sys.executable, "-c", STRANGER, str(target.pid)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": PACKAGES},
    )
    assert "by ptrace failed with EPERM" in stranger.stdout
    assert target.ping() == "pong"


def test_a_filter_that_kills_on_the_call_does_not_kill_the_machine(start: Callable[..., Target]) -> None:
    """The system call filter is suspended, or the operation refused; the target survives either way."""
    target = start(KILL_ON_USERFAULTFD + WAITING["read"])
    assert target.ping() == "pong"
    assert target.status("Seccomp") == "2"
    try:
        operate_once(target.pid)
    except TrackerUnavailableError as exc:
        assert "seccomp" in exc.message  # noqa: PT017 (either outcome is right)
    assert target.status("Seccomp") == "2"
    assert target.ping() == "pong"


@pytest.mark.parametrize(
    ("filters", "arguments", "said"),
    [
        (HARMLESS_FILTER, ("-sandbox", "on"), "taken"),
        (HARMLESS_FILTER, (), "refused"),
        (KILL_ON_USERFAULTFD, (), "refused"),
        (HARMLESS_FILTER + KILL_ON_USERFAULTFD, ("-sandbox", "on"), "refused"),
    ],
)
def test_without_the_privilege_only_known_filters_stay_in_force(
    start: Callable[..., Target], filters: str, arguments: tuple[str, ...], said: str
) -> None:
    """Who may not suspend filters takes QEMU's own sandbox for harmless and no other; a try kills no machine."""
    require(os.geteuid() == 0 and shutil.which("setpriv"), "root and setpriv, to lose a capability")
    target = start(filters + WAITING["read"], *arguments)
    assert target.ping() == "pong"
    tried = subprocess.run(
        ["setpriv", "--bounding-set", "-sys_admin", sys.executable, "-c", UNPRIVILEGED, str(target.pid)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": PACKAGES},
    )
    assert said in tried.stdout
    assert target.ping() == "pong"


def test_a_target_that_ends_meanwhile_is_reported_as_dead(start: Callable[..., Target]) -> None:
    """Killed at a random moment, the target is operated on or dead; there is no third answer."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    rng = random.Random(seed)
    for _ in range(10):
        target = start(WAITING["many threads"])
        # Not Popen.kill: it looks for the end of its child first, and would take a stop for it.
        killer = threading.Timer(rng.uniform(0, 0.01), os.kill, (target.pid, signal.SIGKILL))
        killer.start()
        with pytest.raises(MachineDeadError):
            operate_until_refused(target.pid)
        killer.join()
        target.process.wait()
    with pytest.raises(MachineDeadError):
        inject_write_tracking(target.pid, target.address, SIZE)


def test_somebody_who_waits_for_the_target_is_not_misled(start: Callable[..., Target]) -> None:
    """A thread that waits for its child to end does not take an operation for the end."""
    target = start(WAITING["read"])
    waiter = threading.Thread(target=target.process.wait)
    waiter.start()
    for _ in range(5):
        inject_write_tracking(target.pid, target.address, SIZE).remove()
    assert waiter.is_alive()
    assert target.ping() == "pong"
    assert target.process.stdin is not None
    target.process.stdin.close()
    waiter.join(10)
    assert target.process.returncode == 0


def test_a_service_that_is_killed_meanwhile_leaves_the_target_unharmed(start: Callable[..., Target]) -> None:
    """Whenever the caller's process group is killed, the target is let go, answers, and keeps no descriptor."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    rng = random.Random(seed)
    target = start(WAITING["busy"])
    before = target.descriptors()
    for _ in range(10):
        service = start(
            "from vmferry.memory.inject import inject_write_tracking\n"
            "print('begin', flush=True)\n"
            f"while True: inject_write_tracking({target.pid}, {target.address}, {SIZE}).remove()"
        )
        assert service.line() == "begin"
        time.sleep(rng.uniform(0, 0.12))  # the moment of the kill is the random input, nothing is awaited
        os.killpg(service.pid, signal.SIGKILL)
        service.process.wait()
        wait_until(lambda: target.status("TracerPid") == "0", what="letting go")
        assert target.ping() == "pong"
    wait_until(lambda: target.descriptors() == before, what="closing")


def test_reading_soft_dirty_bits_lets_all_threads_go_on(start: Callable[..., Target]) -> None:
    """Freezing stops every thread and releases it; of unmapped pages the content decides."""
    target = start(WAITING["many threads"])
    path = Path(f"/proc/{os.getpid()}/fd/{target.ram_fd}")
    with RamFile(os.dup(target.ram_fd), path, SIZE) as ram:
        mapped = find_mapping(target.pid, Region("ram0", path, SIZE))
        tracker = SoftDirtyTracker(mapped, ram, PageTable(ram.page_count))
        tracker.arm()
        assert not tracker.scan()
        ram.write_pages([(7, 2)], memoryview(b"x" * 2 * PAGE_SIZE))
        assert list(tracker.scan()) == [(7, 2)]
        assert tracker.count() == 2
        tracker.disarm()
    for thread in Path(f"/proc/{target.pid}/task").iterdir():
        assert "TracerPid:\t0\n" in (thread / "status").read_text()
    assert target.ping() == "pong"
