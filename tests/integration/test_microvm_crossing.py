"""The micro-VM crossing from one process to another, and a canary that must bite when anything is lost."""

from __future__ import annotations

import select
import socket
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from tests.microvm import CHAIN, CHAIN_PAGES, MAC, WORKING, QmpError, Vm, Vms, machines
from tests.support import wait_until
from vmferry.machines.microvm import cpu
from vmferry.machines.microvm.devicestate import Section, parse, render
from vmferry.machines.microvm.nic import rarp_announcement
from vmferry.machines.microvm.verdict import lines, verdict
from vmferry.memory.runs import PAGE_SIZE


@pytest.fixture
def make_vm() -> Iterator[Vms]:
    """Starts machines, and ends them with the test."""
    with machines() as vms:
        yield vms


def test_a_crossing_loses_nothing(make_vm: Vms) -> None:
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


def test_a_machine_that_was_never_started_can_cross(make_vm: Vms) -> None:
    """It boots at the other end."""
    here = make_vm("here", "-S")
    there = make_vm("there", "--incoming", "defer")
    assert there.feed(here.save()) == {"status": "completed"}
    there.qmp("cont")
    there.tick_beyond(0)


def test_a_source_gives_the_machine_back_and_can_leave_again(make_vm: Vms) -> None:
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


def save_between_ticks(vm: Vm) -> bytes:
    """Let the device state leave while the canary sleeps: in a tick it has registers that are compared already."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        vm.qmp("stop")
        stream = vm.save()
        sections = {section.name: section.payload for section in parse(stream)}
        (wake_at_ns,) = struct.unpack_from("<Q", sections["power"])
        (guest_ns,) = struct.unpack_from("<Q", sections["clock"])
        if wake_at_ns > guest_ns:
            return stream
        vm.qmp("cont")
    pytest.fail("the canary was never found asleep")


@pytest.fixture(scope="module")
def departed() -> Iterator[Crossing]:
    """A canary that has just left, some sweeps after a copy of its memory was taken."""
    with machines() as vms:
        vm = vms()
        vm.tick_beyond(2 * CHAIN_PAGES)
        vm.qmp("stop")
        old = vm.ram.read_bytes()
        vm.qmp("cont")
        vm.tick_beyond(lines(vm.serial())[-1].tick + 2 * CHAIN_PAGES)
        stream = save_between_ticks(vm)
        yield Crossing(old, bytearray(vm.ram.read_bytes()), stream)


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
    make_vm: Vms, crossing: Crossing, damage: Callable[[Crossing], None], kind: str
) -> None:
    """Each kind of damage in a crossing is named by the guest itself."""
    damage(crossing)
    vm = make_vm("vm", "--incoming", "defer", ram=bytes(crossing.ram))
    assert vm.feed(crossing.stream) == {"status": "completed"}
    vm.qmp("ringbuf-write", device="serial0", data="v")
    vm.qmp("cont")
    # Registers are compared once a tick, which may come after the pages were verified.
    wait_until(
        lambda: kind in {problem.kind for problem in verdict(vm.serial()).problems}, what=f"a {kind} problem"
    )
    vm.wait_for_serial("canary verify")
    assert not verdict(vm.serial()).ok
    vm.tick_beyond(0)


def test_an_undamaged_crossing_is_not_bitten(make_vm: Vms, crossing: Crossing) -> None:
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


def test_a_bad_stream_leaves_the_machine_waiting_for_a_good_one(make_vm: Vms, crossing: Crossing) -> None:
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


def test_a_listener_nobody_called_is_replaced(make_vm: Vms, crossing: Crossing) -> None:
    """A service that died between the command and the connection does not block the next one."""
    vm = make_vm("vm", "--incoming", "defer", ram=bytes(crossing.ram))
    vm.qmp("migrate-incoming", uri=f"unix:{vm.directory / 'forgotten'}")
    assert vm.feed(crossing.stream) == {"status": "completed"}
    assert not (vm.directory / "forgotten").exists()


def test_a_migration_nobody_takes_leaves_the_machine_as_it_was(make_vm: Vms) -> None:
    """Without a listener the migration fails, and the machine is still there to go on."""
    vm = make_vm()
    vm.qmp("stop")
    vm.qmp("migrate-set-capabilities", capabilities=[{"capability": "x-ignore-shared", "state": True}])
    vm.qmp("migrate", uri=f"unix:{vm.directory / 'nobody'}")
    wait_until(lambda: vm.qmp("query-migrate")["status"] == "failed", what="the failure")
    assert vm.status() == "paused"
    vm.qmp("cont")
    vm.tick_beyond(0)


def test_every_way_to_leave_wrongly_is_refused(make_vm: Vms) -> None:
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


def test_the_machine_announces_itself_where_it_arrives(make_vm: Vms, crossing: Crossing) -> None:
    """The first resume after a crossing sends the announcement, so does the command; the load alone does not."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as network:
        network.bind(str(make_vm.directory / "network"))
        network.settimeout(10)
        option = ("--incoming", "defer", "--netdev", f"dgram:unix:{make_vm.directory / 'network'}")
        vm = make_vm("vm", *option, ram=bytes(crossing.ram))
        vm.feed(crossing.stream)
        assert not select.select([network], [], [], 0)[0]
        vm.qmp("cont")
        expected = rarp_announcement(bytes.fromhex(MAC.replace(":", "")))
        assert [network.recv(100) for _ in range(5)] == [expected] * 5
        vm.qmp("announce-self", initial=1, max=2, rounds=2, step=1)
        assert [network.recv(100) for _ in range(2)] == [expected] * 2


def test_guest_time_goes_on_across_a_crossing_without_the_pause(make_vm: Vms) -> None:
    """Guest time after a crossing is later than before it, and later by less than the host's time between."""
    here = make_vm("here", guest=("writer",))
    wait_until(here.writer_lines, what="a line")
    here.qmp("stop")
    left = time.monotonic_ns()
    stream = here.save()
    there = make_vm("there", "--incoming", "defer", guest=("writer",), ram=here.ram.read_bytes())
    there.feed(stream)
    wait_until(lambda: time.monotonic_ns() > left + 300_000_000, what="a pause of 0.3 s")
    there.qmp("cont")
    wait_until(there.writer_lines, what="a line")
    before, after = here.writer_lines()[-1]["us"], there.writer_lines()[0]["us"]
    # Lines are 100 ms of guest time apart: the pause would make it 300 ms more.
    assert 0 < after - before < 300_000


def test_a_guest_that_faults_is_told_and_the_process_stays(make_vm: Vms, crossing: Crossing) -> None:
    """A guest whose stack is nowhere ends with an internal error, and cannot go on."""
    crossing.change_register("RSP", 1 << 40)
    vm = make_vm("vm", "--incoming", "defer", ram=bytes(crossing.ram))
    vm.feed(crossing.stream)
    vm.qmp("cont")
    wait_until(lambda: vm.status() == "internal-error", what="the fault")
    assert [event["event"] for event in vm.qmp.events][-2:] == ["RESUME", "STOP"]
    with pytest.raises(QmpError, match="cannot go on"):
        vm.qmp("cont")
