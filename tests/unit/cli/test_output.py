"""What goes to the terminal, to a pipe, and into documents."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf import json_format
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from tests.unit.cli.conftest import Run
from tests.unit.cli.fake_source import HOST_A, MIGRATION_ID, FakeSource, migration
from vmferry.cli.output import as_document, label, size
from vmferry.cli.progress import LineView, LiveView
from vmferry.v1 import machine_pb2, migration_pb2

LONG = st.integers(min_value=0, max_value=2**53)


@given(
    sent=LONG,
    pages=LONG,
    nanos=st.integers(min_value=0, max_value=10**15),
    lanes=st.integers(min_value=0, max_value=2**32 - 1),
    params=st.dictionaries(st.text("abc", min_size=1), st.text()),
)
def test_documents_are_read_back_by_protobuf(
    sent: int, pages: int, nanos: int, lanes: int, params: dict[str, str]
) -> None:
    """Whatever the values, a document is valid JSON for protobuf, and its 64-bit numbers are numbers."""
    message = migration_pb2.Migration(revision=pages, timings=[migration_pb2.PhaseTiming(phase=3)])
    message.progress.sent_bytes = sent
    message.options.lanes = lanes
    message.timings[0].elapsed.FromNanoseconds(nanos)
    machine = machine_pb2.Machine(
        epoch=pages, spec=machine_pb2.MachineSpec(microvm=machine_pb2.MicrovmSpec(params=params))
    )

    document = json.loads(json.dumps(as_document(message)))

    assert json_format.ParseDict(document, migration_pb2.Migration()) == message
    assert document["progress"]["sent_bytes"] == sent
    assert document["revision"] == pages
    assert json_format.ParseDict(as_document(machine), machine_pb2.Machine()) == machine


def test_documents_have_every_field() -> None:
    """A field that has its default is there all the same, by its name in the .proto file."""
    document = as_document(migration_pb2.Migration())

    assert document["machine_id"] == ""
    assert document["phase"] == "MIGRATION_PHASE_UNSPECIFIED"
    assert document["timings"] == []


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2**30, "1.0 GiB"), (2**60, "1048576.0 TiB")],
)
def test_sizes_are_readable(number: int, text: str) -> None:
    """Sizes are in binary units with one digit."""
    assert size(number) == text


def test_the_live_view_shows_everything_an_operator_asks_for() -> None:
    """Phase, round, sent, remaining, rate, dirty rate, expected downtime and ETA are on the screen."""
    screen = io.StringIO()
    with LiveView(Console(file=screen, force_terminal=True, width=160)) as view:
        view.show(migration(current_round=1))
        view.note("the connection to the source is lost; trying again")
        view.show(migration(current_round=2))
        view.show(migration(outcome=migration_pb2.MIGRATION_OUTCOME_COMPLETED))

    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    for words in (
        "web-1: precopying, round 1",
        "web-1: precopying, round 2",
        "sent 24.0 MiB, remaining 40.0 MiB, rate 400.0 MiB/s, dirty 20.0 MiB/s, expected downtime 12 ms, ETA 1.4 s",
        "the connection to the source is lost",
        "web-1: completed",
        "downtime 12.3 ms",
        "━",
    ):
        assert words in shown


def test_a_lost_connection_is_shown_with_the_time_that_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    """In a log file there is a line when the hosts' connection is lost, and one when it is back."""
    lost = migration()
    lost.progress.disconnected_since.GetCurrentTime()
    lost.progress.reconnect_left.FromMilliseconds(43_000)
    with LineView() as view:
        for one in (migration(), lost, migration()):
            view.show(one)
    first, second, third = capsys.readouterr().err.splitlines()
    assert "web-1: precopying, round 1: connection lost, trying again for 43 s, sent 24.0 MiB" in second
    assert "lost" not in first + third


def test_a_pipe_gets_no_escape_codes(call: Run, source: FakeSource) -> None:
    """Nothing that a command prints into pipes has colours or cursor movements."""
    source.script = [migration(), migration(outcome=migration_pb2.MIGRATION_OUTCOME_COMPLETED)]

    for arguments in (("watch", MIGRATION_ID), ("list",), ("list", "--machines"), ("status", MIGRATION_ID)):
        ran = call(*arguments)
        assert "\x1b" not in ran.out + ran.err


@pytest.fixture
def environment(source: FakeSource, certificates: Path) -> dict[str, str]:
    """The environment of an operator at a colour terminal."""
    plain = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    return plain | {
        "VMFERRY_SOURCE": source.address,
        "VMFERRY_SOURCE_HOST": HOST_A,
        "VMFERRY_TLS": str(certificates / "operator"),
        "TERM": "xterm-256color",
    }


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    """Both ends of a terminal."""
    ends = pty.openpty()
    yield ends
    for end in ends:
        os.close(end)


@pytest.mark.parametrize(("extra", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_no_color_is_obeyed_at_a_terminal(
    environment: dict[str, str], terminal: tuple[int, int], extra: dict[str, str], coloured: bool
) -> None:
    """A table at a terminal is coloured, and with NO_COLOR it is not."""
    main_end, far_end = terminal
    command = [sys.executable, "-m", "vmferry.cli.main", "list", "--machines"]
    subprocess.run(command, env=environment | extra, stdout=far_end, check=True, timeout=60)

    shown = os.read(main_end, 65536).decode()

    assert "web-1" in shown
    assert ("\x1b[" in shown) is coloured


def test_what_nobody_has_said_is_called_not_known() -> None:
    """A machine that is arriving answers nobody yet; a word of the contract would say nothing to a person."""
    assert (
        label(machine_pb2.MachineState, machine_pb2.MACHINE_STATE_UNSPECIFIED, "MACHINE_STATE_")
        == "not-known"
    )
    assert label(machine_pb2.MachineState, machine_pb2.MACHINE_STATE_RUNNING, "MACHINE_STATE_") == "running"
