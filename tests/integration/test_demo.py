"""``vmferry demo`` as a newcomer runs it: real services, real certificates, a real guest, real figures."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import vmferry
from vmferry.errors import ExitCode
from vmferry.handoff.ledger import HostLedger
from vmferry.handoff.rights import Standing
from vmferry.telemetry.spans import load_spans

MEMORY_MIB = 64
REPEAT = 2
HOST_A, HOST_B = (f"spiffe://demo.vmferry.example/vmhost/{name}" for name in "ab")
PHASES = {
    "schedule", "migrate", "negotiate", "reserve", "precopy", "round", "switchover", "pause", "last round",
    "device state", "seal", "commit", "release", "receive", "verify", "load", "own", "resume",
}  # fmt: skip


@dataclass(frozen=True)
class Demonstration:
    """One that was run to its end."""

    document: dict[str, Any]
    kept: Path
    temporary: Path
    stderr: str


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A folder with a short name, since sockets are made below it."""
    with tempfile.TemporaryDirectory(prefix="vm-") as name:
        yield Path(name)


@pytest.fixture(scope="module")
def demonstration(folder: Path) -> Demonstration:
    """A demonstration there and back, twice measured and once compared, of a guest that writes."""
    kept, temporary = folder / "kept", folder / "tmp"
    temporary.mkdir()
    wishes = (
        *("--memory-mib", str(MEMORY_MIB), "--dirty-mib-per-s", "20"),
        *("--lanes", "2", "--repeat", str(REPEAT)),
    )
    ran = subprocess.run(
        _command("--json", *wishes, "--keep", str(kept)),
        env=_environment(temporary),
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert ran.returncode == ExitCode.OK, ran.stderr
    return Demonstration(json.loads(ran.stdout), kept, temporary, ran.stderr)


def test_every_crossing_completed(demonstration: Demonstration) -> None:
    """It went there and back without the extra check, and once more with it."""
    document = demonstration.document
    assert document["outcome"] == "completed"
    assert [(crossing["direction"], crossing["verified"]) for crossing in document["crossings"]] == [
        ("a to b", False),
        ("b to a", False),
        ("a to b", True),
    ]
    assert {crossing["outcome"] for crossing in document["crossings"]} == {"completed"}
    assert [crossing["owner"] for crossing in document["crossings"]] == [HOST_B, HOST_A, HOST_B]
    assert (document["owner"], document["owner_at_end"]) == (HOST_B, HOST_B)


def test_memory_and_guest_are_whole(demonstration: Demonstration) -> None:
    """Every byte was compared and the guest itself found nothing wrong."""
    document = demonstration.document
    assert document["memory_bytes"] == MEMORY_MIB * 1024 * 1024
    assert document["memory_identical"] is True
    assert document["guest_ok"] is True


def test_the_figures_make_sense(demonstration: Demonstration) -> None:
    """The pause is part of the whole, the guest saw a gap of its own, and what it had was sent."""
    document = demonstration.document
    assert 0 < document["downtime_ms"] < document["total_ms"]
    assert document["rounds"] >= 1
    resident_bytes = document["memory_bytes"] // 2
    assert resident_bytes <= document["wire_bytes"] < 20 * document["memory_bytes"]
    for crossing in document["crossings"]:
        # After the pause the guest first writes what it owes its rate, and only then looks at the clock.
        assert 0 < crossing["guest_gap_ms"] < 2 * crossing["downtime_ms"] + 500
    assert set(document["peak_rss_mib"]) == {"source-a", "dest-b", "source-b", "dest-a"}
    assert all(0 < peak < 200 for peak in document["peak_rss_mib"].values())


def test_one_trace_spans_scheduler_source_and_destination(demonstration: Demonstration) -> None:
    """Every phase hangs, in the end, under the scheduler's span."""
    (root,) = demonstration.document["spans"]
    assert root["name"] == "schedule"
    assert _names(root) >= PHASES

    spans = load_spans([demonstration.kept / "traces"], demonstration.document["trace_id"])
    assert {(span.host, span.service) for span in spans} == {
        ("operator", "scheduler"),
        ("a", "vmferry-source"),
        ("b", "vmferry-dest"),
    }


def test_the_journals_agree_with_the_document(demonstration: Demonstration) -> None:
    """What the hosts recorded on disk is what the document says of the owner."""
    ledgers = {name: HostLedger(_config(demonstration.kept, name)["state_dir"] / "journal") for name in "ab"}
    (machine,) = ledgers["a"].machines()
    assert ledgers["b"].machines() == [machine]
    assert ledgers["a"].rights(machine).standing is Standing.GONE
    assert ledgers["b"].rights(machine).standing is Standing.OWNED
    assert ledgers["b"].rights(machine).epoch == 1 + len(demonstration.document["crossings"])


def test_nothing_is_left(demonstration: Demonstration) -> None:
    """No process, no guest memory and no temporary folder outlives the demonstration."""
    _assert_nothing_left(demonstration.kept, demonstration.temporary)


def test_secrets_stay_private(demonstration: Demonstration) -> None:
    """Every key that was made can be read by its owner only."""
    keys = list((demonstration.kept / "tls").rglob("*.key"))
    assert keys
    assert {key.stat().st_mode & 0o777 for key in keys} == {0o600}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_everything(folder: Path, number: signal.Signals) -> None:
    """Interrupted in the middle, it ends and removes all it started, and says by its exit code that it was."""
    kept, temporary = folder / f"kept-{number}", folder / f"tmp-{number}"
    temporary.mkdir()
    with subprocess.Popen(
        _command("--memory-mib", "16", "--repeat", "100", "--keep", str(kept)),
        env=_environment(temporary) | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            _read_until(process, "a to b")
            process.send_signal(number)
            process.send_signal(number)  # an impatient user must not cut the cleaning up short
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()

    assert process.returncode == 128 + number, errors
    assert "Traceback" not in errors
    _assert_nothing_left(kept, temporary)


def _read_until(process: subprocess.Popen[str], words: str) -> None:
    assert process.stdout is not None
    for line in iter(process.stdout.readline, ""):
        if words in line:
            return
    pytest.fail(f"it ended before it said {words!r}")


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "vmferry.cli.main", "demo", *arguments]


def _environment(temporary: Path) -> dict[str, str]:
    return os.environ | {
        "TMPDIR": str(temporary),
        "PYTHONPATH": os.pathsep.join(
            [str(Path(vmferry.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        ),
    }


def _names(span: dict[str, Any]) -> set[str]:
    return {span["name"]}.union(*(_names(child) for child in span["children"]))


def _config(kept: Path, name: str) -> dict[str, Path]:
    values = tomllib.loads((kept / f"host-{name}.toml").read_text())
    return {key: Path(value) for key, value in values.items() if key.endswith("_dir")}


def _assert_nothing_left(kept: Path, temporary: Path) -> None:
    assert not list(temporary.iterdir())
    for name in "ab":
        assert not _config(kept, name)["ram_dir"].exists()
    processes = [re.search(r"-(\d+)\.jsonl$", path.name) for path in (kept / "traces").iterdir()]
    pids = [int(match[1]) for match in processes if match]
    assert len(pids) == 5  # four services and the scheduler
    for pid in pids:
        command = Path(f"/proc/{pid}/cmdline")
        assert not (command.exists() and b"vmferry" in command.read_bytes().replace(b"_svc", b"vmferry"))
