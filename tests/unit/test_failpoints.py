"""Failpoints: what switches them on, and that each of them is really passed somewhere."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vmferry import failpoints
from vmferry.errors import ConfigError
from vmferry.handoff.states import RecordKind

ROOT = Path(__file__).resolve().parents[2]


def places_in_the_code() -> set[str]:
    """Every name that the services pass to ``reach``; ``{place}`` stands for the kinds of records."""
    kinds = [kind.name.lower().replace("_", "-") for kind in RecordKind]
    kinds += [kind.removeprefix("update-") for kind in kinds]
    found: set[str] = set()
    for package in ("source_svc", "dest_svc", "vmferry"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "reach":
                    (name,) = node.args
                    if isinstance(name, ast.JoinedStr):
                        prefix = name.values[0]
                        assert isinstance(prefix, ast.Constant)
                        found.update(f"{prefix.value}{kind}" for kind in kinds)
                    else:
                        assert isinstance(name, ast.Constant)
                        found.add(str(name.value))
    return found


def test_every_failpoint_is_passed_somewhere() -> None:
    """A name that no code passes would make its test prove nothing, and a place without a name is never tested."""
    known = {*failpoints.SOURCE, *failpoints.DESTINATION, *failpoints.UPDATE}
    places = places_in_the_code()
    assert known <= places
    assert {name for name in places if ".record" not in name} <= known


@pytest.mark.parametrize(
    "text", ["source.nowhere=kill", "source.paused", "source.paused=hang", "dest.loaded=kill@x"]
)
def test_what_cannot_be_meant_is_refused(text: str) -> None:
    """An unknown place, an unknown action and a count that is none are named."""
    with pytest.raises(ConfigError) as caught:
        failpoints.parse(text)
    assert caught.value.field == failpoints.VARIABLE


def test_a_place_is_passed_unharmed_until_its_time_comes() -> None:
    """The second pass of a place ends the process, the first and other places do not."""
    program = (
        "import os; from vmferry import failpoints as f; f.activate(os.environ);"
        "f.reach('dest.loaded'); f.reach('source.paused'); print('once', flush=True);"
        "f.reach('dest.loaded'); print('twice')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {failpoints.VARIABLE: "dest.loaded=kill@2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "once\n"
    assert done.returncode == -signal.SIGKILL


def test_nothing_is_active_without_the_variable() -> None:
    """A service that was not told of any place passes them all."""
    assert failpoints.parse("") == {}
    failpoints.reach("source.paused")
