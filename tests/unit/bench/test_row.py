"""What can be compared: guests, links, peers, and options of a migration."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from benchmarks.compare import DEFAULT, GUESTS, PEERS, SCENARIOS, arguments, row, selection
from tests.support import require
from vmferry.bench.compare import MIN_LIMIT_S, Row
from vmferry.bench.guest import Load, Wishes, real_files
from vmferry.bench.moving import set_aside
from vmferry.bench.network import opened
from vmferry.bench.peer import VARIANTS
from vmferry.bench.usage import Usage
from vmferry.cli.bench import parse_options
from vmferry.errors import InsufficientMemoryError, InvalidArgumentError
from vmferry.memory.regions import RamFile

PAGE = 4096
MIB = 1024 * 1024


def test_files_begin_at_pages_and_libraries_come_first(tmp_path: Path) -> None:
    """As in a page cache: the rest of a file's last page is empty, links count once, the order is always the same."""
    (tmp_path / "b.so.1").write_bytes(b"b" * 5000)
    (tmp_path / "a.txt").write_bytes(b"a" * 10)
    (tmp_path / "c.so").symlink_to("b.so.1")
    content = real_files(3 * PAGE, (tmp_path,))
    assert content == b"b" * 5000 + bytes(2 * PAGE - 5000) + b"a" * 10 + bytes(PAGE - 10)
    assert real_files(PAGE, (tmp_path, tmp_path)) == b"b" * PAGE
    with pytest.raises(InvalidArgumentError) as refused:
        real_files(4 * PAGE, (tmp_path,))
    assert refused.value.field == "--files-mib"


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        (Row(Wishes(memory_mib=128, resident_mib=100)), "--memory-mib"),
        (Row(Wishes(Load.FILES, memory_mib=512, resident_mib=0, files_mib=250)), "--memory-mib"),
        (Row(Wishes(Load.WRITER, memory_mib=512, resident_mib=0)), "--dirty-mib-per-s"),
        (Row(Wishes(memory_mib=256, resident_mib=64), peers=("xen",)), "--against"),
    ],
)
def test_what_cannot_be_is_refused(wrong: Row, field: str) -> None:
    """By the option at fault, before anything is started."""
    with pytest.raises(InvalidArgumentError) as refused:
        wrong.check()
    assert refused.value.field == field


