"""``vmferry machine events``: what is shown of a board on disk."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.events.samples import EVENT, ID, NOW, OTHER
from vmferry.cli.main import run
from vmferry.errors import ExitCode
from vmferry.events import states
from vmferry.events.files import BoardFiles
from vmferry.events.states import Board

UUID = "0d1b6a9e-9a54-4d0c-8f4e-0a1c7c6f2b11"


@pytest.fixture
def config(tmp_path: Path) -> str:
    """A host from which a machine has gone, and which remembers what it told it."""
    path = tmp_path / "host.toml"
    path.write_text(f'state_dir = "{tmp_path}/state"\nrun_dir = "{tmp_path}/run"\n')
    board = states.scheduled(
        states.approved(states.scheduled(Board(), EVENT), ID, "WestNO_0"), replace(EVENT, id=OTHER)
    )
    board = states.ended(states.started(board, ID, NOW + 5), ID, NOW + 6, lasted_s=0.0314)
    BoardFiles(tmp_path / "state" / "events").store(UUID, board)
    return str(path)


def test_events_of_a_machine_that_has_left(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    """By its identity: what is over and how long it lasted, and what is still to come."""
    assert run(["machine", "events", UUID, "--config", config, "--json"]) == ExitCode.OK
    first, second = json.loads(capsys.readouterr().out)["events"]
    assert (first["id"], first["status"], first["approved_by"], first["lasted_s"]) == (
        ID,
        "completed",
        "WestNO_0",
        "0.031",
    )
    assert (second["id"], second["status"], second["started"], second["lasted_s"]) == (
        OTHER,
        "scheduled",
        "",
        "",
    )
    assert run(["machine", "events", UUID, "--config", config]) == ExitCode.OK
    assert "completed" in capsys.readouterr().out


def test_a_machine_that_nobody_knows_is_refused(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    """By name, as everywhere."""
    assert run(["machine", "events", "nobody", "--config", config]) == ExitCode.PRECONDITION
    assert "MACHINE_NOT_FOUND" in capsys.readouterr().err
