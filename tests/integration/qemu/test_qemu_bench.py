"""The comparison with QEMU's own migration runs, its figures fit together, and nothing of it is left.

Nothing here says how fast anybody is.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import vmferry
from tests.support import require, wait_until
from vmferry.errors import ExitCode

SHARED_MEMORY = Path("/dev/shm")
MIB = 1024 * 1024
RESIDENT_MIB = 32
OTHERS_END_S = 60


def measured(*options: str) -> dict[str, Any]:
    """The document of one small row."""
    ran = subprocess.run(
        [
            *(sys.executable, "-m", "vmferry.cli.main", "bench", "compare", "--json", "--runs", "1"),
            *("--memory-mib", "256", "--accelerator", "tcg", *options),
        ],
        env=os.environ | {"PYTHONPATH": str(Path(vmferry.__file__).parents[1]), "TMPDIR": "/tmp"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert ran.returncode == ExitCode.OK, ran.stderr
    document: dict[str, Any] = json.loads(ran.stdout)
    return document


def leftovers() -> set[str]:
    """Folders and namespaces of comparisons, of whoever makes them."""
    folders = [*SHARED_MEMORY.glob("vmferry-*"), *Path("/tmp").glob("vmferry-bench-*")]
    return {*map(str, folders), *map(str, Path("/run/netns").glob("vfb-*"))}


def assert_nothing_left(before: set[str]) -> None:
    """What was not there before goes; comparisons of other tests may be under way at the same time."""
    left = leftovers() - before
    wait_until(lambda: not left & leftovers(), seconds=OTHERS_END_S, what=f"the end of {sorted(left)}")


def assert_sensible(crossing: dict[str, Any], content_bytes: int) -> None:
    """Figures of one migration that was right, and that cannot have been otherwise."""
    assert (crossing["outcome"], crossing["guest_ok"]) == ("completed", True), crossing
    assert 0 < crossing["downtime_ms"] <= crossing["total_ms"] < crossing["whole_ms"]
    assert crossing["prepare_ms"] + crossing["total_ms"] <= crossing["whole_ms"]
    assert 0 < crossing["switch_gap_ms"] <= crossing["guest_gap_ms"] < crossing["whole_ms"]
    assert crossing["usual_gap_ms"] > 0.5
    assert crossing["wire_bytes"] >= crossing["sent_bytes"] > content_bytes
    assert crossing["cpu_s"] > 0
    assert crossing["rounds"] >= 1
    assert crossing["slow_down"] < 1


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("images")
def test_an_idle_guest_is_moved_by_both_in_turn() -> None:
    """One of ours and one of the peer's, with TLS, and ratios of what was measured."""
    require(os.geteuid() == 0, "without root, what others send over loopback counts too")
    before = leftovers()
    document = measured("--resident-mib", str(RESIDENT_MIB), "--against", "qemu-tls")
    ours, peer = document["crossings"]
    assert (ours["who"], peer["who"]) == ("ours", "qemu-tls")
    for crossing in (ours, peer):
        assert_sensible(crossing, RESIDENT_MIB * MIB)
    assert 10 < ours["services_peak_mib"] < 500
    for name, figure in (("total", "total_ms"), ("downtime", "downtime_ms"), ("guest_gap", "guest_gap_ms")):
        assert document["ratio"][name] == pytest.approx(peer[figure] / ours[figure], abs=0.001)
        assert document["peer"][figure]["median"] == peer[figure]
    for side in ("ours", "peer"):
        for figure in ("total_ms", "downtime_ms", "guest_gap_ms", "wire_bytes", "cpu_s"):
            spread = document[side][figure]
            assert 0 < spread["min"] <= spread["median"] <= spread["max"], figure
    assert document["network"] == "loopback"
    assert document["machine"]["qemu"]
    assert_nothing_left(before)


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("images")
def test_a_guest_with_files_crosses_a_link_of_a_given_rate() -> None:
    """Real files cross a shaped link no faster than it lets them, and the guest finds them as they were.

    Its memory lies in huge pages, of a file system that is gone afterwards.
    """
    require(os.geteuid() == 0, "only root can make a link of a given rate, and mount file systems")
    before = leftovers()
    guest = ("--guest", "files", "--files-mib", str(RESIDENT_MIB), "--huge-pages")
    document = measured(*guest, "--link-mbit", "400", "--ours-only")
    (ours,) = document["crossings"]
    assert ours["outcome"] == "completed"
    assert ours["guest_ok"] is True
    assert document["network"] == "400 Mbit/s"
    assert document["huge_pages"] is True
    assert ours["wire_bytes"] * 8 / (ours["whole_ms"] / 1000) < 400e6 * 1.1
    assert_nothing_left(before)