@pytest.mark.parametrize(
    ("free_mib", "peers", "one_way"),
    [(4 * 1024, (), False), (4 * 1024 - 1, (), True), (2 * 1024, (), True), (4 * 1024, ("qemu-tls",), True)],
)
def test_a_guest_that_does_not_fit_often_enough_is_moved_one_way(
    free_mib: int, peers: tuple[str, ...], one_way: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory is then kept ready at the host that it goes to alone; a computer without even that is told so."""
    for module in ("vmferry.bench.compare", "vmferry.cli.demo_hosts"):
        monkeypatch.setattr(f"{module}.shared_memory_bytes", lambda: free_mib * MIB)
    row = Row(Wishes(memory_mib=1024, resident_mib=64), peers=peers)
    row.check()
    assert row.one_way is one_way
    assert not Row(row.wishes, peers, preallocated=False).one_way
    with pytest.raises(InsufficientMemoryError) as refused:
        Row(Wishes(memory_mib=free_mib // (2 + len(peers) * 2) + 1, resident_mib=64), peers=peers).check()
    assert refused.value.field == "--memory-mib"


def test_a_migration_is_given_up_by_what_the_link_needs() -> None:
    """A slow link is given more time, and whoever names a limit has it."""
    wishes = Wishes(memory_mib=2048, resident_mib=1000)
    assert Row(wishes).patience_s == MIN_LIMIT_S
    assert Row(wishes, link_mbit=100).patience_s > 4 * 1000 * 8 / 100
    assert Row(wishes, link_mbit=100, limit_s=7).patience_s == 7


def test_options_are_spelled_as_in_the_api() -> None:
    """Numbers, durations, names of values; what does not exist is refused."""
    options = parse_options(["lanes=3", "stall_timeout=1.5s", "verify=VERIFY_MODE_BYTES", "tracker=hash"])
    assert (options.lanes, options.stall_timeout.nanos, options.tracker) == (3, 500_000_000, "hash")
    for wrong in ("lanes", "speed=1", "lanes=many"):
        with pytest.raises(InvalidArgumentError) as refused:
            parse_options([wrong])
        assert refused.value.field == "--option"


def test_both_sides_of_a_peer_are_told_the_same() -> None:
    """Channels and compression are the destination's business as well; limits are the source's."""
    variant = VARIANTS["qemu-multifd-zstd-tls"]
    here = variant.parameters(downtime_limit_ms=300, source=True)
    there = variant.parameters(downtime_limit_ms=300, source=False)
    assert here["downtime-limit"] == 300
    assert "downtime-limit" not in there
    assert here["multifd-compression"] == there["multifd-compression"] == "zstd"
    assert (here["tls-creds"], there["tls-creds"]) == ("client", "server")
    assert VARIANTS["qemu"].parameters(downtime_limit_ms=1, source=True)["tls-creds"] == ""


def test_the_selection_of_make_bench_names_what_there_is() -> None:
    """Every guest, link and peer occurs by default, every row can be made, and arguments narrow it."""
    assert set(PEERS) == set(VARIANTS)
    every = selection(arguments(["--all"]))
    assert len(every) == len(SCENARIOS) * len(GUESTS)
    assert set(DEFAULT) != set(every)
    assert {scenario for scenario, _, _ in DEFAULT} == set(SCENARIOS)
    assert {guest for _, guest, _ in DEFAULT} == set(GUESTS)
    assert {peer for _, _, peers in DEFAULT for peer in peers} == set(PEERS)
    for chosen in (*every, *DEFAULT):
        made = row(arguments([]), *chosen)
        made.wishes.check()
    asked = arguments(
        ["--scenario", "100mbit", "--guest", "writer-50", "--against", "qemu-tls", "--runs", "2"]
    )
    ((scenario, guest, peers),) = selection(asked)
    made = row(asked, scenario, guest, peers)
    assert (made.link_mbit, made.wishes.rate_mib_per_s, made.peers, made.runs) == (100, 50, ("qemu-tls",), 2)
    assert selection(arguments(["--ours-only"]))[0][2] == ()


def test_memory_is_set_aside_once() -> None:
    """All of it is taken, and what nobody wrote is still known to hold nothing, however often it is set aside."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        path = Path(folder) / "ram"
        with RamFile.create(path, 8 * MIB) as ram:
            ram.write_pages([(3, 1)], memoryview(b"x" * PAGE))
            for _ in range(2):
                set_aside(path, 8 * MIB)
                assert ram.allocated_bytes == 8 * MIB
                assert list(ram.data_runs()) == [(3, 1)]


def test_what_crosses_a_link_is_counted_and_nothing_is_left() -> None:
    """Bytes that one host sends to the other are counted with their headers; the namespaces go."""
    require(os.geteuid() == 0, "only root can make network namespaces")
    with opened(100) as link:
        (space, _), (_, interface) = link.counters
        before = link.wire_bytes()
        target = link.places["b"].data_at
        sender = (
            "import socket\n"
            f"socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(bytes(1000), ('{target}', 9))"
        )
        subprocess.run([*link.places["a"].within, sys.executable, "-c", sender], check=True)
        assert link.wire_bytes() - before >= 1000
        assert (link.name, link.own, interface) == ("100 Mbit/s", True, "data")
        assert space in subprocess.run(["ip", "netns"], check=True, capture_output=True, text=True).stdout
    assert space not in subprocess.run(["ip", "netns"], check=True, capture_output=True, text=True).stdout


def test_the_time_of_a_process_that_has_ended_counts() -> None:
    """What it had used when it was last looked at stays, and is not counted twice."""
    work = "import time\nwhile time.process_time() < 0.3: pass\nprint('done', flush=True)\ntime.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", work], stdout=subprocess.PIPE)
    try:
        usage = Usage([process.pid, os.getpid()], [process.pid])
        assert process.stdout is not None
        assert process.stdout.readline() == b"done\n"
        usage.stop()
        again = Usage([process.pid])
        process.send_signal(signal.SIGKILL)
        process.wait()
        again.stop()
        assert usage.cpu_s() >= 0.2
        assert again.cpu_s() < 0.1
        assert usage.peak_mib is not None
        assert usage.peak_mib > 1
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
