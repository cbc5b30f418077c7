"""``vmferry demo --machine qemu``: the same document as the micro-VM's, or a word about what is missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import vmferry
from vmferry.errors import ExitCode


def demonstrate(tmp_path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run it to its end."""
    return subprocess.run(
        [sys.executable, "-m", "vmferry.cli.main", "demo", "--machine", "qemu", *options],
        env=os.environ | {"PYTHONPATH": str(Path(vmferry.__file__).parents[1]), "TMPDIR": "/tmp"},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )


@pytest.mark.timeout(180)
@pytest.mark.usefixtures("images")
def test_a_linux_guest_is_demonstrated(tmp_path: Path) -> None:
    """It crosses, crosses back compared byte for byte, and finds itself well; nothing of it is left."""
    ran = demonstrate(tmp_path, "--json", "--memory-mib", "128", "--vcpus", "2", "--dirty-mib-per-s", "2")
    assert ran.returncode == ExitCode.OK, ran.stderr
    document = json.loads(ran.stdout)
    assert document["outcome"] == "completed"
    assert document["guest_ok"] is True
    assert document["memory_identical"] is True
    assert document["machine"] == "linux"
    assert document["memory_bytes"] == 128 * 1024 * 1024
    assert len(document["crossings"]) == 2
    assert 0 < document["downtime_ms"] < document["total_ms"]
    assert not list(Path("/dev/shm").glob("vmferry-demo-*"))


@pytest.mark.parametrize(
    ("options", "culprit"),
    [
        (("--vcpus", "1000"), "--vcpus"),
        (("--memory-mib", "64"), "--resident-mib"),
        (("--kernel", "/nonexistent/vmlinuz"), "--kernel"),
    ],
)
def test_what_cannot_be_demonstrated_is_refused(
    tmp_path: Path, options: tuple[str, ...], culprit: str
) -> None:
    """Each by the option that is at fault, before anything is started."""
    ran = demonstrate(tmp_path, *options)
    assert ran.returncode == ExitCode.USAGE, ran.stderr
    assert culprit in ran.stderr
    assert not ran.stdout
