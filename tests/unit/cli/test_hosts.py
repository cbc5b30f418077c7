"""Commands that look at several hosts, of which some do not answer."""

from __future__ import annotations

import json
import os
import pty
import select
import socket
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from fcntl import ioctl
from pathlib import Path

import pytest

from tests.unit.cli.conftest import Run
from tests.unit.cli.fake_source import HOST_A, MIGRATION_ID, FakeSource, migration
from vmferry.cli.hosts import read_places
from vmferry.cli.top import Rounds
from vmferry.errors import ExitCode, InvalidArgumentError
from vmferry.v1 import migration_pb2 as pb

OTHER = "spiffe://test.example/vmhost/other"
GONE = "spiffe://test.example/vmhost/gone"


@pytest.fixture
def other(certificates: Path) -> Iterator[FakeSource]:
    """A source service of another host, which knows of other migrations and machines."""
    fake = FakeSource(certificates / "other")
    fake.machine.name, fake.machine.uuid = "db-1", "11111111-7a38-4a51-9a57-0f3e6a1c9b11"
    fake.machine.blockage.reason = "OUTCOME_UNKNOWN"
    fake.machine.blockage.message = "the destination has not answered"
    fake.migrations = []
    yield fake
    fake.close()


@pytest.fixture
def nobody() -> Iterator[str]:
    """An address at which nothing answers: connections are taken and never spoken to."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        yield f"127.0.0.1:{silent.getsockname()[1]}"


@pytest.fixture
def fleet(source: FakeSource, other: FakeSource, certificates: Path) -> list[str]:
    """The options that name both hosts."""
    return [
        *("--host", f"{HOST_A}={source.address}", "--host", f"{OTHER}={other.address}"),
        *("--tls", str(certificates / "operator")),
    ]


def test_machines_of_all_hosts(run: Run, fleet: list[str]) -> None:
    """One table with a column that says where, and a document that says the same."""
    ran = run("list", "--machines", *fleet)
    assert ran.code == ExitCode.OK
    rows = {line.split()[0]: line.split() for line in ran.out.splitlines()}
    assert "a" in rows["web-1"]
    assert "other" in rows["db-1"]
    document = json.loads(run("list", "--machines", "--json", *fleet).out)
    assert {one["name"]: one["host"] for one in document["machines"]} == {"web-1": "a", "db-1": "other"}
    assert document["unanswered"] == []


@pytest.mark.parametrize("command", [("list",), ("list", "--machines"), ("top", "--once")])
def test_one_silent_host_hides_no_other(
    run: Run, fleet: list[str], nobody: str, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    """The others are shown in time; it is said who did not answer, also by the exit code."""
    monkeypatch.setattr("vmferry.cli.hosts.ANSWER_S", 0.5)
    ran = run(*command, *fleet, "--host", f"{GONE}={nobody}")
    assert ran.code == ExitCode.UNREACHABLE
    assert "web-1" in ran.out
    assert "gone" in ran.out + ran.err
    assert nobody in ran.out + ran.err


def test_a_document_names_who_did_not_answer(run: Run, fleet: list[str]) -> None:
    """A port that nobody listens on is told as unreachable, beside what the others said."""
    ran = run("list", "--json", *fleet, "--host", f"{GONE}=127.0.0.1:1")
    document = json.loads(ran.out)
    (silent,) = document["unanswered"]
    assert (silent["host"], silent["address"], silent["reason"]) == (GONE, "127.0.0.1:1", "PEER_UNREACHABLE")
    assert len(document["migrations"]) == 2
    assert ran.code == ExitCode.UNREACHABLE


def test_a_migration_is_found_wherever_it_is(run: Run, fleet: list[str], source: FakeSource) -> None:
    """``status`` and ``watch`` ask all hosts; one that nobody knows is not found."""
    assert MIGRATION_ID in run("status", MIGRATION_ID, *fleet).out
    source.script = [migration(outcome=pb.MIGRATION_OUTCOME_COMPLETED)]
    assert run("watch", MIGRATION_ID, *fleet).code == ExitCode.OK
    ran = run("status", "ff" * 16, *fleet)
    assert ran.code == ExitCode.PRECONDITION
    assert "MIGRATION_NOT_FOUND" in ran.err


def test_a_host_that_might_know_is_named(run: Run, fleet: list[str]) -> None:
    """If one does not answer, nobody can say that there is no such migration."""
    ran = run("status", "ff" * 16, *fleet, "--host", f"{GONE}=127.0.0.1:1")
    assert ran.code == ExitCode.UNREACHABLE


def test_hosts_come_from_the_environment(
    run: Run, source: FakeSource, other: FakeSource, certificates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """VMFERRY_HOSTS names them all, with spaces between."""
    monkeypatch.setenv("VMFERRY_HOSTS", f"{HOST_A}={source.address} {OTHER}={other.address}")
    ran = run("list", "--machines", "--tls", str(certificates / "operator"))
    assert "web-1" in ran.out
    assert "db-1" in ran.out


@pytest.mark.parametrize(
    ("source", "host", "hosts", "field"),
    [
        ("", "", [], "--host"),
        ("", "", ["nonsense"], "--host"),
        ("", "", [f"{HOST_A}=nowhere"], "--host"),
        ("", "", ["spiffe://test.example/admin/x=127.0.0.1:1"], "--host"),
        ("nowhere", HOST_A, [], "--source"),
        ("127.0.0.1:1", "x", [], "--source-host"),
        ("127.0.0.1:1", "", [], "--source-host"),
    ],
)
def test_hosts_in_the_wrong_form_are_refused(source: str, host: str, hosts: list[str], field: str) -> None:
    """The option at fault is named."""
    with pytest.raises(InvalidArgumentError) as caught:
        read_places(source, host, hosts)
    assert caught.value.field == field


def test_a_host_that_is_named_twice_is_asked_once() -> None:
    """The last address counts."""
    places = read_places("127.0.0.1:1", HOST_A, [f"{HOST_A}=127.0.0.1:2", f"{OTHER}=[::1]:3"])
    assert places == [(HOST_A, "127.0.0.1:2"), (OTHER, "[::1]:3")]


def test_top_shows_what_is_going_on(run: Run, fleet: list[str], source: FakeSource) -> None:
    """Hosts, migrations with figures, machines, and what somebody should know; once, where nobody looks."""
    running = source.migrations[0]
    running.phase = pb.MIGRATION_PHASE_PRECOPYING
    running.progress.round = 2
    running.progress.bytes_per_second = 300e6
    running.progress.expected_downtime.FromMilliseconds(42)
    running.progress.disconnected_since.GetCurrentTime()
    ran = run("top", *fleet)
    assert ran.code == ExitCode.OK
    for word in (
        "precopying",
        "286.1 MiB/s",
        "~42 ms",
        "web-1",
        "db-1",
        "OUTCOME_UNKNOWN",
        "connection lost",
    ):
        assert word in ran.out, ran.out
    assert "\x1b" not in ran.out


def test_rounds_are_measured_by_their_beginning() -> None:
    """A bar grows within a round, begins anew with the next one, and is full once the guest is paused."""
    rounds = Rounds()
    one = pb.Migration(id="x", phase=pb.MIGRATION_PHASE_PRECOPYING)

    def share(number: int, sent: int, left: int) -> float:
        one.progress.round, one.progress.sent_bytes, one.progress.remaining_bytes = number, sent, left
        return rounds.share(one)

    assert [share(1, 25, 75), share(1, 75, 25)] == [0.25, 0.75]
    assert [share(2, 100, 40), share(2, 120, 10)] == [0, 0.75]
    one.phase = pb.MIGRATION_PHASE_HANDING_OFF
    assert share(2, 120, 10) == 1


def test_top_on_a_terminal(fleet: list[str]) -> None:
    """It takes the whole screen, shows a host that dies as such, and q gives the terminal back as it was."""
    ours, theirs = pty.openpty()
    ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 160, 0, 0))
    before = termios.tcgetattr(theirs)
    program = "import sys; from vmferry.cli.main import main; sys.exit(main())"
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            program,
            "top",
            "--interval-s",
            "0.2",
            *fleet,
            "--host",
            f"{GONE}=127.0.0.1:1",
        ],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=os.environ | {"TERM": "xterm-256color", "COLUMNS": "160", "LINES": "50"},
    )
    try:
        shown = read_until(ours, b"unreachable")
        assert b"\x1b[?1049h" in shown
        assert b"web-1" in shown
        os.write(ours, b"q")
        assert b"\x1b[?1049l" in read_until(ours, b"\x1b[?1049l")
        assert process.wait(20) == 0
        assert termios.tcgetattr(theirs) == before
    finally:
        process.kill()
        process.wait()
        os.close(ours)
        os.close(theirs)


def read_until(terminal: int, wanted: bytes, seconds: float = 30.0) -> bytes:
    """What a terminal shows until it has shown this."""
    shown, deadline = b"", time.monotonic() + seconds
    while wanted not in shown:
        ready, _, _ = select.select([terminal], [], [], max(0, deadline - time.monotonic()))
        assert ready, f"{wanted!r} was not shown: {shown[-2000:]!r}"
        shown += os.read(terminal, 1 << 16)
    return shown
